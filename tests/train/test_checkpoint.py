"""Training states: they are read as data alone, and fit the model and the optimiser before anything is changed."""

import copy
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from brixel.errors import BrixelError, DamagedFileError
from brixel.train.checkpoint import TrainingState, load_state, save_state
from brixel.train.config import TrainConfig

CONFIG = TrainConfig(backbone="b", images=("i",), out="o")


def parts_of(seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return {"module": module, "optimizer": optimizer}


@pytest.fixture
def path(tmp_path):
    save_state(tmp_path / "state.pt", CONFIG, TrainingState(3, 0.5, 1), parts_of(0))
    return tmp_path / "state.pt"


def test_a_state_is_restored(path: Path) -> None:
    saved, parts = parts_of(0), parts_of(1)
    assert load_state(path, CONFIG, parts, processes=1) == TrainingState(3, 0.5, 1)
    torch.testing.assert_close(parts["module"].state_dict(), saved["module"].state_dict(), rtol=0, atol=0)
    assert parts["optimizer"].state_dict()["state"].keys() == saved["optimizer"].state_dict()["state"].keys()


def test_a_run_that_went_wrong_has_no_number_as_its_best(path: Path) -> None:
    save_state(path, CONFIG, TrainingState(3, float("nan"), 1), parts_of(0))
    assert str(load_state(path, CONFIG, parts_of(0), processes=1).best) == "nan"


def adam(content, index=0):
    return content["optimizer"]["state"][index]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("module"), "the state lacks module"),
        (lambda c: c.update(more=1), "the state has the unknown field 'more'"),
        (lambda c: c.update(config=5), "config in the state is 5; expected a table"),
        (lambda c: c["config"].update(step=5), "unknown setting 'step'"),
        (lambda c: c["config"].update({5: 5}), "unknown setting 5"),
        (lambda c: c["config"].update(steps=torch.ones(2)), "steps is tensor"),
        (lambda c: c.update(progress=[1]), "progress in the state is .1.; expected a table"),
        (lambda c: c["progress"].update(step=-1), "step in progress is -1"),
        (lambda c: c["progress"].update(best="high"), "best in progress is 'high'"),
        (lambda c: c.update(format_version=torch.ones(2)), "it has no format_version"),
        (lambda c: c.update(module=[1]), "module has other tensors than the model"),
        (lambda c: c["module"].pop("0.bias"), "module has other tensors than the model"),
        (lambda c: c["module"].update({"0.bias": torch.ones(3)}), r"0.bias of module is .3,. float32; expected floats"),
        (lambda c: c["module"].update({"0.bias": [0.0, 0.0]}), "0.bias of module is a list; expected a dense tensor"),
        (lambda c: c["module"].update({"0.bias": torch.ones(2).to_sparse()}), "expected a dense tensor"),
        (lambda c: c["module"].update({"0.bias": torch.ones(2).int()}), "is .2,. int32; expected floats"),
        (lambda c: c["module"].update({"1.num_batches_tracked": torch.tensor(1.5)}), "expected whole numbers"),
        (lambda c: c.update(optimizer={}), "optimizer lacks state, param_groups"),
        (lambda c: c["optimizer"].update(param_groups=[5]), "param_groups in optimizer is .5."),
        (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "optimizer has other groups of parameters"),
        (lambda c: c["optimizer"]["param_groups"][0].update(lr="x"), "lr of optimizer is 'x'; expected a value like"),
        (lambda c: c["optimizer"]["param_groups"][0].update(betas=(0.9,)), "betas of optimizer is .0.9,.; expected a"),
        (lambda c: c["optimizer"]["param_groups"][0].update(capturable=True), "capturable of optimizer is True"),
        (lambda c: c["optimizer"]["param_groups"][0].update(foreach={"a": 1}), "foreach of optimizer is .'a': 1."),
        (lambda c: c["optimizer"]["param_groups"][0].pop("betas"), "a group of optimizer lacks betas"),
        (lambda c: adam(c).pop("exp_avg"), "parameter 0 of optimizer lacks exp_avg"),
        (lambda c: c["optimizer"]["state"].update({9: {}}), "the state of a parameter 9, which the model lacks"),
        (lambda c: c["optimizer"]["state"].update({0: [1]}), "the state of a parameter 0"),
        (lambda c: adam(c).update(exp_avg=torch.ones(7)), r"'exp_avg' of parameter 0 of optimizer is .7,. float32"),
        (lambda c: adam(c).update(step=torch.ones(2)), r"'step' of parameter 0 of optimizer is .2,."),
    ],
)
def test_what_does_not_fit_is_damage_and_changes_nothing(path: Path, edit, message: str) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    parts = parts_of(1)
    before = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    with pytest.raises(DamagedFileError, match=rf"state\.pt is damaged or is not the state of .*{message}"):
        load_state(path, CONFIG, parts, processes=1)
    torch.testing.assert_close({name: part.state_dict() for name, part in parts.items()}, before, rtol=0, atol=0)


def test_containers_that_hold_each_other_many_times_make_no_endless_message(path: Path) -> None:
    tower: object = 1
    for _ in range(60):
        tower = [tower, tower]
    content = torch.load(path, weights_only=True)
    torch.save({**content, "progress": tower}, path)
    with pytest.raises(DamagedFileError, match="progress in the state is") as raised:
        load_state(path, CONFIG, parts_of(1), processes=1)
    assert len(str(raised.value)) < 1000


def test_a_compressed_file_is_no_state(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(DamagedFileError, match="its parts are larger than the file"):
        load_state(path, CONFIG, parts_of(1), processes=1)


def test_memory_that_runs_out_while_a_state_is_written_is_no_full_disk(path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        save_state(path, CONFIG, TrainingState(), parts_of(0))
    assert not isinstance(raised.value, BrixelError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_no_damage(path: Path, monkeypatch, error) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError) as raised:
        load_state(path, CONFIG, parts_of(1), processes=1)
    assert not isinstance(raised.value, BrixelError)
