"""Rows of a map, some at a time: which they are, and the resizing of a few to what a resizing of all would give them.

Shapes: B batch, C channels, H x W cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_ranges(total: int, rows: int, *, sketch: bool = False) -> list[tuple[int, int]]:
    """Ranges (first, behind the last) of ``rows`` each that cover ``total``, the last one shorter where it must be.

    ``sketch``: the first two and the last two alone, which use as much memory as all.
    """
    ranges = [(first, min(first + rows, total)) for first in range(0, total, rows)]
    return [*ranges[:2], *ranges[-2:]] if sketch and len(ranges) > 4 else ranges


def source_rows(wanted: tuple[int, int], total: int, new_total: int) -> tuple[int, int]:
    """The range of rows, out of ``total``, that bilinear resizing to ``new_total`` reads for the range ``wanted``."""
    if total == new_total:
        return wanted
    near = [max(0.0, (row + 0.5) * total / new_total - 0.5) for row in (wanted[0], wanted[1] - 1)]
    # one more on either side: a quotient may be rounded across a whole number
    return max(0, int(near[0]) - 1), min(total, int(near[1]) + 3)


def resize_rows(
    maps: Tensor, first: int, total: int, wanted: tuple[int, int], new_hw: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The rows ``wanted`` of what bilinear resizing to ``new_hw`` makes of a map with ``total`` rows.

    ``maps``: (B, C, n, W), the rows of that map from ``first`` on, at least those of :func:`source_rows`. Cell centres
    at +0.5, as in `model.adapter.resize`. Returns (B, C, wanted, new W) of ``dtype``, channels last in memory.
    """
    if total == new_hw[0]:
        maps = maps[:, :, wanted[0] - first : wanted[1] - first]
        return (maps if maps.shape[3] == new_hw[1] else _columns(maps, new_hw[1])).to(dtype)
    wide = torch.promote_types(maps.dtype, torch.float32)
    rows = torch.arange(*wanted, dtype=wide, device=maps.device)
    places = ((rows + 0.5) * (total / new_hw[0]) - 0.5).clamp(0, total - 1)
    above = places.floor()
    share = (places - above)[:, None]  # n' 1
    index = above.long() - first
    below = (above.long() + 1).clamp_max(total - 1) - first
    mixed = torch.lerp(maps[:, :, index].to(wide), maps[:, :, below].to(wide), share)  # B C n' W
    return _columns(mixed.contiguous(memory_format=torch.channels_last), new_hw[1]).to(dtype)


def _columns(maps: Tensor, columns: int) -> Tensor:
    return F.interpolate(maps, size=(maps.shape[2], columns), mode="bilinear", align_corners=False)
