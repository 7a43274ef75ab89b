"""The configuration of a saved model: which backbone, exactly, and which adapter. Plain JSON values only."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError


@dataclass(frozen=True)
class AdapterConfig:
    """What distinguishes one adapter from another, beside the backbone's width.

    ``blocks``: the four blocks, from 0, whose outputs feed the extractors; the last must be the backbone's last.
    ``residual_detour``: see `model.head.Head`. ``short_side_px``: short side of the images it was trained on.
    ``blend``: see `model.adapter.Adapter`.
    """

    blocks: tuple[int, ...]
    residual_detour: bool
    short_side_px: int
    blend: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _four_blocks(self.blocks))
        for name in ("residual_detour", "blend"):
            if not isinstance(getattr(self, name), bool):
                raise BrixelError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if type(self.short_side_px) is not int or self.short_side_px < 1:
            raise BrixelError(f"short_side_px is {self.short_side_px!r}; expected a positive number of pixels")


def _four_blocks(given: Iterable[int]) -> tuple[int, ...]:
    shown = list(given) if isinstance(given, Iterable) else given
    try:
        blocks = tuple(-1 if isinstance(block, bool) else operator.index(block) for block in shown)
    except TypeError:
        blocks = ()
    if len(blocks) != 4 or list(blocks) != sorted(blocks) or blocks[0] < 0:
        raise BrixelError(f"blocks are {shown!r}; expected four indices from 0, in ascending order")
    return blocks


def default_blocks(depth: int) -> tuple[int, ...]:
    """The released models' choice by depth: a quarter, a half, three quarters, the last; of four blocks all."""
    if depth < 4:
        raise BrixelError(f"a backbone of {depth} blocks has no default choice of four; give blocks=(...)")
    return (depth // 4, depth // 2, 3 * depth // 4, depth - 1) if depth > 4 else (0, 1, 2, 3)


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone an adapter belongs to.

    ``architecture``: its name in the table of models, or None for one of the user's own; ``vit``: all of it,
    or what is known of one that came as a module, which has no sources.
    ``sources``: where it can be had, in order of preference, each a path on disk or ORG/NAME or ORG/NAME@REVISION on
    the Hub. ``fingerprint``: some of its weights, to tell it from others of its size.
    """

    architecture: str | None
    sources: tuple[str, ...]
    vit: ViTConfig | ForeignConfig
    fingerprint: tuple[float, ...]

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not all(isinstance(each, str) and each for each in self.sources):
            raise BrixelError(f"sources is {self.sources!r}; expected a list of paths and names of repositories")
        object.__setattr__(self, "sources", tuple(self.sources))
        if not all(type(value) in (int, float) and math.isfinite(value) for value in self.fingerprint):
            raise BrixelError("fingerprint holds something else than finite numbers")
        object.__setattr__(self, "fingerprint", tuple(self.fingerprint))

    @property
    def title(self) -> str:
        """A name for messages: the architecture, or its sizes."""
        kind = self.vit.class_name if isinstance(self.vit, ForeignConfig) else "ViT"
        return (
            self.architecture or f"{kind} of width {self.vit.width}, depth {self.vit.depth}, patch {self.vit.patch_px}"
        )


@dataclass(frozen=True)
class BrixelConfig:
    """All that a saved folder says of its model beside the weights.

    ``commits``: of the repositories on the Hub whose files it was made of, by name; to trace results, not to load by.
    ``training``: how the adapter was made and how good it was, for people, by what each line is about.
    """

    backbone: BackboneConfig
    adapter: AdapterConfig
    commits: Mapping[str, str] = field(default_factory=dict, hash=False)
    training: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, what in (("commits", "commits by name of repository"), ("training", "texts by name")):
            given = getattr(self, name)
            texts = [*given, *given.values()] if isinstance(given, Mapping) else [None]
            if not all(isinstance(each, str) for each in texts):
                raise BrixelError(f"{name} is {given!r}; expected {what}")
