"""Averages of a map over rectangles of the image, exact where a cell is cut by an edge.

Shapes: D channels, Hf x Wf cells, n intervals along an axis.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Edges = npt.NDArray[np.float64]
"""The n + 1 edges of n neighbouring intervals along an axis, rising, in pixels of the image."""


def area_average(features: Tensor, stride: tuple[float, float], edges_yx: tuple[Edges | None, Edges | None]) -> Tensor:
    """The mean of the features over every rectangle between the edges, where a cell has one value all over.

    Args:
        features: (D, Hf, Wf).
        stride: Distance (y, x) between neighbouring cells in pixels.
        edges_yx: The edges along y and x, within the cells; None for an axis that keeps its cells.

    Returns:
        (D, ny, nx), in the dtype of the features.
    """
    averaged = features
    for axis, (step, edges) in enumerate(zip(stride, edges_yx, strict=True), 1):
        averaged = averaged if edges is None else _along(averaged, axis, edges / step)
    return averaged.to(features.dtype).contiguous()


def _along(features: Tensor, axis: int, edges: Edges) -> Tensor:
    """The means along an axis between edges in cells; float32 or wider."""
    start, stop = edges[:-1], edges[1:]
    last = features.shape[axis] - 1
    first = np.floor(start).astype(np.int64)
    shape = [1, 1, 1]
    shape[axis] = len(start)
    wide = torch.promote_types(features.dtype, torch.float32)
    total: Tensor | None = None
    # every interval's first cell, then every second cell, and so on: few steps, and no product with mostly zeros
    for offset in range(int((np.ceil(stop) - first).max())):
        cell = first + offset
        covered = np.clip(np.minimum(stop, cell + 1) - np.maximum(start, cell), 0, None) / (stop - start)
        index = torch.from_numpy(cell.clip(0, last)).to(features.device)
        weight = torch.from_numpy(covered).to(wide).view(shape).to(features.device)
        part = features.index_select(axis, index).to(wide) * weight
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
