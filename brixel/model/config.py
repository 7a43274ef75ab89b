"""The configuration of a saved model: which backbone, exactly, and which adapter. Plain JSON values only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError
from brixel.utils.fields import Rule, boolean, check_fields, number, optional, several, text, text_table, whole_number


def _ascending(value: Any) -> tuple[int, ...]:
    blocks: tuple[int, ...] = several(whole_number(), "", count=4).convert(value)
    if list(blocks) != sorted(blocks):
        raise ValueError
    return blocks


_ADAPTER_RULES = {
    "blocks": Rule("four indices from 0, in ascending order", _ascending),
    "residual_detour": boolean(),
    "short_side_px": whole_number(1),
    "blend": boolean(),
}
_BACKBONE_RULES = {
    "architecture": optional(text()),
    "sources": several(text(), "a list of paths and names of repositories", single=False),
    "fingerprint": several(number(), "a list of finite numbers", single=False),
}
_BRIXEL_RULES = {
    "commits": text_table("commits by name of repository"),
    "training": text_table("texts by name"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What distinguishes one upsampler from another, apart from the backbone's width.

    ``blocks``: the four blocks, from 0, whose maps it reads; the last must be the backbone's last.
    ``residual_detour``: see `model.head.Head`. ``short_side_px``: short side of the images it was trained on.
    ``blend``: see `model.adapter.Adapter`.
    """

    blocks: tuple[int, ...]
    residual_detour: bool
    short_side_px: int
    blend: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _ADAPTER_RULES, prefix="AdapterConfig.")


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
    ``fingerprint``: some of its weights, which distinguish it from others of its size.
    """

    architecture: str | None
    sources: tuple[str, ...]
    vit: ViTConfig | ForeignConfig
    fingerprint: tuple[float, ...]

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
