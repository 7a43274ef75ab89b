"""Checkpoints of published models, by names and shapes alone: `tests/headers/`, one file per family and layout.

They go through `load_backbone` itself; only the reading of the file and the check that nothing stays on `meta` are
replaced, so that the 7B needs no memory.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import Tensor, nn

from brixel.backbones.registry import IMAGENET_MEAN, IMAGENET_STD, KNOWN_BACKBONES, SATELLITE_MEAN, SATELLITE_STD
from brixel.checkpoints import load_backbone as loading
from brixel.checkpoints.backbone_key_maps import VOCABULARY, needed
from brixel.checkpoints.huggingface_config import vit_config
from brixel.checkpoints.load_backbone import LoadedBackbone, load_backbone
from brixel.errors import CheckpointError

HEADERS = ROOT / "tests" / "headers"
FILES = sorted(path.stem for path in HEADERS.glob("*.json"))
CHECKPOINTS = {
    f"{file}:{name}": entry
    for file in FILES
    for name, entry in json.loads((HEADERS / f"{file}.json").read_text())["checkpoints"].items()
}
# the parameters of the models as published, buffers not counted; SigLIP's with its pooling head
PUBLISHED = {
    "dinov3-vits16": 21_601_152,
    "dinov3-vits16plus": 28_697_472,
    "dinov3-vitb16": 85_669_632,
    "dinov3-vitl16": 303_154_176,
    "dinov3-vith16plus": 840_633_600,
    "dinov3-vit7b16": 6_716_043_264,
}
PUBLISHED_SIGLIP = {
    "siglip2-base-p16-naflex": 92_930_304,
    "siglip2-so400m-p14-384": 428_225_600,
    "siglip2-giant-opt-p16-256": 1_163_168_256,
}
# one checkpoint of each file, and a key of its last block in that file's spelling
SAMPLES = {
    "dinov2-huggingface:dinov2-vitg14-reg4": "encoder.layer.39.mlp.weights_in.weight",
    "dinov2-meta:dinov2-vitg14": "blocks.39.mlp.w12.weight",
    "dinov2-timm:dinov2-vits14-reg4": "blocks.11.attn.qkv.bias",
    "dinov3-huggingface:dinov3-vith16plus": "layer.31.attention.q_proj.weight",
    "dinov3-meta:dinov3-vit7b16": "blocks.39.mlp.w2.weight",
    "dinov3-timm:dinov3-vitb16-qkvb": "blocks.11.attn.v_bias",
    "siglip-huggingface:siglip2-giant-opt-p16-384": "encoder.layers.39.self_attn.q_proj.weight",
    "siglip-timm:siglip2-so400m-p16-naflex": "blocks.26.mlp.fc2.weight",
}
Read = Callable[..., LoadedBackbone]


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def architecture_of(checkpoint: str) -> str:
    return checkpoint.split(":")[1].removesuffix("-qkvb")


def has_twin(architecture: str) -> bool:
    return "vitl16" in architecture or "vit7b16" in architecture


def is_identified_by_its_shapes(checkpoint: str) -> bool:
    """timm's files have no text tower, whose vocabulary would distinguish SigLIP 2 of this size from SigLIP."""
    return not has_twin(architecture_of(checkpoint)) and checkpoint != "siglip-timm:siglip2-so400m-p14-384"


def on_meta(checkpoint: str) -> dict[str, Tensor]:
    """The state of a checkpoint without its numbers."""
    entry = CHECKPOINTS[checkpoint]
    state = {}
    for key, shape in entry["tensors"].items():
        for index in range(entry["depth"] if "{i}" in key else 1):
            state[key.replace("{i}", str(index))] = torch.empty(shape, device="meta")
    return state


def fit_on_meta(build: Callable[[], nn.Module], state: Mapping[str, Tensor], dtype: torch.dtype, *, what: str) -> Any:
    with torch.device("meta"):
        module = build()
    module.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, strict=True, assign=True)
    return module


@pytest.fixture(autouse=True)
def _no_start_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn on meta; leaving out the attempt halves the time to build a model there."""
    for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d):
        monkeypatch.setattr(kind, "reset_parameters", lambda _: None)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Read:
    """`load_backbone` of a state on meta; keyword ``path`` names a folder with settings."""

    def load(state: dict[str, Tensor], path: Path = tmp_path / "file.pth", **options: Any) -> LoadedBackbone:
        monkeypatch.setattr(loading, "read_tensors", lambda _, needed: state)
        monkeypatch.setattr(loading, "load_into", fit_on_meta)
        monkeypatch.setattr(loading, "check_values", lambda *_, **__: None)
        return load_backbone(path, **options)

    return load


# ---- all of them fit ----


def smallest_first(names: Iterable[str]) -> list[Any]:
    """The names, of which only small models run every time: reading a header takes longer the more blocks there are."""
    small = ("vits", "vitb", "base")
    return [
        name if any(size in name for size in small) else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize("checkpoint", smallest_first(CHECKPOINTS))
def test_nothing_is_missing_or_left_over(checkpoint: str, read: Read) -> None:
    """Identified by its shapes (a twin by its name), loaded strictly, and with as many parameters as the file.

    Not counting those that are known and not needed, and the biases that a file leaves out because they are zero.
    """
    entry, name, state = CHECKPOINTS[checkpoint], architecture_of(checkpoint), on_meta(checkpoint)
    assert count(state.values()) == entry["parameters"]
    loaded = read(state, architecture=None if is_identified_by_its_shapes(checkpoint) else name)
    assert loaded.architecture == name
    assert len(loaded.vit.blocks) == entry["depth"]
    unused = ("mask_token", "rope_embed.periods", "bias_mask", "local_cls_norm.weight", "local_cls_norm.bias")
    dropped = count(tensor for key, tensor in state.items() if key.endswith(unused) or not needed(key))
    ours = count(loaded.vit.parameters())
    assert ours == entry["parameters"] - dropped + left_out(checkpoint, entry["depth"])


def left_out(checkpoint: str, depth: int) -> int:
    """The number of parameters that the model has and the file has not."""
    layout, name = checkpoint.split(":")
    width = KNOWN_BACKBONES[architecture_of(checkpoint)].vit.width
    if layout == "dinov2-timm":
        return width if "reg4" in name else 0  # the class token's position
    if layout in ("dinov2-meta", "dinov2-huggingface", "dinov3-meta") or "7b" in name or "siglip" in name:
        return 0
    return depth * width * (1 if layout == "dinov3-huggingface" or "qkvb" in name else 3)  # k, or q and k and v


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name: str, read: Read) -> None:
    vit = read(on_meta(f"dinov3-meta:{name}"), architecture=name).vit
    norm_of_training = 2 * vit.width if name == "dinov3-vit7b16" else 0
    mask_token = vit.width
    assert count(vit.parameters()) + mask_token + norm_of_training == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_SIGLIP)
def test_published_parameter_count_of_siglip(name: str, read: Read) -> None:
    state = on_meta(f"siglip-timm:{name}")
    pooling = count(tensor for key, tensor in state.items() if key.startswith("attn_pool."))
    vit = read(state, architecture=name).vit
    assert count(vit.parameters()) + pooling == PUBLISHED_SIGLIP[name]


def test_both_towers_are_as_large_as_their_published_file() -> None:
    numbers = CHECKPOINTS["siglip-huggingface:siglip2-so400m-p14-384"]["parameters"]
    assert round(4 * numbers / 1e9, 2) == 4.54


# ---- the architecture from the shapes ----


@pytest.mark.parametrize("checkpoint", smallest_first(name for name in CHECKPOINTS if has_twin(name)))
def test_twins_are_not_guessed(checkpoint: str, read: Read) -> None:
    base = architecture_of(checkpoint).removesuffix("-sat493m")
    with pytest.raises(CheckpointError, match=f"may be '{base}' or '{base}-sat493m', which differ in normalisation"):
        read(on_meta(checkpoint))


@pytest.mark.parametrize("checkpoint", smallest_first(name for name in CHECKPOINTS if has_twin(name)))
def test_stated_normalisation_distinguishes_twins(checkpoint: str, read: Read, tmp_path: Path) -> None:
    name = architecture_of(checkpoint)
    mean, std = (SATELLITE_MEAN, SATELLITE_STD) if "sat" in name else (IMAGENET_MEAN, IMAGENET_STD)
    hugging = {"image_mean": mean, "image_std": std}
    timm = {"architecture": "vit_some", "pretrained_cfg": {"mean": mean, "std": std}}
    if "timm" in checkpoint:
        (tmp_path / "config.json").write_text(json.dumps(timm))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(hugging))
    loaded = read(on_meta(checkpoint), tmp_path)
    assert loaded.architecture == name
    assert (loaded.vit.config.mean, loaded.vit.config.std) == (mean, std)


SIGLIP = {name: row for name, row in KNOWN_BACKBONES.items() if name.startswith("siglip")}


def like_siglip(name: str, layout: str) -> dict[str, Tensor]:
    """The state of any SigLIP in the table: that of one of its width, with its own patches, positions and words."""
    row = SIGLIP[name]
    model = next(
        checkpoint
        for checkpoint in CHECKPOINTS
        if checkpoint.startswith(f"siglip-{layout}:")
        and ("naflex" in checkpoint) == ("naflex" in name)
        and SIGLIP[architecture_of(checkpoint)].vit.width == row.vit.width
    )
    state = on_meta(model)
    for key, tensor in state.items():
        if key.endswith("position_embedding.weight") and "text" not in key:
            state[key] = tensor.new_empty(row.vit.native_grid**2, row.vit.width)
        elif key == "pos_embed":
            state[key] = tensor.new_empty(1, row.vit.native_grid**2, row.vit.width)
        elif key.endswith(("patch_embed.proj.weight", "patch_embedding.weight")) and tensor.ndim == 4:
            state[key] = tensor.new_empty(row.vit.width, 3, row.vit.patch_px, row.vit.patch_px)
        elif key == VOCABULARY:
            state[key] = tensor.new_empty(row.vocabulary, tensor.shape[1])
    return state


@pytest.mark.parametrize("name", smallest_first(SIGLIP))
def test_siglip_of_both_towers_is_identified_by_shapes_and_vocabulary(name: str, read: Read) -> None:
    loaded = read(like_siglip(name, "huggingface"))
    assert loaded.architecture == name
    assert loaded.vit.config == SIGLIP[name].vit


@pytest.mark.parametrize("name", smallest_first(SIGLIP))
def test_siglip_in_timms_folders_is_identified_by_their_tag(name: str, read: Read, tmp_path: Path) -> None:
    architecture, _, tag = SIGLIP[name].timm.removeprefix("timm/").partition(".")
    stated = {"tag": tag, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": stated}))
    loaded = read(like_siglip(name, "timm"), tmp_path)
    assert loaded.architecture == name
    assert loaded.vit.config.position_antialias
    assert loaded.vit.config.mean == loaded.vit.config.std == (0.5, 0.5, 0.5)


def test_siglip_that_nothing_distinguishes_is_not_guessed(read: Read) -> None:
    names = "'siglip2-base-p16-256' or 'siglip-base-p16-256' or 'siglip-base-p16-256-multilingual'"
    with pytest.raises(CheckpointError, match=f"may be {names}, which differ in their weights alone: say which, as"):
        read(like_siglip("siglip2-base-p16-256", "timm"))


def test_a_vocabulary_of_nobody_is_not_guessed(read: Read) -> None:
    state = like_siglip("siglip2-base-p16-224", "huggingface") | {VOCABULARY: torch.empty(7, 768, device="meta")}
    with pytest.raises(CheckpointError, match="may be 'siglip2-base-p16-224' or 'siglip-base-p16-224', which differ"):
        read(state)


def test_shapes_of_no_known_model(read: Read) -> None:
    state = on_meta("dinov3-meta:dinov3-vits16")
    shallower = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.11.")}
    with pytest.raises(CheckpointError, match=r"fits no known architecture \(.*depth 11.*\); give it as a ViTConfig"):
        read(shallower)


# ---- settings that come with a format ----


@pytest.mark.parametrize(
    ("checkpoint", "antialias", "offset"),
    [
        ("dinov2-meta:dinov2-vits14", False, 0.1),
        ("dinov2-meta:dinov2-vits14-reg4", True, 0.0),
        ("dinov2-huggingface:dinov2-vits14", False, 0.0),
        ("dinov2-huggingface:dinov2-vits14-reg4", True, 0.0),
        ("dinov2-timm:dinov2-vits14", True, 0.0),
        ("dinov2-timm:dinov2-vits14-reg4", True, 0.0),
        ("siglip-huggingface:siglip2-base-p32-256", False, 0.0),
        ("siglip-huggingface:siglip2-base-p16-naflex", True, 0.0),
        ("siglip-timm:siglip2-base-p32-256", True, 0.0),
        ("siglip-timm:siglip2-base-p16-naflex", True, 0.0),
    ],
)
def test_position_rule_of_each_layout(checkpoint: str, antialias: bool, offset: float, read: Read) -> None:
    config = read(on_meta(checkpoint)).vit.config
    assert (config.position_antialias, config.position_scale_offset) == (antialias, offset)
    assert config.position_mode == ("bilinear" if "naflex" in checkpoint else "bicubic")


@pytest.mark.parametrize(
    ("layout", "rounding"), [("meta", "bfloat16"), ("huggingface", "float32"), ("timm", "float32")]
)
def test_rotary_rounding_of_each_layout(layout: str, rounding: str, read: Read) -> None:
    assert read(on_meta(f"dinov3-{layout}:dinov3-vitb16")).vit.config.rope_rounding == rounding


def published_dinov3(width: int, depth: int, heads: int, ffn_width: int, gated: bool) -> dict[str, Any]:
    """`config.json` as on the Hub, with some of the fields that we have no use for."""
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "intermediate_size": ffn_width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 16,
        "image_size": 224,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": width != 4096,
        "key_bias": False,
        "value_bias": width != 4096,
        "use_gated_mlp": gated,
        "num_register_tokens": 4,
        "layer_norm_eps": 1e-05,
        "layerscale_value": 1.0,
        "rope_theta": 100.0,
        "pos_embed_rescale": 2.0,
        "torch_dtype": "float32",
    }


def published_dinov2(width: int, depth: int, heads: int, gated: bool, registers: int) -> dict[str, Any]:
    return {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "mlp_ratio": 4,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 14,
        "image_size": 518,
        "qkv_bias": True,
        "use_swiglu_ffn": gated,
        "layer_norm_eps": 1e-06,
        **({"num_register_tokens": registers} if registers else {}),
    }


def published_siglip(size: dict[str, int], **vision: int) -> dict[str, Any]:
    """`config.json` of both towers; what is left out is the class's default. NaFlex has no image size."""
    kind = "siglip" if "image_size" in vision else "siglip2"
    towers = {tower: {"model_type": f"{kind}_{tower}_model", **size} for tower in ("text", "vision")}
    text = {"vocab_size": 256_000, **towers["text"]}
    return {"model_type": kind, "text_config": text, "vision_config": {**towers["vision"], **vision}}


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("siglip2-base-p16-512", published_siglip({}, image_size=512)),
        ("siglip2-base-p32-256", published_siglip({}, image_size=256, patch_size=32)),
        ("siglip2-base-p16-naflex", published_siglip({}, num_patches=256, patch_size=16)),
        ("siglip2-so400m-p14-384", published_siglip(SO400M, image_size=384, patch_size=14)),
        ("siglip2-so400m-p16-naflex", published_siglip(SO400M, num_patches=256)),
    ],
)
def test_published_siglip_configuration_is_the_tables(
    name: str, content: dict[str, Any], read: Read, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert vit_config(tmp_path) == SIGLIP[name].vit
    loaded = read(like_siglip(name, "huggingface"), tmp_path)
    assert (loaded.architecture, loaded.vit.config) == (name, SIGLIP[name].vit)
    (tmp_path / "config.json").write_text(json.dumps(content["vision_config"]))  # as the tower alone is saved
    assert vit_config(tmp_path) == SIGLIP[name].vit


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dinov3-vits16plus", published_dinov3(384, 12, 6, 1536, True)),
        ("dinov3-vitb16", published_dinov3(768, 12, 12, 3072, False)),
        ("dinov3-vitl16", published_dinov3(1024, 24, 16, 4096, False)),
        ("dinov3-vith16plus", published_dinov3(1280, 32, 20, 5120, True)),
        ("dinov3-vit7b16", published_dinov3(4096, 40, 32, 8192, True)),
        ("dinov2-vits14", published_dinov2(384, 12, 6, False, 0)),
        ("dinov2-vitl14-reg4", published_dinov2(1024, 24, 16, False, 4)),
        ("dinov2-vitg14", published_dinov2(1536, 40, 24, True, 0)),
    ],
)
def test_published_configuration_is_the_tables(name: str, content: dict[str, Any], read: Read, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    vit = KNOWN_BACKBONES[name].vit
    assert vit_config(tmp_path) == vit
    family = name.split("-")[0]
    if name in ("dinov3-vitl16", "dinov3-vit7b16"):  # their satellite twins have the same config.json
        with pytest.raises(CheckpointError, match=f"may be '{name}' or '{name}-sat493m', which differ"):
            read(on_meta(f"{family}-huggingface:{name}"), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": vit.mean, "image_std": vit.std}))
    assert read(on_meta(f"{family}-huggingface:{name}"), tmp_path).architecture == name


# ---- what does not fit is named ----


@pytest.mark.parametrize("checkpoint", SAMPLES)
def test_an_invented_key_is_refused(checkpoint: str, read: Read) -> None:
    invented = SAMPLES[checkpoint].rsplit(".", 1)[0] + ".gate"
    state = on_meta(checkpoint) | {invented: torch.empty(1, device="meta")}
    with pytest.raises(CheckpointError, match=f"1 not known: {invented}$"):
        read(state, architecture=architecture_of(checkpoint))


@pytest.mark.parametrize("checkpoint", SAMPLES)
def test_a_missing_key_is_named(checkpoint: str, read: Read) -> None:
    state = on_meta(checkpoint)
    del state[SAMPLES[checkpoint]]
    with pytest.raises(CheckpointError, match=f"1 missing: {SAMPLES[checkpoint]}$"):
        read(state, architecture=architecture_of(checkpoint))


@pytest.mark.parametrize("checkpoint", SAMPLES)
def test_another_shape_is_named(checkpoint: str, read: Read) -> None:
    key = SAMPLES[checkpoint]
    state = on_meta(checkpoint)
    state[key] = torch.empty(state[key].shape[0] + 1, *state[key].shape[1:], device="meta")
    with pytest.raises(CheckpointError, match=f"1 of another shape: .*{key}.*, model has") as error:
        read(state, architecture=architecture_of(checkpoint))
    assert str(tuple(state[key].shape)) in str(error.value)


def test_everything_is_said_at_once(read: Read) -> None:
    state = on_meta("dinov3-meta:dinov3-vits16") | {"gate.weight": torch.empty(2, device="meta")}
    del state["norm.bias"]
    state["cls_token"] = torch.empty(1, 1, 385, device="meta")
    message = (
        r"file.pth \(DINOv3 in Meta's layout\) does not fit dinov3-vits16: 1 missing: norm.bias; "
        r"1 of another shape: cls_token \(1, 1, 385\), model has \(1, 1, 384\); 1 not known: gate.weight$"
    )
    with pytest.raises(CheckpointError, match=message):
        read(state, architecture="dinov3-vits16")


def test_weights_of_another_size_than_said(read: Read) -> None:
    with pytest.raises(
        CheckpointError,
        match="does not fit dinov3-vitb16: its width is 384, not 768, its feed-forward width is 1536, not 3072$",
    ):
        read(on_meta("dinov3-meta:dinov3-vits16"), architecture="dinov3-vitb16")
