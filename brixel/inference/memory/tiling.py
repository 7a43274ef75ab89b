"""Equal, overlapping tiles that cover a grid, and the weights that blend them; integers, no model.

A cell in several tiles takes from all of them, by weights that sum to one and fall towards a tile's edge, so that the
map does not jump there.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brixel.errors import BrixelError


@dataclass(frozen=True)
class Tiling:
    """Tiles of ``tile_hw`` cells on a grid of ``grid_hw``, one at every pair of ``tops`` (rows) and ``lefts``."""

    grid_hw: tuple[int, int]
    tile_hw: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.tops) * len(self.lefts)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Top and left cell of every tile, row by row."""
        return itertools.product(self.tops, self.lefts)


def plan_tiling(grid_hw: tuple[int, int], side: int, overlap: int) -> Tiling:
    """Spread tiles of ``side`` x ``side`` cells evenly over a grid; on a shorter axis they are as long as the grid.

    Neighbours share at least ``overlap`` cells. Raises BrixelError unless 0 <= overlap < side.
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
    """Weights of tiles along one axis, for ``upscale`` cells per cell of the grid: (tiles, tile * upscale).

    They rise linearly from a tile's edge to its middle, or to the end of the narrowest overlap; those of all tiles in a
    cell sum to one.
    """
    length = tile * upscale
    overlap = min((tile - (b - a) for a, b in itertools.pairwise(starts)), default=tile) * upscale
    edge = torch.arange(length, dtype=torch.float64, device="cpu") + 0.5
    ramp = torch.minimum(edge, edge.flip(0)).clamp_max(max(0.5, overlap))
    positions = upscale * torch.tensor(starts, device="cpu")[:, None] + torch.arange(
        length, device="cpu"
    )  # tiles length
    sums = torch.zeros(cells * upscale, dtype=torch.float64, device="cpu")
    sums.index_add_(0, positions.flatten(), ramp.repeat(len(starts)))
    return (ramp / sums[positions]).float()
