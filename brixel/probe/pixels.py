"""From the cells of a readout's map to pixels: bilinear between centres of cells, some rows of pixels at a time.

Shapes: C outputs, h x w cells, H x W pixels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BAND_VALUES = 2**22  # of a band of rows, about


def bands(cells: Tensor, stride: Sequence[float], size_hw: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """The values of pixels, as ``FeatureMap.at`` gives them at the centres of pixels.

    Args:
        cells: (C, h, w), float32.
        stride: Distance (y, x) between neighbouring cells in pixels.
        size_hw: H and W.

    Yields:
        A band of rows, and its values (rows, W, C).
    """
    (top, below, down), (left, right, across) = (
        _neighbours(count, step, pixels) for count, step, pixels in zip(cells.shape[1:], stride, size_hw, strict=True)
    )
    last = cells.permute(1, 2, 0).contiguous()  # h w C; several times as fast with outputs last
    rows = max(1, _BAND_VALUES // (size_hw[1] * cells.shape[0]))
    for start in range(0, size_hw[0], rows):
        band = slice(start, min(start + rows, size_hw[0]))
        lines = torch.lerp(last[top[band]], last[below[band]], down[band, None, None])  # rows w C
        yield band, torch.lerp(lines[:, left], lines[:, right], across[:, None])  # rows W C


def _neighbours(cells: int, step: float, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of an axis the cells around it, and how far it lies from the first towards the second."""
    at = ((torch.arange(pixels, dtype=torch.float64) + 0.5) / step - 0.5).clamp(0, cells - 1)
    first = at.floor().long()
    return first, (first + 1).clamp(max=cells - 1), (at - first).float()
