"""Which process of a run this is, and which GPU it takes."""

import pytest
import torch

from brixel import BrixelError
from brixel.train import distributed
from brixel.utils.processes import launched_process, own_device

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and removes all others."""

    def set_variables(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


@pytest.mark.parametrize(
    ("variables", "rank", "processes"),
    [
        ({}, 0, 1),
        ({"WORLD_SIZE": "", "RANK": " "}, 0, 1),
        ({"WORLD_SIZE": "1"}, 0, 1),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, 3, 4),
        ({"RANK": "7"}, 0, 1),
    ],
)
def test_what_a_launcher_says(launched, variables, rank, processes):
    launched(**variables)
    process = launched_process()
    assert (process.rank, process.processes) == (rank, processes)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "but RANK is 2; expected a rank of 0 to 1"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0; expected a whole number from 1 up"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1; expected a whole number from 0 up"),
    ],
)
def test_what_a_launcher_left_behind_is_refused_by_extraction_and_training(launched, variables, message):
    launched(**variables)
    with pytest.raises(BrixelError, match=message):
        launched_process()
    with pytest.raises(BrixelError, match=message), distributed.distributed_context("cpu"):
        pass


def test_each_process_takes_its_own_gpu_by_one_rule(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched(WORLD_SIZE="8", RANK="6", LOCAL_RANK="6", LOCAL_WORLD_SIZE="8")
    assert [own_device(device) for device in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:2", "cuda:1", "cpu"]
    with pytest.raises(BrixelError, match="8 processes train on a machine with 4 GPUs; start torchrun with 4 at most"):
        distributed._check_gpus()
    launched()
    assert own_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launched(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    assert own_device("auto") == "auto"
