"""Deformable attention in plain torch: every query reads a feature grid at a few points that it predicts.

The sampling of Deformable DETR (arXiv 2010.04159) for one level. Points are read by bilinear interpolation, zero
outside the grid, cell centres at +0.5 (`align_corners=False`). The points of one query and head, four corners for every
point, are one bag of weighted rows of a table. There are two ways to sum the bags, with equal results:
`torch.nn.functional.embedding_bag`, which stores no samples and is the fastest as it is; and gathering the rows, which
torch.compile turns into one loop, faster than the former, and which exported programs can do in one operation.

Shapes: B batch, h x w feature grid, N queries, A heads, P points per head, C channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# cells of zeros around the grid: two after it, since a point on its far edge still has a right neighbour
_BEFORE, _AFTER = 1, 2


def sample_points(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a feature grid at fractional points, per query and head.

    ``values`` (B, h, w, A, C), ``points`` (B, N, A, P, 2), ``weights`` (B, N, A, P) -> (B, N, A * C). Points are
    float32 or wider, x before y, in cells: the centre of the first cell is 0.5, the grid ends at w and h.
    """
    return read_table(pad_table(values), points, weights)


def pad_table(values: Tensor) -> Tensor:
    """Pad the grid with cells of zeros, for :func:`read_table`: (B, h, w, A, C) -> (B, h + 3, w + 3, A, C)."""
    return F.pad(values, (0, 0, 0, 0, _BEFORE, _AFTER, _BEFORE, _AFTER))


def empty_table(grid_hw: tuple[int, int], heads: int, channels: int, like: Tensor) -> Tensor:
    """A padded table of zeros for one image, (1, h + 3, w + 3, A, C), to be filled through :func:`inner_rows`."""
    height, width = (cells + _BEFORE + _AFTER for cells in grid_hw)
    return like.new_zeros(1, height, width, heads, channels)


def inner_rows(table: Tensor, start: int, stop: int) -> Tensor:
    """A view of the grid rows ``start`` to ``stop`` of a padded table (B, h + 3, w + 3, A, C): (B, n, w, A, C)."""
    return table[:, start + _BEFORE : stop + _BEFORE, _BEFORE:-_AFTER]


def read_table(table: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """:func:`sample_points` on a table from :func:`pad_table`, for all queries or some of them."""
    batch, heads, channels = table.shape[0], table.shape[3], table.shape[4]
    height, width = table.shape[1] - _BEFORE - _AFTER, table.shape[2] - _BEFORE - _AFTER
    table = table.reshape(-1, channels)
    rows, fractions = _first_corners(points, (height, width), heads)  # B N A P, B N A P 2
    row_cells = width + _BEFORE + _AFTER
    steps = torch.tensor([0, 1, row_cells, row_cells + 1], dtype=rows.dtype, device=rows.device) * heads
    bags = (rows[..., None] + steps).flatten(3).flatten(0, 2)  # B*N*A P*4
    # under autocast values and weights may differ in dtype, which embedding_bag does not take
    corner_weights = _corner_weights(fractions.to(weights.dtype), weights).to(table.dtype)  # B*N*A P*4
    sum_bags = gathered_sums if torch.compiler.is_compiling() else embedding_bag_sums  # compiling: also exporting
    return sum_bags(table, bags, corner_weights).view(batch, -1, heads * channels)


def embedding_bag_sums(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows (cells, C) that ``bags`` (n, k) names: (n, C)."""
    return F.embedding_bag(bags, table, per_sample_weights=weights, mode="sum")


def gathered_sums(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """What :func:`embedding_bag_sums` computes, by operations that compilers and exported formats know."""
    rows = table.index_select(0, bags.flatten()).view(*bags.shape, -1)  # n k C
    return (weights[:, None] @ rows)[:, 0]


def _first_corners(points: Tensor, grid_hw: tuple[int, int], heads: int) -> tuple[Tensor, Tensor]:
    """The table row of the corner above and left of every point, and the point's distance from it in cells."""
    height, width = grid_hw
    x = (points[..., 0] - 0.5).clamp(-_BEFORE, width)  # farther out all corners are zero anyway
    y = (points[..., 1] - 0.5).clamp(-_BEFORE, height)
    left, top = x.floor(), y.floor()
    row_cells, column_cells = width + _BEFORE + _AFTER, height + _BEFORE + _AFTER
    cells = (top.to(torch.int32) + _BEFORE) * row_cells + left.to(torch.int32) + _BEFORE  # B N A P
    images = torch.arange(points.shape[0], dtype=torch.int32, device=points.device)[:, None, None, None]
    head = torch.arange(heads, dtype=torch.int32, device=points.device)[:, None]
    rows = (cells + images * (row_cells * column_cells)) * heads + head
    return rows, torch.stack([x - left, y - top], dim=-1)


def _corner_weights(fractions: Tensor, weights: Tensor) -> Tensor:
    """Bilinear weights of the four corners times the weight of the point: (B, N, A, P) -> (B*N*A, P*4)."""
    right, below = fractions.unbind(-1)
    lower = weights * below
    upper = weights - lower
    upper_right, lower_right = upper * right, lower * right
    corners = [upper - upper_right, upper_right, lower - lower_right, lower_right]
    return torch.stack(corners, dim=-1).flatten(3).flatten(0, 2)
