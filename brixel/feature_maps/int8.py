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
    if not features.isfinite().all():
        raise BrixelError("features that are not finite cannot become int8; mend those cells first, or leave int8 out")
    if features[0].numel() == 0:
        return torch.ones(len(features))
    largest = features.flatten(1).abs().amax(1).float().cpu()
    scales = largest / _LARGEST
    return torch.where(scales > 0, scales, 1.0)


def int8_codes(features: Tensor, scales: Tensor) -> Tensor:
    """The multiples of the scales (D,) that are nearest to features (D, ...): int8."""
    codes = features.to(torch.promote_types(features.dtype, torch.float32)) / _per_channel(scales, features)
    return codes.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)


def int8_values(codes: Tensor, scales: Tensor) -> Tensor:
    """The features of codes (D, ...) and scales (D,): float32; :func:`int8_codes` gives the same codes again."""
    return codes.float() * _per_channel(scales, codes)


def _per_channel(scales: Tensor, features: Tensor) -> Tensor:
    return scales.to(features.device).view(-1, *[1] * (features.ndim - 1))
