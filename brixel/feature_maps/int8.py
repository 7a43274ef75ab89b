"""Features as eight-bit integers with a scale for each channel: what files hold; maps in memory hold their values.

Shapes: D channels; cells along any further axes.
"""

import torch
from torch import Tensor

from brixel.errors import BrixelError

_LARGEST = 127  # -128 is not used, so that the range is symmetric


def int8_scales(features: Tensor) -> Tensor:
    """The scale of every channel of features (D, ...), the largest magnitude / 127: (D,), float32 on the CPU.

    Raises:
        BrixelError: Values are not finite.
    """
    if features[0].numel() == 0:
        return torch.ones(len(features), dtype=torch.float32)
    cells = tuple(range(1, features.ndim))
    largest = torch.maximum(features.amax(cells), -features.amin(cells)).float().cpu()  # no copy of the features
    if not largest.isfinite().all():
        raise BrixelError("features that are not finite cannot become int8; mend those cells first, or leave int8 out")
    scales = largest / _LARGEST
    return torch.where(scales > 0, scales, 1.0)


def int8_codes(features: Tensor, scales: Tensor) -> Tensor:
    """The multiples of the scales (D,) that are nearest to features (D, ...): int8."""
    return _multiples(features, scales).to(torch.int8)


def int8_values(codes: Tensor, scales: Tensor) -> Tensor:
    """The features of codes (D, ...) and scales (D,): float32; :func:`int8_codes` gives the same codes again."""
    return codes.float().mul_(_per_channel(scales, codes))


def rounded_to_int8(features: Tensor, scales: Tensor) -> Tensor:
    """:func:`int8_values` of :func:`int8_codes`, without the codes."""
    return _multiples(features, scales).float().mul_(_per_channel(scales, features))


def _multiples(features: Tensor, scales: Tensor) -> Tensor:
    """The codes as float32 (as float64 of features in float64)."""
    return (features / _per_channel(scales, features)).round_().clamp_(-_LARGEST, _LARGEST)


def _per_channel(scales: Tensor, features: Tensor) -> Tensor:
    return scales.to(features.device).view(-1, *[1] * (features.ndim - 1))
