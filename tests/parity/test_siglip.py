"""SigLIP and SigLIP 2 against the models of transformers: tiny, all parameters random, saved by them and read by us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from einops import rearrange
from helpers import assert_same_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers_models import Reference, images, save_references

from brixel import BrixelFeatures
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.backbone_key_maps import VOCABULARY, needed
from brixel.checkpoints.fingerprint import fingerprint
from brixel.checkpoints.load_backbone import load_backbone
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, CheckpointError
from brixel.utils import safetensors_files

DEPTH = 4
GRIDS = [(4, 4), (5, 5), (3, 7), (2, 8), (1, 1)]  # 4 x 4 is native, 2 x 8 has as many patches
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
}
FIXED = {**TOWER, "image_size": 61, "patch_size": 14}  # 61 px are four patches and a rest, as 384 px are 27
NAFLEX = {**TOWER, "num_patches": 16, "patch_size": 8}
TEXT = {**TOWER, "num_hidden_layers": 2, "vocab_size": 50_000, "max_position_embeddings": 8}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "siglip-vision": lambda: SiglipVisionModel(SiglipVisionConfig(**FIXED)),
    "siglip-without-head": lambda: SiglipVisionModel(SiglipVisionConfig(**FIXED, vision_use_head=False)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=FIXED)),
    "naflex-vision": lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)),
    "naflex": lambda: Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=NAFLEX)),
}
BOTH_TOWERS = ("siglip", "naflex")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return save_references(MODELS, tmp_path_factory)


def flattened(pixels: Tensor, patch_px: int) -> Tensor:
    """Images (B, 3, H, W) as NaFlex takes them: (B, h*w, p*p*3), a patch in the order y, x, colour."""
    return rearrange(pixels, "b colour (h y) (w x) -> b (h w) (y x colour)", y=patch_px, x=patch_px)


@torch.no_grad()
def reference_maps(model: PreTrainedModel, pixels: Tensor, grid_hw: tuple[int, int]) -> list[Tensor]:
    """Patch tokens of every block after the final norm, (B, D, h, w); the last are the model's own output."""
    tower = getattr(model, "vision_model", model)
    if isinstance(tower, Siglip2VisionModel):
        patches = flattened(pixels, NAFLEX["patch_size"])
        mask, shape = torch.ones(patches.shape[:2], dtype=torch.long), torch.tensor([grid_hw] * len(pixels))
        out = tower(patches, pixel_attention_mask=mask, spatial_shapes=shape, output_hidden_states=True)
    else:
        out = tower(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    assert len(out.hidden_states) == DEPTH + 1
    tokens = [*(tower.post_layernorm(state) for state in out.hidden_states[1:-1]), out.last_hidden_state]
    return [rearrange(block, "b (h w) d -> b d h w", h=grid_hw[0]) for block in tokens]


# ---- the same numbers ----


@pytest.mark.slow
@pytest.mark.parametrize("grid_hw", GRIDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_as_transformers_computes_it(
    name: str, grid_hw: tuple[int, int], references: dict[str, Reference]
) -> None:
    model, folder = references[name]
    vit = load_backbone(folder).vit
    pixels = images(vit.patch_px, grid_hw)
    expected = reference_maps(model, pixels, grid_hw)
    found = vit.block_maps(pixels, range(DEPTH))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, vit.width, *grid_hw)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (expected[0] - expected[-1]).abs().mean() > 0.1  # the blocks do differ


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("siglip", {"gelu": "exact"}),
        ("siglip", {"position_antialias": True}),
        ("naflex", {"position_antialias": False}),
        ("naflex", {"position_mode": "bicubic"}),
    ],
)
def test_every_setting_changes_the_maps(name: str, wrong: dict[str, Any], references: dict[str, Reference]) -> None:
    model, folder = references[name]
    vit = load_backbone(folder, fields=wrong).vit
    pixels = images(vit.patch_px, (3, 3))
    found = vit.block_maps(pixels, [DEPTH - 1])[0]
    assert (found - reference_maps(model, pixels, (3, 3))[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_but_the_heads_is_ours(name: str, references: dict[str, Reference]) -> None:
    model, folder = references[name]
    tower = getattr(model, "vision_model", model)
    vit = load_backbone(folder).vit
    theirs = sum(parameter.numel() for key, parameter in tower.named_parameters() if not key.startswith("head."))
    assert sum(parameter.numel() for parameter in vit.parameters()) == theirs
    assert not any(parameter.requires_grad for parameter in vit.parameters())


@pytest.mark.parametrize("name", ["siglip", "naflex-vision"])
def test_configurations_are_read(name: str, references: dict[str, Reference]) -> None:
    naflex = name.startswith("naflex")
    loaded = load_backbone(references[name][1])
    assert loaded.architecture is None
    assert loaded.vit.config == ViTConfig(
        width=64,
        depth=DEPTH,
        heads=2,
        patch_px=8 if naflex else 14,
        ffn="mlp",
        ffn_width=96,
        positions="learned",
        norm_eps=1e-6,
        native_grid=4,
        position_antialias=naflex,
        position_mode="bilinear" if naflex else "bicubic",
        class_token=False,
        layer_scale=False,
        gelu="tanh",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def test_another_activation_is_refused(tmp_path: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**FIXED, hidden_act="gelu")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu'"):
        load_backbone(tmp_path)


# ---- other files of the same weights ----


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    bare = {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}
    return {f"{prefix}{key}": tensor for key, tensor in bare.items()}


def in_timms_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fixed tower's tensors under timm's names, by hand."""
    outer = {"post_layernorm": "norm", "embeddings.patch_embedding": "patch_embed.proj"}
    inner = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    inner |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names = outer | {
        f"encoder.layers.{i}.{theirs}": f"blocks.{i}.{timm}" for i in range(DEPTH) for theirs, timm in inner.items()
    }
    made = {
        f"{timm}.{part}": state[f"{theirs}.{part}"] for theirs, timm in names.items() for part in ("weight", "bias")
    }
    for i in range(DEPTH):
        for part in ("weight", "bias"):
            thirds = [state[f"encoder.layers.{i}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            made[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(thirds)
    made["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    made["attn_pool.latent"] = state["head.probe"]
    made["attn_pool.kv.weight"] = state["head.attention.in_proj_weight"][64:]
    return {key: tensor.clone() for key, tensor in made.items()}


@pytest.mark.parametrize("prefix", ["", "vision_model.", "module.vision_model."])
@pytest.mark.parametrize("name", ["siglip-vision", "naflex-vision"])
def test_prefixes(name: str, prefix: str, references: dict[str, Reference], tmp_path: Path) -> None:
    folder = references[name][1]
    reference = load_backbone(folder).vit
    state = with_prefix(load_file(folder / "model.safetensors"), prefix)
    torch.save(state, tmp_path / "weights.pth")
    assert_same_weights(load_backbone(tmp_path / "weights.pth", architecture=reference.config).vit, reference)


def test_timms_layout_by_renaming(references: dict[str, Reference], tmp_path: Path) -> None:
    folder = references["siglip-vision"][1]
    reference = load_backbone(folder).vit
    state = in_timms_layout(with_prefix(load_file(folder / "model.safetensors"), ""))
    save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(load_backbone(tmp_path, architecture=reference.config).vit, reference)


@pytest.mark.parametrize("name", BOTH_TOWERS)
def test_shards_hold_the_same_weights(name: str, references: dict[str, Reference], tmp_path: Path) -> None:
    model, folder = references[name]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load_backbone(tmp_path).vit, load_backbone(folder).vit)


# ---- what is not read from the file ----


@pytest.mark.parametrize("name", BOTH_TOWERS)
def test_text_tower_and_pooling_head_are_not_read(
    name: str, references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = references[name][1]
    read_keys: list[str] = []

    class Recording:
        """A file that records the tensors that were read."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = safetensors.safe_open(*arguments, **options)

        def __enter__(self) -> "Recording":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, key: str) -> Any:
            return self.file.get_slice(key)

        def get_tensor(self, key: str) -> Tensor:
            read_keys.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors_files, "safe_open", Recording)
    load_backbone(folder)
    everything = set(load_file(folder / "model.safetensors"))
    left = everything - set(read_keys)
    assert left == {key for key in everything if not key.startswith("vision_model.") or ".head." in key}
    assert any(key.startswith("text_model.") for key in left)


@pytest.mark.parametrize("container", ["safetensors", "pth"])
def test_what_is_left_has_a_shape_and_no_numbers(
    container: str, references: dict[str, Reference], tmp_path: Path
) -> None:
    path, state = references["naflex"][1] / "model.safetensors", {}
    if container == "pth":
        state, path = load_file(path), tmp_path / "weights.pth"
        torch.save(state, path)
    found = read_tensors(path, needed)
    assert found[VOCABULARY].is_meta
    assert found[VOCABULARY].shape == (50_000, 64)
    assert {key for key in found if found[key].is_meta} == {key for key in found if not needed(key)}
    assert not any(tensor.is_meta for tensor in read_tensors(path).values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("siglip", "vision_model.embeddings.class_token"),
        ("siglip", "vision_model.invented"),
        ("siglip", "logit_offset"),
        ("naflex-vision", "encoder.layers.1.layer_scale1"),
    ],
)
def test_an_unknown_key_is_refused(name: str, key: str, references: dict[str, Reference], tmp_path: Path) -> None:
    folder = references[name][1]
    state = load_file(folder / "model.safetensors") | {key: torch.ones(3)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f": 1 not known: {key.removeprefix('vision_model.')}$"):
        load_backbone(tmp_path)


def test_a_missing_key_is_named(references: dict[str, Reference], tmp_path: Path) -> None:
    folder = references["siglip"][1]
    state = load_file(folder / "model.safetensors")
    del state["vision_model.post_layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r": 1 missing: post_layernorm.bias$"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("shape", [(64, 3 * 8 * 8 + 3), (64, 191), (65, 192)])
def test_a_patch_embedding_of_another_shape(
    shape: tuple[int, int], references: dict[str, Reference], tmp_path: Path
) -> None:
    folder = references["naflex-vision"][1]
    state = load_file(folder / "model.safetensors") | {"embeddings.patch_embedding.weight": torch.ones(shape)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="1 of another shape: embeddings.patch_embedding.weight"):
        load_backbone(tmp_path)


def test_clip_is_not_taken_for_it(references: dict[str, Reference], tmp_path: Path) -> None:
    state = load_file(references["siglip"][1] / "model.safetensors")
    save_file(state | {"vision_model.embeddings.class_embedding": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no layout that we know"):
        load_backbone(tmp_path)


def test_an_offset_goes_with_the_plain_bicubic_rule_alone(references: dict[str, Reference]) -> None:
    with pytest.raises(BrixelError, match="position_scale_offset goes with position_mode='bicubic' and"):
        load_backbone(references["naflex"][1], fields={"position_antialias": False, "position_scale_offset": 0.1})


# ---- the whole model ----


@pytest.mark.slow
@pytest.mark.parametrize(("name", "include_backbone"), [("siglip", True), ("naflex", False)])
def test_a_student_on_it_runs_and_comes_back(
    name: str, include_backbone: bool, references: dict[str, Reference], image_path: Path, tmp_path: Path
) -> None:
    model = BrixelFeatures.from_backbone(references[name][1], adapter="fresh", device="cpu")
    assert model.config.adapter.blocks == (0, 1, 2, 3)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert len(fingerprint(model.backbone)) == 2 * (2 + DEPTH)
    model.save_pretrained(tmp_path, include_backbone=include_backbone)
    found = BrixelFeatures.from_pretrained(tmp_path, device="cpu")
    assert found.config == model.config
    assert found.config.backbone.vit.mean == (0.5, 0.5, 0.5)
    ours, theirs = model.extract(image_path), found.extract(image_path)
    assert ours.features.shape[0] == 64
    assert ours.features.isfinite().all()
    assert torch.equal(ours.features, theirs.features)


def test_a_configuration_written_before_these_fields_is_read(backbone_folder: Path, tmp_path: Path) -> None:
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("class_token", "layer_scale", "gelu", "position_mode"):
        del content["backbone"]["vit"][name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert BrixelFeatures.from_pretrained(tmp_path, device="cpu").config == model.config
