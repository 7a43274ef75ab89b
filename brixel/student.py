"""The student: a frozen backbone on a small picture, an adapter and a head that give the map of the large one.

The graph of arXiv 2511.05168, section 1 of `docs/method.md`. Tensors in, tensors out; files and pictures are the
business of :class:`brixel.BrixelFeatures`.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from brixel.adapter import Adapter
from brixel.backbones.protocol import Backbone
from brixel.errors import BrixelError
from brixel.head import GROUPS, Head

UPSCALE = 4  # cells of the dense map per patch, on each axis


@dataclass(frozen=True)
class AdapterConfig:
    """What distinguishes one adapter from another, beside the backbone's width.

    ``blocks``: the four blocks, from 0, whose outputs feed the extractors; the last must be the backbone's last.
    ``residual_detour``: see :class:`brixel.head.Head`. ``short_side_px``: short side of the pictures it was trained on.
    ``blend``: see :class:`brixel.adapter.Adapter`.
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


class Student(nn.Module):
    """Backbone, adapter and head. The backbone stays frozen and in evaluation mode."""

    def __init__(self, backbone: Backbone, adapter: Adapter, head: Head, blocks: tuple[int, ...]) -> None:
        super().__init__()
        if blocks[-1] != backbone.depth - 1:
            raise BrixelError(f"blocks are {list(blocks)}; the last must be the backbone's last, {backbone.depth - 1}")
        self.backbone = backbone
        self.backbone.requires_grad_(False)
        self.adapter = adapter
        self.head = head
        self.blocks = blocks
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """The dense map of a batch.

        ``pixels``: (B, 3, H, W), normalised with the backbone's mean and deviation, H and W multiples of ``patch_px``.
        Returns (B, D, 4h, 4w) for the patch grid h x w; in memory channels come last. Differentiable in the adapter and
        head (and the pixels); wrap it in ``torch.no_grad()`` where no gradient is wanted.
        """
        maps = self.backbone.block_maps(pixels, self.blocks)
        return self.head(*self.adapter(pixels, maps))

    def backbone_features(self, pixels: Tensor) -> Tensor:
        """The frozen backbone's own last normalised map: (B, 3, H, W) as for the model itself -> (B, D, h, w)."""
        return self.backbone.block_maps(pixels, self.blocks[-1:])[0]

    def requires_grad_(self, requires_grad: bool = True) -> "Student":
        """Turn gradients of adapter and head on or off; the backbone stays frozen."""
        self.adapter.requires_grad_(requires_grad)
        self.head.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> "Student":
        """Set training mode for adapter and head; the backbone has none."""
        super().train(mode)
        self.backbone.eval()
        return self


def new_trainable(width: int, config: AdapterConfig) -> nn.ModuleDict:
    """A fresh adapter and head for a backbone of this width: what a student adds to it, and what its file holds."""
    if width % GROUPS:
        raise BrixelError(f"the backbone is {width} wide; the adapter needs a multiple of {GROUPS}")
    adapter, head = Adapter(width, blend=config.blend), Head(width, residual_detour=config.residual_detour)
    return nn.ModuleDict({"adapter": adapter, "head": head})
