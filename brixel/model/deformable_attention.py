"""Deformable attention in plain torch: every query reads a feature grid at a few points that it predicts.

The sampling of Deformable DETR (arXiv 2010.04159) for one level. Points are read by bilinear interpolation, zero
outside the grid, cell centres at +0.5 (`align_corners=False`). The points of one query and head, four corners for every
point, are one bag of weighted rows of a table. There are two ways to sum the bags, with equal results:
`torch.nn.functional.embedding_bag`, which stores no samples and is the fastest as it is; and gathering the rows, which
exported programs can do in one operation, and which torch.compile turns into one kernel on GPUs. (On CPUs its loop over
the rows of a bag would start threads for every bag of fewer channels than a vector holds: torch 2.13.)

Shapes: B batch, h x w feature grid, N queries, A heads, P points per head, C channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# cells of zeros around the grid: two after it, since a point on its far edge still has a right neighbour
_BEFORE, _AFTER = 1, 2
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has one flag for both


def sample_points(values: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a feature grid at fractional points, per query and head.

    ``values`` (B, h, w, A, C), ``points`` (B, N, A, P, 2), ``weights`` (B, N, A, P) -> (B, N, A * C). Points are
    float32 or wider, x before y, in cells: the centre of the first cell is 0.5, the grid ends at w and h.
    """
    x, y = points.unbind(-1)
    return read_table(pad_table(values), x, y, weights)


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


def read_table(table: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """:func:`sample_points` on a table from :func:`pad_table`, for all queries or some of them.

    ``x``, ``y`` and ``weights`` are (B, N, A, P).
    """
    batch, heads, channels = table.shape[0], table.shape[3], table.shape[4]
    table_rows, table_columns = table.shape[1], table.shape[2]
    table = table.reshape(-1, channels)
    x, left = _split(x, table_columns)
    y, top = _split(y, table_rows)
    firsts = torch.add(left, top, alpha=table_columns) * heads + _first_rows(batch, heads, table_rows, table_columns, x)
    below = table_columns * heads
    bags = _joined(firsts, firsts + heads, firsts + below, firsts + (below + heads))
    # under autocast values and weights may differ in dtype, which embedding_bag does not take
    corner_weights = _corner_weights(x.to(weights.dtype), y.to(weights.dtype), weights).to(table.dtype)
    sum_bags = gathered_sums if _gathers(table) else embedding_bag_sums
    return sum_bags(table, bags, corner_weights).view(batch, -1, heads * channels)


def _gathers(table: Tensor) -> bool:
    """Whether samples are summed by gathering rows: in exported programs, and compiled for a GPU."""
    return _is_exporting() or (torch.compiler.is_compiling() and table.device.type != "cpu")


def _split(places: Tensor, table_cells: int) -> tuple[Tensor, Tensor]:
    """Places on an axis as the distance from the cell centre before them, and the number of that cell, from -2."""
    # farther out all corners are zero anyway
    places = (places - 0.5).clamp(-_BEFORE, table_cells - _BEFORE - _AFTER)
    cells = places.floor()
    return places - cells, cells.to(torch.int32)


def _first_rows(batch: int, heads: int, table_rows: int, table_columns: int, like: Tensor) -> Tensor:
    """The table's row of the first cell of every image's grid and head: (B, 1, A, 1)."""
    images = torch.arange(batch, dtype=torch.int32, device=like.device)[:, None, None, None]
    head = torch.arange(heads, dtype=torch.int32, device=like.device)[:, None]
    return (images * table_rows + _BEFORE) * (table_columns * heads) + _BEFORE * heads + head


def _corner_weights(right: Tensor, below: Tensor, weights: Tensor) -> Tensor:
    """Bilinear weights of the four corners times the weight of the point: (B, N, A, P) -> (B*N*A, 4*P)."""
    lower = weights * below
    upper = weights - lower
    upper_right, lower_right = upper * right, lower * right
    return _joined(upper - upper_right, upper_right, lower - lower_right, lower_right)


def _joined(*corners: Tensor) -> Tensor:
    """Join the four corners of every point: (B, N, A, P) -> (B*N*A, 4*P).

    They are flat before: torch.compile stores tensors of four dimensions near convolutions with the second one last.
    """
    return torch.cat([corner.flatten(0, 2) for corner in corners], -1)


def embedding_bag_sums(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the rows (cells, C) that ``bags`` (n, k) names: (n, C)."""
    return F.embedding_bag(bags, table, per_sample_weights=weights, mode="sum")


def gathered_sums(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """What :func:`embedding_bag_sums` computes, by operations that compilers and exported formats know."""
    rows = table.index_select(0, bags.flatten()).view(*bags.shape, -1)  # n k C
    return (weights[:, None] @ rows)[:, 0]
