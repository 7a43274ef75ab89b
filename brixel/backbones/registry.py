"""The backbones that are known by name: architecture, normalisation, licence, sources of weights and adapters.

Sizes and repositories are those of the families' own repositories and cards; `docs/backbones.md` lists the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD, ViTConfig, siglip_config
from brixel.errors import BrixelError, did_you_mean

_GATED = "dinov3-license"  # the licence of Meta's repositories of DINOv3, which are gated
# where the text of a licence is that the Hub has no id for and that also covers what is derived from the weights
LICENCE_URLS = {_GATED: "https://ai.meta.com/resources/models-and-libraries/dinov3-license"}

# normalisation of the satellite images that the sat493m weights were trained on
SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone that brixel knows by name.

    Args:
        name: Its name, such as "dinov3-vits16".
        vit: Its architecture and the normalisation of its images.
        licence: The Hub's id of the licence of its weights, or a key of :data:`LICENCE_URLS`.
        huggingface: The repository on the Hub with its weights in Hugging Face's layout, ORG/NAME.
        timm: The repository on the Hub with its weights in timm's layout.
        vocabulary: Words in the vocabulary of the text tower that is in the same files, if there is one.
        adapter: What `BrixelFeatures.from_pretrained` takes for an adapter that was trained on it, if there is one.
        aliases: Other names for it: its size, and its repositories without the organisation.
    """

    name: str
    vit: ViTConfig
    licence: str
    huggingface: str
    timm: str
    vocabulary: int | None = None
    adapter: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Its repositories on the Hub, in order of preference; none where the weights are in the package."""
        return tuple(repository for repository in (self.huggingface, self.timm) if repository)

    @property
    def gated(self) -> bool:
        """Whether its first repository needs the approval of its owners; timm's copies do not."""
        return self.licence == _GATED


def _without_organisation(*repositories: str) -> tuple[str, ...]:
    return tuple(repository.partition("/")[2] for repository in repositories)


def _sizes(width: int, depth: int, heads: int, ffn: str, ffn_width: int) -> dict[str, Any]:
    return {"width": width, "depth": depth, "heads": heads, "ffn": ffn, "ffn_width": ffn_width}


_SIZES = {
    "tiny": _sizes(192, 12, 6, "mlp", 768),
    "small": _sizes(384, 12, 6, "mlp", 1536),
    "small_plus": _sizes(384, 12, 6, "swiglu", 1536),
    "base": _sizes(768, 12, 12, "mlp", 3072),
    "large": _sizes(1024, 24, 16, "mlp", 4096),
    "so400m": _sizes(1152, 27, 16, "mlp", 4304),
    "huge_plus": _sizes(1280, 32, 20, "swiglu", 5120),
    "giant": _sizes(1536, 40, 24, "swiglu", 4096),
    "giant-opt": _sizes(1536, 40, 16, "mlp", 6144),
    "7b": _sizes(4096, 40, 32, "swiglu", 8192),
}


def _dinov3(name: str, size: str, *, satellite: bool = False) -> KnownBackbone:
    data = "sat493m" if satellite else "lvd1689m"
    suffix = f"-{data}" if satellite else ""
    repositories = f"facebook/dinov3-{name}-pretrain-{data}", f"timm/vit_{size}_patch16_dinov3.{data}"
    vit = ViTConfig(
        **_SIZES[size],
        patch_px=16,
        positions="rotary",
        norm_eps=1e-5,
        registers=4,
        qkv_bias=size != "7b",  # only the 7B was trained without
        mean=SATELLITE_MEAN if satellite else IMAGENET_MEAN,
        std=SATELLITE_STD if satellite else IMAGENET_STD,
    )
    aliases = (f"dinov3-{size.replace('_', '-')}{suffix}", *_without_organisation(*repositories))
    return KnownBackbone(f"dinov3-{name}{suffix}", vit, _GATED, *repositories, aliases=aliases)


def _dinov2(size: str, *, registers: int) -> KnownBackbone:
    vit = ViTConfig(
        **_SIZES[size], patch_px=14, positions="learned", norm_eps=1e-6, registers=registers, native_grid=37
    )
    name = f"dinov2-vit{size[0]}14{'-reg4' if registers else ''}"
    repositories = (
        f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
        f"timm/vit_{size}_patch14{'_reg4' if registers else ''}_dinov2.lvd142m",
    )
    return KnownBackbone(name, vit, "apache-2.0", *repositories, aliases=_without_organisation(*repositories))


def _siglip(size: str, patch_px: int, side: str, *, version: str = "", timm: str, vocabulary: int) -> KnownBackbone:
    """``side``: of its images, in pixels, possibly with a suffix of the name, or "naflex" for images of any size."""
    naflex = side == "naflex"
    native_grid = 16 if naflex else int(side.split("-")[0]) // patch_px
    vit = siglip_config(**_SIZES[size], patch_px=patch_px, native_grid=native_grid, naflex=naflex)
    name = f"siglip{version}-{size}-p{patch_px}-{side}"
    repositories = f"google/siglip{version}-{size}-patch{patch_px}-{side}", f"timm/{timm}"
    aliases = _without_organisation(*repositories)
    return KnownBackbone(name, vit, "apache-2.0", *repositories, vocabulary, aliases=aliases)


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
    _dinov3("vits16", "small"),
    _dinov3("vits16plus", "small_plus"),
    _dinov3("vitb16", "base"),
    _dinov3("vitl16", "large"),
    _dinov3("vith16plus", "huge_plus"),
    _dinov3("vit7b16", "7b"),
    _dinov3("vitl16", "large", satellite=True),
    _dinov3("vit7b16", "7b", satellite=True),
    *(_dinov2(size, registers=registers) for size in ("small", "base", "large", "giant") for registers in (0, 4)),
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
"""The published backbones, by name; a weight file is recognised as one of them by its shapes."""

# inside the package, with their adapters: a weight file is never recognised as one of these
BRIXEL_SMALL = KnownBackbone(
    "brixel-small",
    KNOWN_BACKBONES["dinov2-vits14"].vit,
    "apache-2.0",
    huggingface="",
    timm="",
    adapter="brixel-small",
)
BRIXEL_TINY = KnownBackbone(
    "brixel-tiny",
    ViTConfig(**_SIZES["tiny"], patch_px=16, positions="rotary", norm_eps=1e-5, registers=4),
    "apache-2.0",
    huggingface="",
    timm="",
    adapter="brixel-tiny",
)
BUNDLED_BACKBONES: Mapping[str, KnownBackbone] = MappingProxyType(
    {row.name: row for row in (BRIXEL_SMALL, BRIXEL_TINY)}
)


def list_models() -> tuple[KnownBackbone, ...]:
    """List the models that are known by name.

    Returns:
        The bundled models, then the backbones, each with its aliases, its repositories and its licence.
    """
    return (*BUNDLED_BACKBONES.values(), *KNOWN_BACKBONES.values())


def find_backbone(name: str) -> KnownBackbone | None:
    """The table's row with this name, alias or repository; None where there is none."""
    return next((row for row in list_models() if name in (row.name, *row.aliases, *row.sources)), None)


def known_backbone(name: str) -> KnownBackbone:
    """The table's row with this name, alias or repository; BrixelError with the closest one where there is none."""
    if not isinstance(name, str):
        raise BrixelError(f"an architecture is {name!r}; expected a name that `brixel models` lists, or a ViTConfig")
    row = find_backbone(name)
    if row is None:
        raise BrixelError(f"unknown backbone architecture {name!r}; {closest_backbone(name)}")
    return row


def closest_backbone(name: str) -> str:
    """A clause for an error about an unknown name: the closest name or alias, or all names."""
    rows = list_models()
    return did_you_mean(name, [row.name for row in rows], [alias for row in rows for alias in row.aliases])
