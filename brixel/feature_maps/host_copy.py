"""Copies of feature maps to the CPU, in little memory."""

import torch
from torch import Tensor

_CHANNELS = 32  # copied at a time
_ON_HOST = ("cpu", "meta")  # tensors without data, by which memory is planned, count as the host's


def to_host(features: Tensor) -> Tensor:
    """A map (D, H, W) on the CPU: as it is if it lies there, else a contiguous copy (:func:`copy_by_channels`)."""
    return features if features.device.type in _ON_HOST else copy_by_channels(features)


def copy_by_channels(features: Tensor) -> Tensor:
    """A contiguous copy of a map (D, H, W) on the CPU; channels are reordered on the map's device, some at a time."""
    copied = torch.empty(features.shape, dtype=features.dtype, device="cpu")
    for target, source in zip(copied.split(_CHANNELS), features.split(_CHANNELS), strict=True):
        target.copy_(source.contiguous())
    return copied


def crop(features: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """The upper left cells of a map (D, H, W) as a contiguous tensor on the CPU that shares no memory: (D, *map_hw).

    A map that is contiguous on the CPU and shares its memory with nothing is cropped in place, without a copy.
    """
    height, width = map_hw
    is_on_host = features.device.type in _ON_HOST
    is_alone = is_on_host and features.untyped_storage().nbytes() == features.nbytes
    if not is_alone or not features.is_contiguous():
        part = features[:, :height, :width]
        return (part if is_on_host else part.cpu()).clone(memory_format=torch.contiguous_format)
    cells = features.view(-1)[: features.shape[0] * height * width].view(-1, height, width)
    if map_hw != tuple(features.shape[1:]):
        for source, target in zip(features, cells, strict=True):  # a channel is never written over the next one
            target.copy_(source[:height, :width].clone())
    return cells
