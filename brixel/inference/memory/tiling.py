"""Tiles that cover a grid: equal, overlapping, blended; integers, no model.

Legend: a grid h x w is covered by tiles of one size; a cell that lies in several takes from each by weights that sum to
one and fall to zero towards a tile's edge, so that nothing jumps there.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from brixel.errors import BrixelError


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``tile_hw`` cells on a grid of ``grid_hw``, which begin at rows ``tops``, columns ``lefts``."""

    grid_hw: tuple[int, int]
    tile_hw: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tops) * len(self.lefts)

    def tiles(self) -> list[tuple[int, int]]:
        """Top and left cell of every tile, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]


def plan_tiling(grid_hw: tuple[int, int], side: int, overlap: int) -> Tiling:
    """Tiles of ``side`` x ``side`` cells, or as long as the grid where that is shorter.

    Neighbours share at least ``overlap`` cells, and are spread evenly. Raises BrixelError unless 0 <= overlap < side.
    """
    if not 0 <= overlap < side:
        raise BrixelError(f"tiles of {side} cells cannot overlap by {overlap}; expected 0 <= overlap < side")
    tile_hw = (min(side, grid_hw[0]), min(side, grid_hw[1]))
    tops, lefts = (_starts(cells, tile, overlap) for cells, tile in zip(grid_hw, tile_hw, strict=True))
    return Tiling(grid_hw, tile_hw, tops, lefts)


def _starts(cells: int, tile: int, overlap: int) -> tuple[int, ...]:
    """First cells of the tiles along one axis."""
    if tile == cells:
        return (0,)
    steps = -(-(cells - tile) // (tile - overlap))
    return tuple(step * (cells - tile) // steps for step in range(steps + 1))


def blend_weights(starts: tuple[int, ...], tile: int, cells: int, upscale: int) -> Tensor:
    """What each tile along one axis gives to its cells, ``upscale`` to one of the grid: (tiles, tile * upscale).

    The weights rise by the same step in every cell from a tile's edge to the middle of it, or to the end of the
    narrowest overlap; those of all tiles in a cell sum to one.
    """
    length = tile * upscale
    overlap = min((tile - (b - a) for a, b in itertools.pairwise(starts)), default=tile) * upscale
    edge = torch.arange(length, dtype=torch.float64) + 0.5
    ramp = torch.minimum(edge, edge.flip(0)).clamp_max(max(0.5, overlap))
    places = upscale * torch.tensor(starts)[:, None] + torch.arange(length)  # tiles length
    sums = torch.zeros(cells * upscale, dtype=torch.float64)
    sums.index_add_(0, places.flatten(), ramp.repeat(len(starts)))
    return (ramp / sums[places]).float()
