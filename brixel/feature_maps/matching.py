"""Points of one feature map found in another one: the most similar cell, between cells, and whether both agree.

Shapes: D channels, N points, Hf x Wf cells; similarities are cosines.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_SIMILARITIES = 2**24  # that exist at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Matches:
    """Points of an image and where they were found in another one; as long as the rows, N.

    Args:
        source_yx: (N, 2), the points (y, x) in pixels of the first image; float64.
        points_yx: (N, 2), where they were found, in pixels of the second image; float64.
        score: (N,), the cosine similarity of both features, float32.
        mutual: (N,), whether the second map's best cell for what was found is at the point again: less than one cell
            away on both axes.
    """

    source_yx: Tensor
    points_yx: Tensor
    score: Tensor
    mutual: Tensor

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, chosen: Tensor | slice) -> "Matches":
        """Some of the matches, by a mask, indices or a slice."""
        return Matches(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def __repr__(self) -> str:
        return f"Matches({len(self)} points, {int(self.mutual.sum())} mutual)"


def unit_cells(features: Tensor) -> Tensor:
    """The cells of a map (D, Hf, Wf) as vectors of length 1, those of zeros as zeros: (Hf*Wf, D), float32 or wider."""
    return F.normalize(features.flatten(1).T.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def nearest(queries: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar of ``cells`` (M, D) to each of ``queries`` (N, D), both of length 1: scores and indices (N,)."""
    scores, indices = zip(*(part.max(1) for part in _similarities(queries, cells)), strict=True)
    return torch.cat(scores), torch.cat(indices)


def _similarities(queries: Tensor, cells: Tensor) -> Iterator[Tensor]:
    """The similarities of some queries at a time to all cells: (n, M)."""
    for part in queries.split(max(1, _MOST_SIMILARITIES // len(cells))):
        yield part @ cells.T


def refined(queries: Tensor, cells: Tensor, found: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Where between cells the similarity is largest, in cells from the first centre: (N, 2), y before x, float64.

    The vertex of a parabola through the similarities of the best cell ``found`` (N,) and its neighbours along each
    axis, at most half a cell away; on the border of the grid the cell's own centre.
    """
    height, width = grid_hw
    rows, columns = found // width, found % width
    best = (queries * cells[found]).sum(1).double()
    places = []
    for own, last, step in ((rows, height - 1, width), (columns, width - 1, 1)):
        inside = (own > 0) & (own < last)
        before, after = (
            (queries * cells[torch.where(inside, found + sign * step, found)]).sum(1).double() for sign in (-1, 1)
        )
        curvature = before - 2 * best + after  # not above 0: the best is in the middle
        vertex = (before - after) / (2 * curvature).clamp_max(-1e-12)
        places.append(own + torch.where(inside, vertex.clamp(-0.5, 0.5), 0.0))
    return torch.stack(places, 1)
