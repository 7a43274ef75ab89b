"""The configuration of a saved model: which backbone, exactly, and which adapter. Plain JSON values only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError
from brixel.utils.fields import (
    Rule,
    boolean,
    check_fields,
    number,
    one_of,
    optional,
    several,
    text,
    text_table,
    whole_number,
)

TRAINED, UNIVERSAL, BILINEAR = "trained", "universal", "bilinear"
KINDS = (TRAINED, UNIVERSAL, BILINEAR)
_LARGEST_SIDE = 2**16  # px


def _ascending(value: Any) -> tuple[int, ...]:
    blocks: tuple[int, ...] = several(whole_number(), "").convert(value)
    if list(blocks) != sorted(blocks) or len(blocks) not in (1, 4):
        raise ValueError
    return blocks


_ADAPTER_RULES = {
    "blocks": Rule("four indices from 0, in ascending order (one for kinds that read the last map alone)", _ascending),
    "residual_detour": boolean(),
    "short_side_px": whole_number(1, _LARGEST_SIDE),
    "blend": boolean(),
    "kind": one_of(*KINDS),
    "generation": whole_number(1, 3),
    "own_share": number(0, 1 + 1e-9),
    "grids": several(whole_number(1, _LARGEST_SIDE), "whole numbers above 0, ascending", most=64, single=False),
}
_BACKBONE_RULES = {
    "architecture": optional(text()),
    "sources": several(text(), "a list of paths and names of repositories", most=64, single=False),
    "fingerprint": several(number(-1e30, 1e30), "a list of finite numbers", most=2**12, single=False),
    "int8": boolean(),
}
_BRIXEL_RULES = {
    "commits": text_table("commits by name of repository"),
    "training": text_table("texts by name"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What distinguishes one upsampler from another, apart from the backbone's width.

    ``kind``: "trained" for this backbone; "universal", the network in the package that needs no training; or "bilinear"
    interpolation. ``blocks``: the four blocks, from 0, whose maps it reads; the last must be the backbone's last. Kinds
    that are not trained read that one alone. ``generation``: of a trained one; the second starts from the universal
    upsampler, the first, as the authors' release, from interpolation. ``grids``: of the second generation, sides of the
    patch grids that it was trained at.
    ``own_share``: of one of the first generation, its share of the map, the rest being the universal upsampler's.
    ``residual_detour``: see `model.head.Head`. ``short_side_px``: short side of the images it was trained on.
    ``blend``: see `model.adapter.Adapter`.
    """

    blocks: tuple[int, ...]
    residual_detour: bool
    short_side_px: int
    blend: bool = False
    kind: str = TRAINED
    generation: int = 1
    grids: tuple[int, ...] = ()
    own_share: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, _ADAPTER_RULES, prefix="AdapterConfig.")
        if len(self.blocks) != (4 if self.kind == TRAINED else 1):
            raise BrixelError(
                f"AdapterConfig.blocks is {list(self.blocks)}, for a {self.kind} adapter; expected four blocks for a "
                "trained one, the last block for others"
            )
        if self.own_share < 1 and (self.kind != TRAINED or self.generation != 1):
            raise BrixelError(
                f"AdapterConfig.own_share is {self.own_share:g}; only a trained adapter of the first generation has one"
            )
        if (self.generation == 2) != bool(self.grids) or list(self.grids) != sorted(set(self.grids)):
            raise BrixelError(
                f"AdapterConfig.grids is {list(self.grids)} for generation {self.generation}; expected sides of patch "
                "grids in ascending order for generation 2, none for generation 1"
            )


def default_blocks(depth: int) -> tuple[int, ...]:
    """The released models' choice by depth: a quarter, a half, three quarters, the last; of four blocks all."""
    if depth < 4:
        raise BrixelError(f"a backbone of {depth} blocks has no default choice of four; give blocks=(...)")
    return (depth // 4, depth // 2, 3 * depth // 4, depth - 1) if depth > 4 else (0, 1, 2, 3)


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone an adapter belongs to.

    ``architecture``: its name in the table of models, or None for a custom one. ``vit``: all of its configuration,
    or what is known of one that was given as a module. ``sources``: where its weights are, in order of preference:
    paths on disk, ORG/NAME[@REVISION] on the Hub, or the name of a bundled model; a module has none.
    ``fingerprint``: some of its weights, which distinguish it from others of its size. ``int8``: whether the model was
    saved with 8-bit weights of its backbone, which are not exactly those.
    """

    architecture: str | None
    sources: tuple[str, ...]
    vit: ViTConfig | ForeignConfig
    fingerprint: tuple[float, ...]
    int8: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _BACKBONE_RULES, prefix="BackboneConfig.")

    @property
    def title(self) -> str:
        """A name for messages: the architecture, or class and sizes."""
        kind = self.vit.class_name if isinstance(self.vit, ForeignConfig) else "ViT"
        sizes = f"{kind} of width {self.vit.width}, depth {self.vit.depth}, patch {self.vit.patch_px}"
        return self.architecture or sizes


@dataclass(frozen=True)
class BrixelConfig:
    """Everything that a saved folder states about its model, apart from the weights.

    ``commits``: the commits of the Hub's repositories that its files came from, by repository; they trace results, and
    are not used to load. ``training``: for people, how the adapter was made and how good it is, by topic.
    """

    backbone: BackboneConfig
    adapter: AdapterConfig
    commits: Mapping[str, str] = field(default_factory=dict, hash=False)
    training: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_fields(self, _BRIXEL_RULES, prefix="BrixelConfig.")

    def with_sources(self, sources: Iterable[str]) -> "BrixelConfig":
        """The same configuration with other sources of its backbone."""
        return replace(self, backbone=replace(self.backbone, sources=tuple(sources)))
