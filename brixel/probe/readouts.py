"""Linear readouts of frozen features: channels standardised, then one 1x1 convolution.

Shapes: B batch, D channels, C outputs, h x w cells.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from brixel.errors import BrixelError


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


def linear_readout(width: int, outputs: int) -> nn.Conv2d:
    """One 1x1 convolution, initialised with zeros."""
    layer = nn.Conv2d(width, outputs, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ChannelStatistics:
    """Mean and deviation of each channel of maps, a batch at a time.

    Sums are taken around the mean of the first batch, so that a large mean does not drown a small deviation.
    """

    def __init__(self) -> None:
        self._count = 0
        self._around, self._total, self._squares = torch.zeros(1), torch.zeros(1), torch.zeros(1)

    def add(self, maps: Tensor) -> None:
        """Count the cells of maps (B, D, h, w) in."""
        cells = rearrange(maps.double(), "b d h w -> d (b h w)")
        if not self._count:
            self._around = cells.mean(1)
        cells = cells - self._around[:, None]
        self._count += cells.shape[1]
        self._total, self._squares = self._total + cells.sum(1), self._squares + cells.square().sum(1)

    def standardised(self) -> Standardised:
        """What standardises the channels of all maps together. BrixelError where they are not finite."""
        offset = self._total / self._count
        if not (offset.isfinite().all() and self._squares.isfinite().all()):
            raise BrixelError("features hold values that are not finite; leave such images out")
        deviation = (self._squares / self._count - offset.square()).clamp(min=0).sqrt()
        return Standardised((self._around + offset).float(), deviation.clamp(min=1e-6).float())


def standardised(batches: Iterable[Tensor]) -> Standardised:
    """What standardises the channels of maps (B, D, h, w)."""
    statistics = ChannelStatistics()
    for maps in batches:
        statistics.add(maps)
    return statistics.standardised()


def standardised_readout(scale: Standardised, weight: Tensor, bias: Tensor) -> nn.Sequential:
    """A linear readout of standardised channels, from weights (C, D) and biases (C,); frozen, in float32."""
    outputs, width = weight.shape
    layer = linear_readout(width, outputs)
    layer.weight.data.copy_(weight[:, :, None, None])
    assert layer.bias is not None
    layer.bias.data.copy_(bias)
    return nn.Sequential(scale, layer.float()).eval().requires_grad_(False)
