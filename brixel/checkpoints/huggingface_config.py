"""Reading the `config.json` and `preprocessor_config.json` of a Hugging Face or timm checkpoint."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brixel.backbones.normalisation import Colours, of_processor, unit_normalisation
from brixel.backbones.vit_config import ViTConfig, siglip_config
from brixel.errors import BrixelError, CheckpointError
from brixel.utils.structured_files import read_json


def vit_config(folder: Path) -> ViTConfig | None:
    """The architecture in a folder's `config.json`; None where that is not in Hugging Face's format.

    In the config of a bigger model, such as one for depth, it is that of its backbone.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") is None:
        return None
    part = next((part for part in _parts(config) if _kind(part) in _READERS), None)
    if part is None:
        raise CheckpointError(f"{path}: model_type {config['model_type']!r}; we read {', '.join(_READERS)}")
    kind = _kind(part)
    try:
        return _READERS[kind](part if part is config else _DEFAULTS.get(kind, {}) | part)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error} of a {kind} model") from error
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a {kind} model: {error}") from error


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and those of the networks in it that may be a backbone."""
    yield config
    for name in ("backbone_config", "vision_config", "encoder", "encoder_config"):
        part = config.get(name)
        if isinstance(part, dict):
            yield part


def _kind(config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def normalisation(folder: Path) -> dict[str, Colours]:
    """``mean`` and ``std`` from a folder's files (Hugging Face's processor or timm's config), if they state them.

    They are for pixels in [0, 1]. Raises CheckpointError where what is stated cannot be brought to that.
    """
    path, stated = _processor(folder)
    try:
        found = of_processor(stated, "")
        if found is None:
            path, timm = folder / "config.json", pretrained_cfg(folder)
            if (timm.get("mean") is None) != (timm.get("std") is None):
                raise BrixelError("pretrained_cfg states one of mean and std; expected both or neither")
            if timm.get("mean") is not None:
                found = unit_normalisation(timm["mean"], timm["std"], "pretrained_cfg.")
    except BrixelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {} if found is None else {"mean": found[0], "std": found[1]}


def _processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of the image processor, and their file: of a whole processor first, as `transformers` does."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = read_json(folder / name)
        nested = content.get("image_processor")
        if isinstance(nested, dict):
            return folder / name, nested
    return folder / name, content


def pretrained_cfg(folder: Path) -> dict[str, Any]:
    """What timm's `config.json` in a folder states about its weights; empty where there is none."""
    content = read_json(folder / "config.json")
    if "architecture" in content and "pretrained_cfg" not in content:
        return content  # as earlier versions of timm wrote it
    stated = content.get("pretrained_cfg") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(
            f"{folder / 'config.json'}: pretrained_cfg is a {type(stated).__name__}; expected a table, as timm has"
        )
    return stated


def is_timm(folder: Path) -> bool:
    """Whether a folder's `config.json` is timm's."""
    return bool(pretrained_cfg(folder)) or "architecture" in read_json(folder / "config.json")


def timm_tag(folder: Path) -> str | None:
    """The tag in a timm folder's `config.json` that names its weights, such as "lvd1689m"."""
    tag = pretrained_cfg(folder).get("tag")
    return tag if isinstance(tag, str) else None


def timm_image_hw(folder: Path) -> tuple[int, int] | None:
    """Height and width of the images that the weights in a timm folder were trained on, if it states them."""
    arguments = read_json(folder / "config.json").get("model_args")
    size = arguments.get("img_size") if isinstance(arguments, dict) else None
    if type(size) is int:
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):
        return size[0], size[1]
    size = pretrained_cfg(folder).get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(type(side) is int for side in size):
        return size[1], size[2]
    return None


# fields of ViTConfig that all of these models have, by our name
_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch_px": "patch_size",
    "norm_eps": "layer_norm_eps",
}


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    sizes = {ours: config[theirs] for ours, theirs in _NAMES.items()}
    height, width = _sides(config, "patch_size")
    if height != width:
        raise BrixelError(f"patch_size is {config['patch_size']!r}; expected square patches")
    return {**sizes, "patch_px": height}


def _sides(config: dict[str, Any], name: str) -> tuple[int, int]:
    """Height and width from a field that is one number, a list of two, or a table of both."""
    value = config[name]
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width")]
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise BrixelError(f"{name} is {config[name]!r}; expected a whole number above 0, or height and width")
    return sides[0], sides[1]


def _grid(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches of the images that a model was trained on."""
    (height, width), (rows_px, columns_px) = _sides(config, "image_size"), _sides(config, "patch_size")
    return height // rows_px, width // columns_px


def _dinov3(config: dict[str, Any]) -> ViTConfig:
    _check_activation(config, "silu" if config["use_gated_mlp"] else "gelu")
    return ViTConfig(
        **_sizes(config),
        ffn="swiglu" if config["use_gated_mlp"] else "mlp",
        ffn_width=config["intermediate_size"],
        positions="rotary",
        registers=config["num_register_tokens"],
        qkv_bias=config["query_bias"] or config["value_bias"],
        rope_theta=_rope_theta(config),
    )


def _check_activation(config: dict[str, Any], expected: str) -> None:
    found = config.get("hidden_act", expected)
    if found != expected:
        raise BrixelError(f"hidden_act is {found!r}; the published models of this kind have {expected!r}")


def _rope_theta(config: dict[str, Any]) -> float:
    """Older versions of transformers write it at the top level, newer ones among the rope parameters."""
    nested = config.get("rope_parameters") or {}
    return float(nested["rope_theta"] if "rope_theta" in nested else config["rope_theta"])


def _dinov2(config: dict[str, Any]) -> ViTConfig:
    hidden, gated = int(config["hidden_size"] * config["mlp_ratio"]), config["use_swiglu_ffn"]
    if not gated:  # a gated one uses silu whatever the configuration says
        _check_activation(config, "gelu")
    return ViTConfig(
        **_sizes(config),
        ffn="swiglu" if gated else "mlp",
        ffn_width=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        positions="learned",
        registers=config.get("num_register_tokens", 0),
        qkv_bias=config["qkv_bias"],
        native_grid=_grid(config),
    )


# Defaults of transformers for fields that a configuration inside another leaves out; those of SigLIP do so everywhere.
_DINOV2_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov2": _DINOV2_DEFAULTS,
    "dinov2_with_registers": {**_DINOV2_DEFAULTS, "patch_size": 16, "num_register_tokens": 4},
    "dinov3_vit": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "patch_size": 16,
        "layer_norm_eps": 1e-5,
        "use_gated_mlp": False,
        "num_register_tokens": 0,
        "query_bias": True,
        "value_bias": True,
        "rope_theta": 100.0,
    },
    "siglip": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "image_size": 224,
        "num_patches": 256,
        "layer_norm_eps": 1e-6,
    },
}


def _siglip(config: dict[str, Any]) -> ViTConfig:
    """Both towers or the vision tower alone. `siglip2` is NaFlex only; SigLIP 2 for one resolution is `siglip`."""
    vision = {**_DEFAULTS["siglip"], **config.get("vision_config", config)}
    naflex = config["model_type"].startswith("siglip2")
    _check_activation(vision, "gelu_pytorch_tanh")
    return siglip_config(
        **_sizes(vision),
        ffn="mlp",
        ffn_width=vision["intermediate_size"],
        native_grid=math.isqrt(vision["num_patches"]) if naflex else _grid(vision),
        naflex=naflex,
    )


_READERS = {
    "dinov3_vit": _dinov3,
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _dinov2),
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"), _siglip),
}
