"""Weight files: the same weights in every layout and container give the same ViT; what cannot be read says why.

The states are written by hand in Meta's layout and converted to the others by the tables of the formats' own converters
(facts: `docs/backbones.md`), not by ours.
"""

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brixel import BrixelFeatures
from brixel.backbones import registry
from brixel.backbones.registry import KnownBackbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints import load_backbone as loading
from brixel.checkpoints.load_backbone import load_backbone
from brixel.checkpoints.weight_files import load_into, read_tensors, write_tensors
from brixel.errors import BrixelError, CheckpointError

State = dict[str, Tensor]
W, F, DEPTH, HEADS, PATCH = 32, 48, 2, 2, 4
_SHARED: dict[str, Any] = {"width": W, "depth": DEPTH, "heads": HEADS, "patch_px": PATCH, "ffn_width": F}
_V2: dict[str, Any] = {**_SHARED, "positions": "learned", "norm_eps": 1e-6, "native_grid": 3}
_V3: dict[str, Any] = {**_SHARED, "positions": "rotary", "norm_eps": 1e-5, "registers": 4}
CONFIGS = {
    "dinov3": ViTConfig(**_V3, ffn="mlp"),
    "dinov3-gated": ViTConfig(**_V3, ffn="swiglu"),
    "dinov2": ViTConfig(**_V2, ffn="mlp"),
    "dinov2-gated": ViTConfig(**_V2, ffn="swiglu"),
    "dinov2-reg4": ViTConfig(**_V2, ffn="mlp", registers=4),
}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of models holds the tiny ones here."""
    rows = {name: KnownBackbone(name, vit, "mit", "us/tiny", "timm/tiny") for name, vit in CONFIGS.items()}
    for module in (loading, registry):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", rows)


# ---- the same weights in three layouts, by hand ----


def exact_periods() -> Tensor:
    return torch.tensor([100 ** (4 * k / 16) for k in range(4)])  # heads of 16


def meta_state(name: str) -> State:
    """Random weights as Meta writes them. The key's third of the bias is not zero where a mask makes it so."""
    v3, gated, registers = name.startswith("dinov3"), "gated" in name, "reg4" in name
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, W), "mask_token": (1, W)}
    if v3 or registers:
        shapes["storage_tokens" if v3 else "register_tokens"] = (1, 4, W)
    if not v3:
        shapes["pos_embed"] = (1, 10, W)
    shapes |= layer("patch_embed.proj", W, 3, PATCH, PATCH) | layer("norm", W)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shapes |= layer(f"{block}.norm1", W) | layer(f"{block}.norm2", W)
        shapes |= layer(f"{block}.attn.qkv", 3 * W, W) | layer(f"{block}.attn.proj", W, W)
        shapes |= {f"{block}.ls1.gamma": (W,), f"{block}.ls2.gamma": (W,)}
        if not gated:
            shapes |= layer(f"{block}.mlp.fc1", F, W) | layer(f"{block}.mlp.fc2", W, F)
        elif v3:
            shapes |= layer(f"{block}.mlp.w1", F, W) | layer(f"{block}.mlp.w2", F, W) | layer(f"{block}.mlp.w3", W, F)
        else:
            shapes |= layer(f"{block}.mlp.w12", 2 * F, W) | layer(f"{block}.mlp.w3", W, F)
    generator = torch.Generator().manual_seed(3)
    state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if v3:
        state["rope_embed.periods"] = exact_periods()
        mask = torch.cat([torch.ones(W), torch.zeros(W), torch.ones(W)])
        state |= {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(DEPTH)}
    return state


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def renamed(state: State, replacements: list[tuple[str, str]]) -> State:
    def rename(key: str) -> str:
        for old, new in replacements:
            key = key.replace(old, new)
        return key

    return {rename(key): tensor for key, tensor in state.items()}


def thirds(state: State, key: str, names: tuple[str, str, str]) -> State:
    return {name: third.clone() for name, third in zip(names, state.pop(key).chunk(3), strict=True)}


def v3_huggingface(meta: State) -> State:
    state = dict(meta)
    del state["rope_embed.periods"]
    for i in range(DEPTH):
        at, to = f"blocks.{i}.attn.qkv", f"layer.{i}.attention"
        del state[f"{at}.bias_mask"]
        state |= thirds(state, f"{at}.weight", tuple(f"{to}.{part}_proj.weight" for part in "qkv"))
        state |= thirds(state, f"{at}.bias", tuple(f"{to}.{part}_proj.bias" for part in "qkv"))
        del state[f"{to}.k_proj.bias"]
    gated = "blocks.0.mlp.w1.weight" in meta
    ffn = [("w1", "gate_proj"), ("w2", "up_proj"), ("w3", "down_proj")] if gated else [("fc1", "up_proj")]
    state = renamed(state, [("mlp." + old, "mlp." + new) for old, new in [*ffn, ("fc2", "down_proj")]])
    state = renamed(state, [("attn.proj", "attention.o_proj"), ("ls1.gamma", "layer_scale1.lambda1")])
    state = renamed(state, [("ls2.gamma", "layer_scale2.lambda1"), ("blocks.", "layer.")])
    state = renamed(state, [("patch_embed.proj", "embeddings.patch_embeddings"), ("cls_token", "embeddings.cls_token")])
    state = renamed(state, [("storage_tokens", "embeddings.register_tokens"), ("mask_token", "embeddings.mask_token")])
    return state | {"embeddings.mask_token": state["embeddings.mask_token"][None]}


def v3_timm(meta: State) -> State:
    state = dict(meta)
    del state["rope_embed.periods"], state["mask_token"]
    for i in range(DEPTH):
        at = f"blocks.{i}.attn"
        del state[f"{at}.qkv.bias_mask"]
        state |= thirds(state, f"{at}.qkv.bias", (f"{at}.q_bias", f"{at}.k_bias", f"{at}.v_bias"))
        del state[f"{at}.k_bias"]
    state = renamed(state, [("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")])
    return renamed(state, [("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2")])


def v2_huggingface(meta: State) -> State:
    state = dict(meta)
    for i in range(DEPTH):
        to = f"encoder.layer.{i}.attention.attention"
        for part in ("weight", "bias"):
            names = (f"{to}.query.{part}", f"{to}.key.{part}", f"{to}.value.{part}")
            state |= thirds(state, f"blocks.{i}.attn.qkv.{part}", names)
    state = renamed(state, [("blocks.", "encoder.layer."), ("attn.proj", "attention.output.dense")])
    state = renamed(state, [("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")])
    state = renamed(state, [("mlp.w12", "mlp.weights_in"), ("mlp.w3", "mlp.weights_out")])
    outer = {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias", "cls_token": "embeddings.cls_token"}
    outer |= {"pos_embed": "embeddings.position_embeddings", "mask_token": "embeddings.mask_token"}
    outer |= {"register_tokens": "embeddings.register_tokens"}
    outer |= {
        f"patch_embed.proj.{part}": f"embeddings.patch_embeddings.projection.{part}" for part in ("weight", "bias")
    }
    return {outer.get(key, key): tensor for key, tensor in state.items()}


def v2_timm(meta: State) -> State:
    state = dict(meta)
    del state["mask_token"]
    if "register_tokens" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
        state["reg_token"] = state.pop("register_tokens")
    return renamed(state, [("mlp.w12", "mlp.fc1"), ("mlp.w3", "mlp.fc2")])


def in_layouts(name: str) -> dict[str, State]:
    meta = meta_state(name)
    others = (v3_huggingface, v3_timm) if name.startswith("dinov3") else (v2_huggingface, v2_timm)
    return {"meta": meta, "huggingface": others[0](meta), "timm": others[1](meta)}


# ---- containers ----


def as_pth(state: State, folder: Path) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def as_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_shards(state: State, folder: Path) -> Path:
    names = {key: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, key in enumerate(state)}
    for shard in set(names.values()):
        save_file({key: state[key] for key, name in names.items() if name == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def as_timm_folder(state: State, folder: Path) -> Path:
    """timm repositories hold the same weights twice."""
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    stated = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 12, 12]}
    config = {"architecture": "vit_tiny", "num_features": W, "global_pool": "token", "pretrained_cfg": stated}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CONTAINERS: dict[str, Callable[[State, Path], Path]] = {
    "pth": as_pth,
    "safetensors": as_safetensors,
    "shards": as_shards,
}


def images(grid_hw: tuple[int, int] = (3, 3)) -> Tensor:
    size = (2, 3, grid_hw[0] * PATCH, grid_hw[1] * PATCH)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def assert_same_vit(vit: ViT, other: ViT, but: tuple[str, ...] = ()) -> None:
    """The same maps and, apart from ``but``, the same tensors, to the bit."""
    ours, theirs = vit.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == sorted(but)
    for found, expected in zip(vit.block_maps(images(), [0, 1]), other.block_maps(images(), [0, 1]), strict=True):
        assert torch.equal(found, expected)


# ---- the same ViT from all of them ----


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["meta", "huggingface", "timm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_and_container_gives_the_same_vit(name: str, layout: str, tmp_path: Path) -> None:
    reference = load_backbone(as_pth(meta_state(name), tmp_path)).vit
    class_position = ("cls_token", "positions") if (name, layout) == ("dinov2-reg4", "timm") else ()
    for container, write in CONTAINERS.items():
        folder = tmp_path / container
        folder.mkdir()
        loaded = load_backbone(write(in_layouts(name)[layout], folder))
        assert loaded.architecture == name
        assert_same_vit(loaded.vit, reference, but=class_position)


def test_the_tensors_are_where_they_belong(tmp_path: Path) -> None:
    meta = meta_state("dinov3-gated")
    ours = load_backbone(as_pth(meta, tmp_path)).vit.state_dict()
    gate_up = torch.cat([meta["blocks.1.mlp.w1.weight"], meta["blocks.1.mlp.w2.weight"]])
    assert torch.equal(ours["blocks.1.ffn.gate_up.weight"], gate_up)
    assert torch.equal(ours["blocks.1.ffn.down.weight"], meta["blocks.1.mlp.w3.weight"])
    assert torch.equal(ours["blocks.1.attention.qkv.weight"], meta["blocks.1.attn.qkv.weight"])
    assert torch.equal(ours["blocks.1.scale2"], meta["blocks.1.ls2.gamma"])
    assert torch.equal(ours["registers"], meta["storage_tokens"])


def test_class_position_of_timm_with_registers(tmp_path: Path) -> None:
    meta = meta_state("dinov2-reg4")
    vit = load_backbone(as_pth(v2_timm(meta), tmp_path)).vit
    assert torch.equal(vit.cls_token, meta["cls_token"] + meta["pos_embed"][:, :1])
    assert not vit.positions[:, 0].any()
    assert torch.equal(vit.positions[:, 1:], meta["pos_embed"][:, 1:])


@pytest.mark.parametrize("name", ["dinov3", "dinov2-gated"])
def test_timm_folder(name: str, tmp_path: Path) -> None:
    reference = load_backbone(as_pth(meta_state(name), tmp_path)).vit
    folder = tmp_path / "timm"
    folder.mkdir()
    loaded = load_backbone(as_timm_folder(in_layouts(name)["timm"], folder), architecture=name)
    assert_same_vit(loaded.vit, reference)
    assert (loaded.vit.config.mean, loaded.vit.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("layout", ["meta", "huggingface", "timm"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.", "module.backbone."])
def test_prefixes_of_wrappers(prefix: str, layout: str, tmp_path: Path) -> None:
    reference = load_backbone(as_pth(meta_state("dinov3"), tmp_path)).vit
    wrapped = {prefix + key: tensor for key, tensor in in_layouts("dinov3")[layout].items()}
    assert_same_vit(load_backbone(as_safetensors(wrapped, tmp_path)).vit, reference)


@pytest.mark.parametrize("outer", ["teacher", "state_dict", "model"])
def test_nested_in_a_training_checkpoint(outer: str, tmp_path: Path) -> None:
    meta = meta_state("dinov2")
    reference = load_backbone(as_pth(meta, tmp_path)).vit
    state = {"backbone." + key: tensor for key, tensor in meta.items()}
    torch.save({"iteration": 7, outer: state}, tmp_path / "training.pth")
    assert_same_vit(load_backbone(tmp_path / "training.pth").vit, reference)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_old_pickles_and_their_suffixes(suffix: str, tmp_path: Path) -> None:
    meta = meta_state("dinov2")
    torch.save(meta, tmp_path / f"old{suffix}", _use_new_zipfile_serialization=False)
    assert_same_vit(load_backbone(tmp_path).vit, load_backbone(as_pth(meta, tmp_path)).vit)


def test_names_of_transformers_in_memory(tmp_path: Path) -> None:
    state = v3_huggingface(meta_state("dinov3"))
    in_memory = {("model." if key.startswith("layer.") else "") + key: tensor for key, tensor in state.items()}
    reference = load_backbone(as_pth(state, tmp_path)).vit
    assert_same_vit(load_backbone(as_safetensors(in_memory, tmp_path)).vit, reference)


@pytest.mark.parametrize("layout", ["meta", "huggingface", "timm"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_files_widen_exactly(kind: torch.dtype, layout: str, tmp_path: Path) -> None:
    state = in_layouts("dinov3-gated")[layout]
    periods = {key: state[key] for key in state if key == "rope_embed.periods"}
    half = {key: tensor.to(kind) for key, tensor in state.items()} | periods
    widened = {key: tensor.float() for key, tensor in half.items()}
    vit = load_backbone(as_safetensors(half, tmp_path)).vit
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    assert_same_vit(vit, load_backbone(as_pth(widened, tmp_path)).vit)


# ---- biases and rotary periods ----


def with_masks(state: State, mask: Tensor | None) -> State:
    kept = {key: tensor for key, tensor in state.items() if not key.endswith("bias_mask")}
    if mask is None:
        return kept
    return kept | {f"blocks.{i}.attn.qkv.bias_mask": mask.clone() for i in range(DEPTH)}


@pytest.mark.parametrize("mask", [None, torch.full((3 * W,), torch.nan)], ids=["absent", "NaN"])
def test_masks_never_filled_in_mean_their_design(mask: Tensor | None, tmp_path: Path) -> None:
    meta = meta_state("dinov3")
    vit = load_backbone(as_safetensors(with_masks(meta, mask), tmp_path)).vit
    assert_same_vit(vit, load_backbone(as_pth(meta, tmp_path)).vit)
    query, key, value = vit.blocks[1].attention.qkv.bias.chunk(3)
    expected = meta["blocks.1.attn.qkv.bias"].chunk(3)
    assert torch.equal(query, expected[0])
    assert not key.any()
    assert torch.equal(value, expected[2])


def test_masks_are_multiplied_onto_the_biases(tmp_path: Path) -> None:
    meta = meta_state("dinov3")
    mask = (torch.arange(3 * W) % 5 == 0).float()
    vit = load_backbone(as_pth(with_masks(meta, mask), tmp_path)).vit
    assert torch.equal(vit.blocks[0].attention.qkv.bias, meta["blocks.0.attn.qkv.bias"] * mask)


@pytest.mark.parametrize(
    ("periods", "rounding"),
    [(exact_periods(), "float32"), (exact_periods().bfloat16(), "bfloat16"), (None, "bfloat16")],
)
def test_rotary_rounding_is_the_files(periods: Tensor | None, rounding: str, tmp_path: Path) -> None:
    state = meta_state("dinov3")
    del state["rope_embed.periods"]
    if periods is not None:
        state["rope_embed.periods"] = periods
    vit = load_backbone(as_pth(state, tmp_path)).vit
    assert vit.config.rope_rounding == rounding


def test_rotary_rounding_changes_the_maps(tmp_path: Path) -> None:
    meta = meta_state("dinov3")
    rounded = meta | {"rope_embed.periods": exact_periods().bfloat16().float()}
    vits = [load_backbone(as_pth(state, tmp_path)).vit for state in (meta, rounded)]
    maps = [vit.block_maps(images((5, 7)), [1])[0] for vit in vits]
    assert 1e-5 < (maps[0] - maps[1]).abs().max() < 0.1


@pytest.mark.parametrize("periods", [exact_periods() * 1.01, torch.ones(8)], ids=["base", "head width"])
def test_other_rotary_periods_are_refused(periods: Tensor, tmp_path: Path) -> None:
    state = meta_state("dinov3") | {"rope_embed.periods": periods}
    with pytest.raises(CheckpointError, match=r"its rotary periods .* are not those of head width 16 and base 100"):
        load_backbone(as_pth(state, tmp_path))


def test_biases_that_timm_leaves_out_are_zero(tmp_path: Path) -> None:
    state = v3_timm(meta_state("dinov3"))
    without = {key: tensor for key, tensor in state.items() if not key.endswith(("q_bias", "v_bias"))}
    vit = load_backbone(as_pth(without, tmp_path)).vit
    assert not any(block.attention.qkv.bias.any() for block in vit.blocks)
    assert len(state) - len(without) == 2 * DEPTH


@pytest.mark.parametrize("key", ["blocks.0.attn.q_bias", "blocks.1.attn.v_bias"])
def test_a_bias_missing_in_one_block_alone_is_an_error(key: str, tmp_path: Path) -> None:
    state = v3_timm(meta_state("dinov3"))
    del state[key]
    with pytest.raises(CheckpointError, match=f"does not fit dinov3: 1 missing: {key}$"):
        load_backbone(as_pth(state, tmp_path))


# ---- settings ----


def test_a_configuration_is_used_as_it_is(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["dinov2"], position_antialias=True, mean=(0.5, 0.5, 0.5))
    loaded = load_backbone(as_pth(meta_state("dinov2"), tmp_path), architecture=config)
    assert loaded.architecture is None
    assert loaded.vit.config == config


def test_fields_come_over_what_the_file_implies(tmp_path: Path) -> None:
    path = as_pth(meta_state("dinov2"), tmp_path)
    assert load_backbone(path).vit.config.position_scale_offset == 0.1
    assert load_backbone(path, fields={"position_scale_offset": 0.0}).vit.config.position_scale_offset == 0
    with pytest.raises(BrixelError, match="a ViT has no setting 'antialias'; did you mean 'position_antialias'"):
        load_backbone(path, fields={"antialias": True})


def test_an_unknown_architecture_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_pth(meta_state("dinov3"), tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        BrixelError, match="unknown backbone architecture 'dinov3_vitb16'; did you mean 'dinov3-vitb16'"
    ):
        load_backbone(path, architecture="dinov3_vitb16")


def test_aliases_and_repositories_are_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean the row of the table, whose name the loaded backbone has."""
    row = KnownBackbone("dinov2", CONFIGS["dinov2"], "mit", "us/dinov2-tiny", "timm/tiny", aliases=("dinov2-tiny",))
    for module in (loading, registry):
        monkeypatch.setattr(module, "KNOWN_BACKBONES", {row.name: row})
    path = as_pth(meta_state("dinov2"), tmp_path)
    for name in ("dinov2-tiny", "us/dinov2-tiny", "timm/tiny"):
        assert load_backbone(path, architecture=name).architecture == "dinov2"


@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_layout_needs_its_architecture(name: str, tmp_path: Path) -> None:
    """`backbone.safetensors` of a saved model has no settings, such as rounding or antialiasing, that could be read."""
    reference = load_backbone(as_pth(meta_state(name), tmp_path)).vit
    path = tmp_path / "backbone.safetensors"
    write_tensors(path, reference.state_dict())
    loaded = load_backbone(path, architecture=reference.config)
    assert loaded.vit.config == reference.config
    assert_same_vit(loaded.vit, reference)
    with pytest.raises(CheckpointError, match="is the backbone of a saved model, .* or give the architecture"):
        load_backbone(path)


# ---- the grid of learned positions, and how they are interpolated ----


def on_grid(state: State, rows: int, columns: int) -> State:
    return state | {"pos_embed": torch.randn(1, 1 + rows * columns, W, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("architecture", [None, "dinov2"])
def test_another_square_grid_than_that_of_the_table(architecture: str | None, tmp_path: Path) -> None:
    state = on_grid(meta_state("dinov2"), 5, 5)
    loaded = load_backbone(as_pth(state, tmp_path), architecture=architecture)
    assert loaded.vit.config.native_hw == (5, 5)
    assert loaded.architecture is None  # the table's is for another grid
    assert loaded.vit.config == dataclasses.replace(CONFIGS["dinov2"], native_grid=5, position_scale_offset=0.1)
    assert torch.equal(loaded.vit.positions, state["pos_embed"])
    assert loaded.vit.block_maps(images((4, 6)), [1])[0].shape == (2, W, 4, 6)


@pytest.mark.parametrize("architecture", [None, "dinov2"])
def test_a_grid_that_is_not_square_is_asked_for(architecture: str | None, tmp_path: Path) -> None:
    path = as_pth(on_grid(meta_state("dinov2"), 2, 5), tmp_path)
    with pytest.raises(CheckpointError, match=r"for 10 patches, whose grid is not square: .*native_grid=.*\(2, 5\)"):
        load_backbone(path, architecture=architecture)
    vit = load_backbone(path, architecture=architecture, fields={"native_grid": (5, 2)}).vit
    assert vit.config.native_hw == (5, 2)
    grid = vit._learned_positions((5, 2))
    assert torch.equal(grid, vit.positions[:, 1:])
    with pytest.raises(CheckpointError, match=r"positions|pos_embed \(1, 11, 32\), model has \(1, 13, 32\)"):
        load_backbone(path, architecture=architecture, fields={"native_grid": (3, 4)})


def test_a_timm_folder_states_its_grid(tmp_path: Path) -> None:
    as_timm_folder(on_grid(v2_timm(meta_state("dinov2")), 2, 5), tmp_path)
    stated = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 2 * PATCH, 5 * PATCH]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": stated}))
    assert load_backbone(tmp_path).vit.config.native_hw == (2, 5)


def test_an_oblong_grid_is_saved_and_read_back(tmp_path: Path) -> None:
    model = BrixelFeatures.from_backbone(
        as_pth(on_grid(meta_state("dinov2"), 2, 5), tmp_path), native_grid=(2, 5), device="cpu"
    )
    model.save_pretrained(tmp_path / "saved")
    again = BrixelFeatures.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.config.backbone.vit.native_hw == (2, 5)
    assert_same_vit(again.backbone, model.backbone)


@pytest.mark.parametrize("grid", [0, (3,), (3, 0), (3, 4, 5), "3", 3.0, None])
def test_what_is_no_grid(grid: object) -> None:
    with pytest.raises(BrixelError, match=r"native_grid is .*; expected a whole number .*, or two: \(rows, columns\)"):
        dataclasses.replace(CONFIGS["dinov2"], native_grid=grid)


def without_mask_token(name: str) -> State:
    return {key: tensor for key, tensor in meta_state(name).items() if key != "mask_token"}


ASSUMED = "its keys do not say by whose rule its positions are interpolated; assumed timm's, position_antialias=True"


@pytest.mark.parametrize(
    ("state", "rule", "told"),
    [
        (lambda: meta_state("dinov2"), (False, 0.1), False),
        (lambda: without_mask_token("dinov2"), (True, 0.0), True),
        (lambda: v2_timm(meta_state("dinov2")), (True, 0.0), True),
        (lambda: without_mask_token("dinov2-reg4"), (True, 0.0), False),  # by the names of registers
        (lambda: without_mask_token("dinov2-gated"), (False, 0.1), False),  # and of gated layers
        (lambda: v2_timm(meta_state("dinov2-gated")), (True, 0.0), False),
        (lambda: v2_huggingface(meta_state("dinov2")), (False, 0.0), False),
    ],
)
def test_a_rule_that_keys_leave_open_is_told(
    state: Callable[[], State], rule: tuple[bool, float], told: bool, tmp_path: Path, caplog: Any
) -> None:
    config = load_backbone(as_pth(state(), tmp_path)).vit.config
    assert (config.position_antialias, config.position_scale_offset) == rule
    assert (ASSUMED in caplog.text) == told
    assert ("give position_antialias=False, position_scale_offset=0.1" in caplog.text) == told


def test_a_rule_that_is_given_or_stated_is_not_told(tmp_path: Path, caplog: Any) -> None:
    path = as_pth(without_mask_token("dinov2"), tmp_path)
    given = {"position_antialias": False, "position_scale_offset": 0.1}
    assert load_backbone(path, fields=given).vit.config.position_scale_offset == 0.1
    load_backbone(path, architecture=CONFIGS["dinov2"])
    folder = tmp_path / "timm"
    folder.mkdir()
    load_backbone(as_timm_folder(v2_timm(meta_state("dinov2")), folder), architecture="dinov2")
    assert caplog.messages == []


def test_settings_that_our_own_layout_lacks_are_told(tmp_path: Path, caplog: Any) -> None:
    for name, told in {"dinov2": "position_antialias=False", "dinov3": "rope_rounding='float32'"}.items():
        write_tensors(tmp_path / "backbone.safetensors", ViT(CONFIGS[name]).state_dict())
        load_backbone(tmp_path / "backbone.safetensors", architecture=name)
        assert f"holds no settings; assumed {told}" in caplog.text


# ---- files that cannot be read ----


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_run_code(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "weights.pth"
    torch.save(meta_state("dinov2") | {"extra": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="could run code; only plain tensors are read"):
        load_backbone(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # it is what it claims to be
    assert target.read_text() == "executed"


def test_a_bare_pickle_cannot_run_code(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Malicious(target), protocol=2))
    with pytest.raises(CheckpointError, match="could run code"):
        load_backbone(path)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [10, 2000, -100])
def test_a_truncated_pth(kept: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(meta_state("dinov2"), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"weights.pth is damaged"):
        load_backbone(path)


@pytest.mark.parametrize("container", ["pth", "old pth", "safetensors"])
def test_damage_anywhere_is_a_checkpoint_error(container: str, tmp_path: Path) -> None:
    """Bytes overwritten at random, or the end cut off: read as numbers, or refused as damaged, but no other error."""
    path, state = tmp_path / f"weights.{container.split()[-1]}", {f"a.{i}": torch.ones(2, 3) for i in range(4)}
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "pth")
    whole = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(min(3, len(damaged))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_safetensors(kept: int, tmp_path: Path) -> None:
    path = as_safetensors(meta_state("dinov2"), tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged.*; fetch (or write )?it again"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list; expected a dict of tensors by name"),
        (torch.ones(2), "holds Tensor; expected a dict"),
        ({}, "holds no tensors by name; it holds nothing"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no tensors by name; it holds epoch, args"),
        ({0: torch.ones(2)}, "holds 1 tensors .* no layout that we know"),
    ],
)
def test_a_pth_of_something_else(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path / "weights.pth")


def test_an_unknown_layout(tmp_path: Path) -> None:
    path = as_pth({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, tmp_path)
    message = r"holds 2 tensors \(conv1.weight, fc.bias, ...\), no layout that we know; known: DINOv3 in Meta's layout"
    with pytest.raises(CheckpointError, match=message):
        load_backbone(path)


def test_a_checkpoint_without_a_tensor_that_its_size_is_read_from(tmp_path: Path) -> None:
    state = meta_state("dinov2")
    del state["patch_embed.proj.weight"]
    with pytest.raises(CheckpointError, match="lacks 'patch_embed.proj.weight'; fetch the file again"):
        load_backbone(as_pth(state, tmp_path))


def test_an_architecture_with_parts_that_the_layout_never_has(tmp_path: Path) -> None:
    path = as_pth(v3_huggingface(meta_state("dinov3")), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"does not fit dinov2: 1 missing: positions \(never in this layout\); 1 "
    ):
        load_backbone(path, architecture="dinov2")


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [("dinov2", "patch_embed.proj.weight", (W, 3)), ("dinov3-gated", "blocks.0.mlp.w1.weight", (F,))],
)
def test_tensors_of_other_dimensions(name: str, key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = meta_state(name) | {key: torch.ones(shape)}
    with pytest.raises(CheckpointError, match="tensors of unexpected dimensions"):
        load_backbone(as_pth(state, tmp_path))


@pytest.mark.parametrize("key", ["blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias_mask"])
@pytest.mark.parametrize("length", [1, 3 * W + 1])
def test_biases_and_masks_of_another_length(key: str, length: int, tmp_path: Path) -> None:
    state = meta_state("dinov3") | {key: torch.ones(length)}
    with pytest.raises(CheckpointError, match=f"does not fit dinov3: .*{key}"):
        load_backbone(as_pth(state, tmp_path))


def test_two_spellings_of_one_key_are_refused(tmp_path: Path) -> None:
    state = meta_state("dinov3-gated") | {"blocks.0.mlp.fc2.weight": torch.ones(W, F)}  # w3 by another name
    with pytest.raises(CheckpointError, match=r"1 not known: blocks.0.mlp.(w3|fc2).weight$"):
        load_backbone(as_pth(state, tmp_path))


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent.pth"):
        load_backbone(tmp_path / "absent.pth")


# ---- folders ----


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"expected model.safetensors or a single weight file; found none among 1 files"
    ):
        load_backbone(tmp_path)


def test_a_folder_with_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        as_pth({}, tmp_path).rename(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"a single weight file; found a.pth, b.pth"):
        load_backbone(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    as_shards(meta_state("dinov2"), tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 weight shards: model-00002-of-00003.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", 3, ".."])
def test_an_index_stays_in_its_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(meta_state("dinov2"), tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"outside its own folder|lacks 1 of 1"):
        load_backbone(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json (is no index of weight shards|is not JSON|holds a list)"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "config.json is not JSON"),
        ("[1]", "config.json holds a list; expected a JSON object"),
        ('{"model_type": "clip"}', "model_type 'clip'; we read dinov3_vit, dinov2, dinov2_with_registers, siglip"),
        ('{"model_type": "dinov2"}', "config.json lacks 'hidden_size' of a dinov2 model"),
        (
            '{"model_type": "dinov2", "hidden_size": null, "use_swiglu_ffn": false, "mlp_ratio": 4}',
            "config.json does not describe a dinov2 model",
        ),
    ],
)
def test_a_config_that_does_not_describe_a_model(content: str, message: str, tmp_path: Path) -> None:
    as_timm_folder(v3_timm(meta_state("dinov3")), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


def test_a_timm_config_without_pretrained_settings(tmp_path: Path) -> None:
    as_timm_folder(v3_timm(meta_state("dinov3")), tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny", "pretrained_cfg": null}')
    assert load_backbone(tmp_path).architecture == "dinov3"


# ---- strict fitting, and writing ----


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def pair_state() -> State:
    return {"linear.weight": torch.randn(3, 2), "linear.bias": torch.randn(3), "count": torch.tensor(5)}


def test_loading_casts_floating_point_tensors_alone() -> None:
    state = pair_state()
    module = load_into(Pair, state, torch.bfloat16, what="a file does not fit a pair")
    assert torch.equal(module.linear.weight, state["linear.weight"].bfloat16())
    assert module.count.dtype == torch.long
    assert module.count == 5


def test_an_error_names_everything_at_once() -> None:
    state = pair_state() | {"linear.weight": torch.randn(2, 2), "other": torch.ones(1)}
    del state["linear.bias"]
    message = (
        "^here: 1 missing: linear.bias; "
        r"1 of another shape: linear.weight \(2, 2\), model has \(3, 2\); 1 not known: other$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_into(Pair, state, torch.float32, what="here")


def test_written_tensors_are_read_back(tmp_path: Path) -> None:
    state = pair_state() | {"turned": torch.randn(3, 4).T}
    write_tensors(tmp_path / "ours.safetensors", state)
    found = read_tensors(tmp_path / "ours.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]
