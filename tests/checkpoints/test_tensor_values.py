"""Weights are dense and finite floating-point numbers, in a backbone's file and in an adapter's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_states import CONFIG, dinov2_state

from brixel import BrixelFeatures
from brixel.checkpoints.load_backbone import load_backbone
from brixel.errors import CheckpointError

NAME = "blocks.1.mlp.fc1.weight"
IN_SAFETENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda tensor: tensor.to(torch.int8),
    "uint8": lambda tensor: tensor.to(torch.uint8),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor > 0,
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "NaN or infinite": lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), torch.nan),
    "infinite": lambda tensor: torch.full_like(tensor, -torch.inf),
}
IN_PICKLES: dict[str, Callable[[Tensor], Tensor]] = {
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "sparse_coo": lambda tensor: tensor.to_sparse(),
    "meta device": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("fault", [*IN_SAFETENSORS, *IN_PICKLES])
def test_of_a_backbone(fault: str, tmp_path: Path) -> None:
    state, prefix = dinov2_state(), "teacher."
    state[NAME] = (IN_SAFETENSORS | IN_PICKLES)[fault](state[NAME])
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=rf"1 of 48 tensors cannot be weights: {prefix}{NAME} \(.*{fault}"):
        load_backbone(tmp_path / "some.pth", architecture=CONFIG)


def test_of_all_of_a_backbone(tmp_path: Path) -> None:
    torch.save({name: tensor.to(torch.int8) for name, tensor in dinov2_state().items()}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"48 of 48 tensors .* \(int8\), .*, \.\.\.; expected dense"):
        load_backbone(tmp_path / "some.pth", architecture=CONFIG)


def test_what_is_not_used_may_be_anything(tmp_path: Path) -> None:
    state = dinov2_state() | {"mask_token": torch.full((1, 16), torch.nan), "head.weight": torch.ones(2).bool()}
    torch.save(state, tmp_path / "some.pth")
    assert load_backbone(tmp_path / "some.pth", architecture=CONFIG).vit.depth == 3


def test_numbers_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    state = dinov2_state()
    torch.save(state | {"norm.weight": state["norm.weight"].double() * 1e60}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"as torch.float32: 1 of 1 tensors .* norm.weight \(NaN or infinite"):
        load_backbone(tmp_path / "some.pth", architecture=CONFIG)


@pytest.fixture(scope="module")
def saved(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", IN_SAFETENSORS)
def test_of_an_adapter(fault: str, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "adapter.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    state[name] = IN_SAFETENSORS[fault](state[name])
    save_file(state, tmp_path / "adapter.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name} \(.*{fault}.*; expected dense tensors of finite"):
        BrixelFeatures.from_pretrained(tmp_path, device="cpu")
