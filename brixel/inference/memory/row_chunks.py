"""Ranges of rows that cover a map, and the resizing of some rows to what resizing the whole map would give them.

Shapes: B batch, C channels, H x W cells.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from brixel.model.adapter import resize

Ranges = Sequence[tuple[int, int]]
"""Pairs (start, stop), stop excluded."""


def row_ranges(total: int, rows: int) -> list[tuple[int, int]]:
    """Ranges of ``rows`` rows that cover ``total``; the last one may be shorter."""
    return [(start, min(start + rows, total)) for start in range(0, total, rows)]


def source_rows(wanted: tuple[int, int], total: int, new_total: int) -> tuple[int, int]:
    """The range of rows, out of ``total``, that bilinear resizing to ``new_total`` reads for the range ``wanted``."""
    if total == new_total:
        return wanted
    near = [max(0.0, (row + 0.5) * total / new_total - 0.5) for row in (wanted[0], wanted[1] - 1)]
    # one more on either side: a quotient may be rounded across a whole number
    return max(0, int(near[0]) - 1), min(total, int(near[1]) + 3)


def resize_rows(
    maps: Tensor, start: int, total: int, wanted: tuple[int, int], new_hw: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The rows ``wanted`` of a map with ``total`` rows that is resized to ``new_hw``, bilinear.

    ``maps``: (B, C, n, W), the map's rows from ``start`` on, at least those of :func:`source_rows`. Cell centres are at
    +0.5, as in :func:`resize`. Returns (B, C, wanted, new W) of ``dtype``, channels last in memory.
    """
    if total == new_hw[0]:
        maps = maps[:, :, wanted[0] - start : wanted[1] - start]
        return (maps if maps.shape[3] == new_hw[1] else resize(maps, (maps.shape[2], new_hw[1]))).to(dtype)
    wide = torch.promote_types(maps.dtype, torch.float32)
    rows = torch.arange(*wanted, dtype=wide, device=maps.device)
    positions = ((rows + 0.5) * (total / new_hw[0]) - 0.5).clamp(0, total - 1)
    above = positions.floor()
    fraction = (positions - above)[:, None]  # n' 1
    index = above.long() - start
    below = (above.long() + 1).clamp_max(total - 1) - start
    mixed = torch.lerp(maps[:, :, index].to(wide), maps[:, :, below].to(wide), fraction)  # B C n' W
    mixed = mixed.contiguous(memory_format=torch.channels_last)
    return resize(mixed, (mixed.shape[2], new_hw[1])).to(dtype)
