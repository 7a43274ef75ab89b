"""The backbones we know by name: architecture, normalisation, licence, where their weights and adapters are.

Sizes and repositories: the families' own repositories and cards; `docs/backbones.md` says which was read where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD, ViTConfig, siglip_config
from brixel.errors import BrixelError, did_you_mean

_GATED = "dinov3-license"  # of Meta's repositories of DINOv3, which are gated
# licences that the Hub has no id for, and that bind what is derived from the weights: where their text is
LICENCE_URLS = {_GATED: "https://ai.meta.com/resources/models-and-libraries/dinov3-license"}

# of the satellite images that the sat493m weights were trained on
SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)


@dataclass(frozen=True)
class KnownBackbone:
    """One backbone. ``huggingface`` and ``timm`` are repositories on the Hub; ``licence`` is the Hub's id, or a name of
    :data:`LICENCE_URLS`.

    ``vocabulary``: the number of words that the text tower beside it knows, where there is one. ``adapter``: what
    `BrixelFeatures.from_pretrained` takes for a trained adapter on it, where there is one.
    """

    name: str
    vit: ViTConfig
    licence: str
    huggingface: str
    timm: str
    vocabulary: int | None = None
    adapter: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Its repositories, in order of preference; none for a backbone that comes with its adapter."""
        return tuple(each for each in (self.huggingface, self.timm) if each)

    @property
    def gated(self) -> bool:
        """Whether the first of them lets in only whom its owners approve of; timm's copies are open."""
        return self.licence == _GATED


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
        ours, vit, _GATED, f"facebook/dinov3-{name}-pretrain-{data}", f"timm/vit_{timm}_patch16_dinov3.{data}"
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
_SIGLIP_SIZES = {  # width, depth, heads, feed-forward
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giant-opt": (1536, 40, 16, 6144),
}


def _siglip(size: str, patch_px: int, side: str, *, version: str = "", timm: str, vocabulary: int) -> KnownBackbone:
    """``side``: of the images it was trained on, in pixels and what may follow in the name, or "naflex": of any."""
    width, depth, heads, ffn_width = _SIGLIP_SIZES[size]
    naflex = side == "naflex"
    vit = siglip_config(
        width=width,
        depth=depth,
        heads=heads,
        patch_px=patch_px,
        ffn_width=ffn_width,
        native_grid=16 if naflex else int(side.split("-")[0]) // patch_px,
        naflex=naflex,
    )
    return KnownBackbone(
        f"siglip{version}-{size}-p{patch_px}-{side}",
        vit,
        "apache-2.0",
        f"google/siglip{version}-{size}-patch{patch_px}-{side}",
        f"timm/{timm}",
        vocabulary,
    )


def _siglip1(size: str, patch_px: int, side: str) -> KnownBackbone:
    pixels, _, languages = side.partition("-")
    timm = f"vit_{size}_patch{patch_px}_siglip_{pixels}.webli" + ("_i18n" if languages else "")
    return _siglip(size, patch_px, side, timm=timm, vocabulary=250_000 if languages else 32_000)


def _siglip2(size: str, patch_px: int, side: str) -> KnownBackbone:
    pixels = "378" if (patch_px, side) == (14, "384") else side  # timm's name for what 27 patches cover
    timm = f"vit_{size.replace('-', '')}_patch{patch_px}_siglip_{pixels}.v2_webli"
    if side == "naflex":
        timm = f"naflexvit_{size}_patch{patch_px}_siglip.v2_webli"
    return _siglip(size, patch_px, side, version="2", timm=timm, vocabulary=256_000)


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
    *(_siglip2("base", 16, side) for side in ("224", "256", "384", "512", "naflex")),
    _siglip2("base", 32, "256"),
    *(_siglip2("large", 16, side) for side in ("256", "384", "512")),
    *(_siglip2("so400m", 14, side) for side in ("224", "384")),
    *(_siglip2("so400m", 16, side) for side in ("256", "384", "512", "naflex")),
    *(_siglip2("giant-opt", 16, side) for side in ("256", "384")),
    *(_siglip1("base", 16, side) for side in ("224", "256", "384", "512", "256-multilingual")),
    *(_siglip1("large", 16, side) for side in ("256", "384")),
    *(_siglip1("so400m", 14, side) for side in ("224", "384")),
    _siglip1("so400m", 16, "256-i18n"),
)
KNOWN_BACKBONES: Mapping[str, KnownBackbone] = MappingProxyType({row.name: row for row in _ROWS})

# inside the package, with its adapter; it lies nowhere else, so that no file is taken for it
BRIXEL_TINY = KnownBackbone(
    "brixel-tiny",
    ViTConfig(
        width=192,
        depth=12,
        heads=6,
        patch_px=16,
        ffn="mlp",
        ffn_width=768,
        positions="rotary",
        norm_eps=1e-5,
        registers=4,
    ),
    "apache-2.0",
    huggingface="",
    timm="",
    adapter="brixel-tiny",
)


def list_models() -> tuple[KnownBackbone, ...]:
    """All models that are known by name: the bundled one, then the backbones, each with its sources and licence."""
    return (BRIXEL_TINY, *KNOWN_BACKBONES.values())


def known_backbone(name: str) -> KnownBackbone:
    """The table's row for a name; an unknown name raises BrixelError with the nearest known one."""
    if name not in KNOWN_BACKBONES:
        raise BrixelError(f"unknown backbone architecture {name!r}; {did_you_mean(name, KNOWN_BACKBONES)}")
    return KNOWN_BACKBONES[name]
