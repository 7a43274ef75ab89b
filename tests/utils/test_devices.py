import pytest
import torch

from brixel.errors import BrixelError
from brixel.utils import devices
from brixel.utils.devices import choose_device, choose_dtype


def test_auto_takes_the_best_device(monkeypatch):
    monkeypatch.setattr(devices, "_MPS_COMPLETE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BrixelError, match="'cuda' was asked for, but torch sees no CUDA device"):
        choose_device("cuda")
    with pytest.raises(BrixelError, match="unknown device 'gpu'"):
        choose_device("gpu")


def test_mps_is_used_only_where_torch_has_all_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("brixel.utils.devices._MPS_COMPLETE", False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(BrixelError, match=r"needs torch 2\.10 or newer"):
        choose_device("mps")


def test_auto_dtype_is_bfloat16_where_cuda_computes_in_it(monkeypatch):
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, answer=supported: answer)
        assert choose_dtype("auto", torch.device("cuda")) == dtype


def test_dtypes_by_name_and_as_they_are():
    cpu = torch.device("cpu")
    assert choose_dtype("float16", cpu) == torch.float16
    assert choose_dtype(torch.float64, cpu) == torch.float64
    for wrong in ("fp8", torch.int8, None, 16):
        with pytest.raises(BrixelError, match="unknown dtype"):
            choose_dtype(wrong, cpu)
