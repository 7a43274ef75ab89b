"""Labels of cells: the shares of classes among a cell's pixels, and the loss of a readout against them.

Shapes: K classes, D channels, h x w cells, H x W pixels of a mask.
"""

from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

POINTS = 4  # labels are read at so many points along each side of a cell


def points_of_cells(
    values: Tensor, grid_hw: Sequence[int], stride: tuple[float, float] | tuple[None, None] = (None, None)
) -> Tensor:
    """The values of the pixels at a cell's points, (H, W) -> (POINTS*h, POINTS*w), in the dtype of ``values``.

    ``stride``: the cells' distance in pixels of the mask; without it they cover the mask exactly. Points beyond the
    edge have the values of the edge, as the pixels there are repeated in the image that the model sees.
    """
    size = [POINTS * cells for cells in grid_hw]
    scales = [None if step is None else POINTS / step for step in stride]
    # with scales, which F.interpolate does not take together with a size
    points = torch.ops.aten._upsample_nearest_exact2d.default(values.float()[None, None], size, *scales)
    return points[0, 0].to(values.dtype)


def cell_shares(
    labels: Tensor, classes: int, grid_hw: Sequence[int], stride: tuple[float, float] | tuple[None, None] = (None, None)
) -> Tensor:
    """Share of each class among a cell's points, (H, W) -> (K, h*w); points without a label have no class.

    ``labels``: whole numbers from 0, -1 for none. ``stride``: as for :func:`points_of_cells`.
    """
    points = points_of_cells(labels, grid_hw, stride)[None]
    one_hot = torch.zeros(classes + 1, *points.shape[1:])
    one_hot.scatter_(0, points % (classes + 1), 1.0)  # -1 goes to the last channel
    return reduce(one_hot[:classes], "k (h rows) (w columns) -> k (h w)", "mean", rows=POINTS, columns=POINTS)


def cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """The sum over cells of the cross-entropy to shares of classes: two tensors (n, K, ...) -> a number."""
    return -(shares * logits.log_softmax(1)).sum()
