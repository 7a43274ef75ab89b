"""A backbone is found wherever it is in a checkpoint; what is beside it is left aside by name, or refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_weights
from torch import Tensor
from weight_states import CONFIG, dinov2_state, prefixed

from brixel.backbones.vit import ViT
from brixel.checkpoints.backbone_in_checkpoint import find_backbone_in
from brixel.checkpoints.backbone_key_maps import KEY_MAPS
from brixel.checkpoints.load_backbone import load_backbone
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, CheckpointError

State = dict[str, Tensor]


def load(content: Any, folder: Path) -> ViT:
    torch.save(content, folder / "some.pth")
    return load_backbone(folder / "some.pth", architecture=CONFIG).vit


def find(content: Any, folder: Path) -> State:
    """The tensors that are found, without a model of them."""
    torch.save(content, folder / "some.pth")
    return find_backbone_in(read_tensors(folder / "some.pth"), KEY_MAPS, "some.pth").state


def assert_same_tensors(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def state() -> State:
    return dinov2_state()


@pytest.fixture(scope="module")
def other() -> State:
    return dinov2_state(seed=1)


@pytest.fixture
def reference(state: State, tmp_path: Path) -> ViT:
    return load(state, tmp_path)


def respelt(state: State, pattern: str, spelling: str | Callable[[re.Match[str]], str]) -> State:
    return {re.sub(pattern, spelling, name): tensor for name, tensor in state.items()}


# ---- names around it ----


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "model.", "net.", "vit.", "trunk.", "encoder.", "pretrained.", "image_encoder.trunk."),
        *("_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "_forward_module.model._orig_mod."),
        *("_fsdp_wrapped_module.", "module._fsdp_wrapped_module._fpw_module.", "model.backbone.", "anything.at.all."),
    ],
)
def test_any_prefix(prefix: str, state: State, tmp_path: Path) -> None:
    assert_same_tensors(find(prefixed(prefix, state), tmp_path), state)


def test_a_prefix_is_nothing_to_report(state: State, reference: ViT, tmp_path: Path, caplog: Any) -> None:
    assert_same_weights(load({"model": prefixed("module.backbone.", state)}, tmp_path), reference)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "path", [("state_dict",), ("weights",), ("model", "module"), ("checkpoint", "network", "params"), ("a", 0, "b")]
)
def test_any_nest(path: tuple[str | int, ...], state: State, tmp_path: Path) -> None:
    nested: Any = prefixed("module.", state)
    for name in reversed(path):
        nested = [nested] if name == 0 else {name: nested}
    records = {"epoch": 3, "lr_schedulers": [{"last": 1}], "rng_state": torch.zeros(5, dtype=torch.uint8)}
    moments = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    assert_same_tensors(find({**nested, **records, "optimizer": moments}, tmp_path), state)


def chunked(match: re.Match[str]) -> str:
    return f"blocks.{int(match[1]) // 2}.{match[1]}."


def chunked_from_zero(match: re.Match[str]) -> str:
    return f"blocks.{int(match[1]) // 2}.{int(match[1]) % 2}."


@pytest.mark.parametrize(
    "spelling",
    [
        chunked,
        chunked_from_zero,
        r"blocks.\1._fsdp_wrapped_module.",
        r"blocks.\1._checkpoint_wrapped_module.",
        r"blocks.\1._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.",
    ],
)
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_spellings_of_blocks(spelling: Any, prefix: str, state: State, tmp_path: Path) -> None:
    spelt = respelt(state, r"^blocks\.(\d+)\.", spelling)
    assert_same_tensors(find(prefixed(prefix, spelt), tmp_path), state)


# ---- several networks ----


def noise() -> Tensor:
    return torch.ones(2, 3)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        ("teacher.backbone.", "student.backbone."),
        ("state_dict_ema.", "state_dict."),
        ("model_ema.module.", "model.module."),
        ("model.ema_backbone.", "model.backbone."),
        ("ema.shadow.", "model."),
        ("target_encoder.", "encoder."),
        ("encoder_k.", "encoder_q."),
        ("momentum_encoder.", "base_encoder."),
        ("teacher.", "gram_teacher."),
        ("model_ema.", "teacher."),
        ("swa_model.", "student."),
    ],
)
def test_averages_and_teachers_come_first(wanted: str, left: str, state: State, other: State) -> None:
    for parts in ((wanted, state), (left, other)), ((left, other), (wanted, state)):
        both = {name: tensor for prefix, part in parts for name, tensor in prefixed(prefix, part).items()}
        heads = {f"{wanted.partition('.')[0]}.dino_head.mlp.0.weight": noise(), "ibot_head.last_layer.weight": noise()}
        found = find_backbone_in({**both, **heads}, KEY_MAPS, "some.pth")
        assert_same_tensors(found.state, state)
        plain = [place.replace("module.", "").rstrip(".") for place in (wanted, left)]
        assert found.report.startswith(
            f"the backbone taken is the one at '{plain[0]}', not at '{plain[1]}'; left aside"
        )
        assert "ibot_head" in found.report


@pytest.mark.parametrize("prefix", ["student.backbone.", "model_ema."])
def test_the_only_one_is_named_where_it_matters(prefix: str, state: State, tmp_path: Path, caplog: Any) -> None:
    load(prefixed(prefix, state), tmp_path)
    assert f"the backbone taken is the one at '{prefix.rstrip('.')}'" in caplog.text


def test_two_that_nothing_tells_apart_are_refused(state: State, other: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="several backbones, at 'left', 'right', and nothing says which one"):
        load({**prefixed("left.", state), **prefixed("right.", other)}, tmp_path)


def test_two_that_are_the_same_are_one(state: State, reference: ViT, tmp_path: Path) -> None:
    copy = {name: tensor.clone() for name, tensor in state.items()}
    assert_same_weights(load({"model": state, "module": copy}, tmp_path), reference)


def test_of_two_sizes_the_one_that_fits_is_taken(state: State, reference: ViT, tmp_path: Path) -> None:
    """A teacher of another size is not an average of the student."""
    shallow = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.2.")}
    assert_same_weights(load({**prefixed("student.", state), **prefixed("teacher.", shallow)}, tmp_path), reference)


def test_moments_of_an_optimiser_are_no_backbone(
    state: State, other: State, reference: ViT, tmp_path: Path, caplog: Any
) -> None:
    assert_same_weights(load({"model": state, "optimizer": {"exp_avg": other}}, tmp_path), reference)
    assert caplog.messages == []


# ---- what is beside it ----


@pytest.mark.parametrize(
    "head",
    [
        *("head.weight", "fc.weight", "classifier.bias", "dino_head.mlp.0.weight", "linear_head.weight"),
        *("decode_head.conv_seg.weight", "auxiliary_head.0.bias", "depth_head.a", "neck.0.weight", "fc_norm.bias"),
        *("decoder_embed.weight", "projector.0.weight", "prototypes.weight", "dino_loss.center", "queue"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_known_heads_are_left_aside_and_named(head: str, prefix: str, state: State) -> None:
    found = find_backbone_in({**prefixed(prefix, state), head: noise()}, KEY_MAPS, "some.pth")
    assert_same_tensors(found.state, state)
    assert found.report == f"left aside, as not of the backbone: {head.partition('.')[0]}"


def test_what_was_chosen_is_logged(state: State, other: State, tmp_path: Path, caplog: Any) -> None:
    load({**prefixed("student.", other), **prefixed("teacher.", state), "head.weight": noise()}, tmp_path)
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'some.pth'}: the backbone taken is the one at 'teacher', not at 'student'; "
    )
    assert message.endswith("left aside, as not of the backbone: head")


@pytest.mark.parametrize("unknown", ["mystery", "gate.weight", "blocks.0.attn.lora_A.weight", "blocks.1.ls3.gamma"])
@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone."])
def test_everything_else_is_refused_by_name(unknown: str, prefix: str, state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"1 not known: {unknown}$"):
        load(prefixed(prefix, {**state, unknown: noise()}), tmp_path)


def test_an_unknown_network_beside_is_refused_by_name(state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2 not known: mystery.0.weight, mystery.0.bias$"):
        load({**prefixed("backbone.", state), "mystery.0.weight": noise(), "mystery.0.bias": noise()}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_fsdp_wrapped_module._flat_param": noise()}, "FSDP has flattened.*full_state_dict=True"),
        ({"adapter.level_embed": noise()}, "an adapter of the paper's authors, not a backbone: use from_release"),
        ({"adapter.query.weight": noise(), "head.out.bias": noise()}, "an adapter of brixel.* to from_pretrained"),
    ],
)
def test_what_is_no_backbone_is_called_what_it_is(content: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(content, tmp_path)


def test_a_pickle_that_holds_itself(state: State, reference: ViT, tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": state}
    content["again"] = content
    assert_same_weights(load(content, tmp_path), reference)


# ---- two names that become one, buffers of optimisers, odd tensors ----


def test_wrappers_whose_names_become_one_are_two_backbones(state, other, tmp_path):
    for content in ({"module": state, "_orig_mod": other}, {"_orig_mod": other, "module": state}):
        with pytest.raises(CheckpointError, match="holds several backbones"):
            find(content, tmp_path)


@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "grads", "adam"])
def test_what_an_optimiser_keeps_is_no_average(state, other, tmp_path, name):
    assert_same_tensors(find({"model": state, name: other}, tmp_path), state)


def test_copies_of_one_backbone_with_tensors_that_are_not_read(state, tmp_path):
    with_head = {**state, "head.mlp.0.weight": torch.zeros(3, 64)}
    copied = {name: tensor.clone() for name, tensor in with_head.items()}
    torch.save({"model": with_head, "copy": copied}, tmp_path / "some.pth")
    unread = read_tensors(tmp_path / "some.pth", lambda name: "head" not in name)
    assert_same_tensors(find_backbone_in(unread, KEY_MAPS, "some.pth").state, state)


def test_fields_replace_those_of_a_whole_configuration(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    halves = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    loaded = load_backbone(tmp_path / "w.pth", architecture=CONFIG, fields=halves)
    assert (loaded.vit.mean, loaded.vit.std) == (halves["mean"], halves["std"])
    with pytest.raises(BrixelError, match="a ViT has no setting 'nonsense'"):
        load_backbone(tmp_path / "w.pth", architecture=CONFIG, fields={"nonsense": 1})
