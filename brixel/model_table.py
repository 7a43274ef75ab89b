"""The backbones we know by name: architecture, normalisation, licence, where their weights lie.

Sizes and repositories: the families' own repositories and cards; `docs/backbones.md` says which was read where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD, ViTConfig
from brixel.errors import BrixelError, did_you_mean

# of the satellite pictures that the sat493m weights were trained on
SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)


@dataclass(frozen=True)
class KnownBackbone:
    """One published backbone. ``huggingface`` and ``timm`` are repositories on the Hub; ``licence`` is the Hub's id."""

    name: str
    vit: ViTConfig
    licence: str
    huggingface: str
    timm: str


def _dinov3(
    name: str,
    timm: str,
    width: int,
    depth: int,
    heads: int,
    ffn: Literal["mlp", "swiglu"],
    ffn_width: int,
    *,
    satellite: bool = False,
) -> KnownBackbone:
    data = "sat493m" if satellite else "lvd1689m"
    vit = ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch_px=16,
        ffn=ffn,
        ffn_width=ffn_width,
        positions="rotary",
        norm_eps=1e-5,
        registers=4,
        qkv_bias=width != 4096,  # only the 7B was trained without
        mean=SATELLITE_MEAN if satellite else IMAGENET_MEAN,
        std=SATELLITE_STD if satellite else IMAGENET_STD,
    )
    ours = f"dinov3-{name}" + (f"-{data}" if satellite else "")
    return KnownBackbone(
        ours, vit, "dinov3-license", f"facebook/dinov3-{name}-pretrain-{data}", f"timm/vit_{timm}_patch16_dinov3.{data}"
    )


def _dinov2(
    letter: str,
    size: str,
    width: int,
    depth: int,
    heads: int,
    ffn: Literal["mlp", "swiglu"],
    ffn_width: int,
    *,
    registers: int,
) -> KnownBackbone:
    vit = ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch_px=14,
        ffn=ffn,
        ffn_width=ffn_width,
        positions="learned",
        norm_eps=1e-6,
        registers=registers,
        native_grid=37,
    )
    reg = "_reg4" if registers else ""
    return KnownBackbone(
        f"dinov2-vit{letter}14{reg.replace('_', '-')}",
        vit,
        "apache-2.0",
        f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        f"timm/vit_{size}_patch14{reg}_dinov2.lvd142m",
    )


_DINOV2_SIZES: tuple[tuple[str, str, int, int, int, Literal["mlp", "swiglu"], int], ...] = (
    ("s", "small", 384, 12, 6, "mlp", 1536),
    ("b", "base", 768, 12, 12, "mlp", 3072),
    ("l", "large", 1024, 24, 16, "mlp", 4096),
    ("g", "giant", 1536, 40, 24, "swiglu", 4096),
)
_ROWS = (
    _dinov3("vits16", "small", 384, 12, 6, "mlp", 1536),
    _dinov3("vits16plus", "small_plus", 384, 12, 6, "swiglu", 1536),
    _dinov3("vitb16", "base", 768, 12, 12, "mlp", 3072),
    _dinov3("vitl16", "large", 1024, 24, 16, "mlp", 4096),
    _dinov3("vith16plus", "huge_plus", 1280, 32, 20, "swiglu", 5120),
    _dinov3("vit7b16", "7b", 4096, 40, 32, "swiglu", 8192),
    _dinov3("vitl16", "large", 1024, 24, 16, "mlp", 4096, satellite=True),
    _dinov3("vit7b16", "7b", 4096, 40, 32, "swiglu", 8192, satellite=True),
    *(_dinov2(*size, registers=registers) for size in _DINOV2_SIZES for registers in (0, 4)),
)
KNOWN_BACKBONES: Mapping[str, KnownBackbone] = MappingProxyType({row.name: row for row in _ROWS})


def known_backbone(name: str) -> KnownBackbone:
    """The table's row for a name; an unknown name raises BrixelError with the nearest known one."""
    if name not in KNOWN_BACKBONES:
        raise BrixelError(f"unknown backbone architecture {name!r}; {did_you_mean(name, KNOWN_BACKBONES)}")
    return KNOWN_BACKBONES[name]
