"""Copies of feature maps to the CPU, in little memory."""

import torch
from torch import Tensor

_CHANNELS = 32  # that are put in order at a time


def to_host(features: Tensor) -> Tensor:
    """A map (D, H, W) on the CPU; from another device a contiguous one, put in order there, some channels at a time."""
    return features if features.device.type == "cpu" else copy_by_channels(features)


def copy_by_channels(features: Tensor) -> Tensor:
    """A contiguous copy of a map (D, H, W) on the CPU, through little more memory of the map's own device."""
    copied = torch.empty(features.shape, dtype=features.dtype)
    for target, part in zip(copied.split(_CHANNELS), features.split(_CHANNELS), strict=True):
        target.copy_(part.contiguous())
    return copied


def crop(features: Tensor, map_hw: tuple[int, int]) -> Tensor:
    """The first cells of a map (D, H, W) as a contiguous tensor of its own on the CPU: (D, *map_hw).

    A map that is contiguous on the CPU and shares its memory with nothing is cut in place, without a second one.
    """
    height, width = map_hw
    alone = features.device.type == "cpu" and features.untyped_storage().nbytes() == features.nbytes
    if not alone or not features.is_contiguous():
        return features[:, :height, :width].cpu().clone(memory_format=torch.contiguous_format)
    cells = features.view(-1)[: features.shape[0] * height * width].view(-1, height, width)
    if map_hw != tuple(features.shape[1:]):
        for source, target in zip(features, cells, strict=True):  # a channel never reaches into the next one's place
            target.copy_(source[:height, :width].clone())
    return cells
