"""Linear readouts of frozen features: channels standardised, then one 1x1 convolution.

Shapes: B batch, D channels, C outputs, h x w cells.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn


class Standardised(nn.Module):
    """Channels less a fixed mean and over a fixed deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("deviation", deviation[:, None, None])

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) -> the same shape."""
        return (maps - self.mean) / self.deviation


def linear_readout(width: int, outputs: int) -> nn.Module:
    """One 1x1 convolution, initialised with zeros."""
    layer = nn.Conv2d(width, outputs, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def standardised(batches: Iterable[Tensor]) -> Standardised:
    """Mean and deviation of each channel of maps (B, D, h, w), a batch at a time.

    Sums are taken around the mean of the first batch, so that a large mean does not drown a small deviation.
    """
    count, around, total, squares = 0, torch.zeros(1), torch.zeros(1), torch.zeros(1)
    for maps in batches:
        cells = rearrange(maps.double(), "b d h w -> d (b h w)")
        if not count:
            around = cells.mean(1)
        cells = cells - around[:, None]
        count, total, squares = count + cells.shape[1], total + cells.sum(1), squares + cells.square().sum(1)
    offset = total / count
    deviation = (squares / count - offset.square()).clamp(min=0).sqrt()
    return Standardised((around + offset).float(), deviation.clamp(min=1e-6).float())
