"""Students with random weights and their outputs as the authors' release computed them: `../shared/golden`.

Everything goes the way a user's files go, through `BrixelFeatures.from_release`.
"""

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from helpers import SHARED
from safetensors.torch import load_file
from torch import Tensor

from brixel import BrixelFeatures, CheckpointError, ViTConfig
from brixel.checkpoints.key_mapping import rename
from brixel.checkpoints.release_adapters import RELEASE, our_names, read_release
from brixel.checkpoints.weight_files import shapes_of
from brixel.model.config import AdapterConfig
from brixel.model.upsampler import Upsampler

pytestmark = pytest.mark.shared

GOLDEN = SHARED / "golden"
COMMON = {"patch_px": 16, "positions": "rotary", "norm_eps": 1e-5, "registers": 4}
ARCHITECTURES = {
    "tiny_mlp": ViTConfig(width=64, depth=4, heads=2, ffn="mlp", ffn_width=256, **COMMON),
    "tiny_swiglu": ViTConfig(width=96, depth=5, heads=3, ffn="swiglu", ffn_width=384, **COMMON),
}
IMAGES = {"tiny_mlp": 3, "tiny_swiglu": 2}
NAMES = sorted(ARCHITECTURES)
# method.md: "What the release computes and never uses", rows 1 and 2 of level_embed aside
DEAD = (
    *("adapter.up.", "adapter.norm2.", "adapter.norm3.", "adapter.norm4.", "adapter.guide_proj."),
    *("adapter.spm.conv3.", "adapter.spm.conv4.", "adapter.spm.fc3.", "adapter.spm.fc4."),
)


def from_release(name: str, adapter: Path | None = None) -> BrixelFeatures:
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    return BrixelFeatures.from_release(
        adapter or GOLDEN / f"{name}.adapter.pth",
        GOLDEN / f"{name}.backbone.safetensors",
        architecture=ARCHITECTURES[name],
        blocks=described["interaction_indexes"],
        device="cpu",
        dtype=torch.float32,
    )


def release_state(name: str) -> dict[str, Tensor]:
    return torch.load(GOLDEN / f"{name}.adapter.pth", weights_only=True)


def our_shapes(name: str) -> dict[str, tuple[int, ...]]:
    config = AdapterConfig((0, 1, 2, 3), residual_detour=True, short_side_px=256)
    return shapes_of(lambda: Upsampler(ARCHITECTURES[name].width, config))


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "adapter.pth")
    return folder / "adapter.pth"


def is_dead(key: str) -> bool:
    return key.startswith(DEAD)


# ---------------------------------------------------------------- the release's own outputs


@pytest.mark.parametrize("name", NAMES)
def test_backbone_and_student_equal_the_release(name: str) -> None:
    model, tensors = from_release(name), load_file(GOLDEN / f"{name}.io.safetensors")
    for index in range(IMAGES[name]):
        image = tensors.pop(f"{index}.image")
        with torch.no_grad():
            maps, features = model.backbone.block_maps(image, model.blocks), model(image)
        for layer, found in enumerate(maps):
            torch.testing.assert_close(found, tensors.pop(f"{index}.layer{layer}"), rtol=0, atol=1e-5)
        torch.testing.assert_close(features, tensors.pop(f"{index}.features"), rtol=0, atol=1e-5)
    assert not tensors, "golden tensors that nothing was compared with"


@pytest.mark.parametrize("include_backbone", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_keeps_every_bit(name: str, include_backbone: bool, tmp_path: Path) -> None:
    model = from_release(name)
    model.save_pretrained(tmp_path / "model", include_backbone=include_backbone)
    again = BrixelFeatures.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    image = load_file(GOLDEN / f"{name}.io.safetensors")["0.image"]
    with torch.no_grad():
        assert torch.equal(model(image), again(image))


# ---------------------------------------------------------------- what never reaches the output


@pytest.mark.parametrize("name", NAMES)
def test_dead_keys_are_in_the_file_and_dropped_by_name(name: str) -> None:
    state = release_state(name)
    dead = [key for key in state if is_dead(key)]
    assert {prefix for prefix in DEAD if any(key.startswith(prefix) for key in dead)} == set(DEAD)
    assert dead == [key for key in state if any(fnmatchcase(key, pattern) for pattern in RELEASE.dropped)]
    strict = dataclasses.replace(RELEASE, dropped=())
    with pytest.raises(CheckpointError, match=rf"^here: {len(dead)} not known: {dead[0]}, {dead[1]}, "):
        rename(state, strict, our_shapes(name), what="here")


@pytest.mark.parametrize("name", NAMES)
def test_dead_tensors_reach_nothing(name: str, tmp_path: Path) -> None:
    state = release_state(name)
    for key, tensor in state.items():
        if is_dead(key) and tensor.is_floating_point():
            tensor.fill_(torch.nan)
    state["adapter.level_embed"][1:] = 1e3
    image = load_file(GOLDEN / f"{name}.io.safetensors")["0.image"]
    with torch.no_grad():
        assert torch.equal(from_release(name, saved(state, tmp_path))(image), from_release(name)(image))


def test_dead_tensors_may_be_missing(tmp_path: Path) -> None:
    lean = {key: tensor for key, tensor in release_state("tiny_mlp").items() if not is_dead(key)}
    before, after = from_release("tiny_mlp").state_dict(), from_release("tiny_mlp", saved(lean, tmp_path)).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key", ["adapter.invented.weight", "head.extra", "backbone.cls_token", "level_embed"])
def test_an_unknown_key_is_refused_by_name(key: str, tmp_path: Path) -> None:
    path = saved({**release_state("tiny_mlp"), key: torch.zeros(3)}, tmp_path)
    with pytest.raises(CheckpointError) as raised:
        from_release("tiny_mlp", path)
    title = "an adapter for ViT of width 64, depth 4, patch 16"
    assert str(raised.value) == f"{path} does not fit {title}: 1 not known: {key}"


@pytest.mark.parametrize("key", ["adapter.level_embed", "head.trunk.1.block.0.ln.bias", "adapter.spm.fc1.weight"])
def test_a_missing_key_is_refused_by_name(key: str, tmp_path: Path) -> None:
    state = release_state("tiny_mlp")
    del state[key]
    with pytest.raises(CheckpointError, match=f": 1 missing: {key}$"):
        from_release("tiny_mlp", saved(state, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_every_live_key_is_needed(name: str) -> None:
    state, shapes = release_state(name), our_shapes(name)
    live = [key for key in state if not is_dead(key)]
    assert len(live) > 150
    for key in live:
        others = {other: tensor for other, tensor in state.items() if other != key}
        with pytest.raises(CheckpointError, match=f"^here: 1 missing: {key}$"):
            rename(others, RELEASE, shapes, what="here")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("head.align_in.weight", r"head.align_in.weight (96, 64), model has (64, 96)"),
        ("head.out_conv.weight", r"head.out_conv.weight (64, 96), model has (96, 64)"),
        (
            "adapter.interactions.2.extractor.attn.value_proj.weight",
            "adapter.interactions.2.extractor.attn.value_proj.weight (96, 48), model has (48, 96)",
        ),
        (
            "adapter.interactions.3.extra_extractors.1.attn.sampling_offsets.weight",
            "adapter.interactions.3.extra_extractors.1.attn.attention_weights.weight (96, 128) + (64, 96), "
            "model has (192, 96)",
        ),
    ],
)
def test_a_transposed_tensor_is_refused_with_both_shapes(key: str, message: str, tmp_path: Path) -> None:
    state = release_state("tiny_swiglu")
    state[key] = state[key].transpose(0, 1).contiguous()
    with pytest.raises(CheckpointError) as raised:
        from_release("tiny_swiglu", saved(state, tmp_path))
    assert str(raised.value).endswith(message)
    assert "1 of another shape: " in str(raised.value)


def test_an_adapter_of_another_width_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"does not fit an adapter for ViT of width 64, .* of another shape: "):
        from_release("tiny_mlp", GOLDEN / "tiny_swiglu.adapter.pth")


def test_everything_wrong_is_said_at_once() -> None:
    state = release_state("tiny_mlp")
    del state["head.mix.bias"]
    state["adapter.invented.weight"] = torch.zeros(1)
    state["head.align_in.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as raised:
        rename(state, RELEASE, our_shapes("tiny_mlp"), what="here")
    parts = [
        "here: 1 missing: head.mix.bias",
        "1 of another shape: head.align_in.bias (5,), model has (64,)",
        "1 not known: adapter.invented.weight",
    ]
    assert str(raised.value) == "; ".join(parts)


def test_read_release_gives_our_names_and_shapes_in_order() -> None:
    shapes = our_shapes("tiny_swiglu")
    state = our_names(read_release(GOLDEN / "tiny_swiglu.adapter.pth"), shapes, what="here")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    assert list(state) == list(shapes)
