"""Reading the `config.json` and `preprocessor_config.json` of a Hugging Face or timm checkpoint."""

import math
from pathlib import Path
from typing import Any

from brixel.backbones.vit_config import ViTConfig, siglip_config
from brixel.errors import BrixelError, CheckpointError
from brixel.utils.structured_files import read_json


def vit_config(folder: Path) -> ViTConfig | None:
    """The architecture in a folder's `config.json`; None where that is not in Hugging Face's format."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind is None:
        return None
    readers = {
        "dinov3_vit": _dinov3,
        **dict.fromkeys(("dinov2", "dinov2_with_registers"), _dinov2),
        **dict.fromkeys(("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"), _siglip),
    }
    if kind not in readers:
        raise CheckpointError(f"{folder / 'config.json'}: model_type {kind!r}; we read {', '.join(readers)}")
    try:
        return readers[kind](config)
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error} of a {kind} model") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a {kind} model: {error}") from error


def normalisation(folder: Path) -> dict[str, tuple[float, float, float]]:
    """``mean`` and ``std`` from a folder's files (Hugging Face's processor or timm's config), if they state them."""
    stated = read_json(folder / "preprocessor_config.json")
    timm = read_json(folder / "config.json").get("pretrained_cfg") or {}
    mean = stated.get("image_mean", timm.get("mean"))
    std = stated.get("image_std", timm.get("std"))
    return {"mean": tuple(mean), "std": tuple(std)} if mean and std else {}


def timm_tag(folder: Path) -> str | None:
    """The tag in a timm folder's `config.json` that names its weights, such as "lvd1689m"."""
    tag = (read_json(folder / "config.json").get("pretrained_cfg") or {}).get("tag")
    return tag if isinstance(tag, str) else None


# fields of ViTConfig that all of these models have, by our name
_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch_px": "patch_size",
    "norm_eps": "layer_norm_eps",
}


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {ours: config[theirs] for ours, theirs in _NAMES.items()}


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
        native_grid=config["image_size"] // config["patch_size"],
    )


# defaults of transformers for fields that a configuration leaves out, as the published ones do
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
    "num_patches": 256,
    "layer_norm_eps": 1e-6,
}


def _siglip(config: dict[str, Any]) -> ViTConfig:
    """Both towers or the vision tower alone. `siglip2` is NaFlex only; SigLIP 2 for one resolution is `siglip`."""
    vision = {**_SIGLIP_DEFAULTS, **config.get("vision_config", config)}
    naflex = config["model_type"].startswith("siglip2")
    _check_activation(vision, "gelu_pytorch_tanh")
    return siglip_config(
        **_sizes(vision),
        ffn="mlp",
        ffn_width=vision["intermediate_size"],
        native_grid=math.isqrt(vision["num_patches"]) if naflex else vision["image_size"] // vision["patch_size"],
        naflex=naflex,
    )
