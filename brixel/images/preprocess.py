"""An image made ready for a model, and a map made of what the model gives: for those with a loop of their own."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError, ImageError, MemoryLimitError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.host_copy import crop
from brixel.images.decode import REDUCTIONS
from brixel.images.load import ImageInput, open_image
from brixel.images.patch_grid import PatchGrid, plan_patch_grid

_BICUBIC: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}


@dataclass(frozen=True)
class ImagePlacement:
    """How an image lies on the patch grid, and what a map of it tells of how it was made."""

    geometry: PatchGrid
    meta: Mapping[str, str] = field(default_factory=dict)

    def feature_map(
        self, features: Tensor, *, meta: Mapping[str, str] | None = None, in_place: bool = False
    ) -> FeatureMap:
        """The map of the image, on the CPU, from the features (D, u h, u w) of its padded h x w patches.

        ``u`` cells to a patch's side: 4 of the dense map, 1 of the backbone's own. ``meta``: more to tell.
        ``in_place``: ``features`` are not needed any more, and may be cut without a second copy of them.
        Raises BrixelError where the features are not those of this image's size.
        """
        geometry = self.geometry
        patches_hw = tuple(side // geometry.patch_px for side in geometry.padded_hw)
        upscale = features.shape[-1] // patches_hw[1] if features.ndim == 3 else 0
        if upscale < 1 or features.shape[1:] != (upscale * patches_hw[0], upscale * patches_hw[1]):
            raise BrixelError(
                f"features have shape {tuple(features.shape)}; expected (D, 4h, 4w) for the {patches_hw[0]} x "
                f"{patches_hw[1]} patches of this image, without a batch's axis: give features[i]"
            )
        height, width = geometry.map_hw(upscale)
        cells = crop(features, (height, width)) if in_place else features[:, :height, :width].detach().cpu().clone()
        return FeatureMap(cells, geometry.image_hw, geometry.map_stride(upscale), {**self.meta, **(meta or {})})


@dataclass(frozen=True)
class Preprocessor:
    """What is done to every image before a model: a small callable without the model, for workers of a DataLoader.

    ``short_side_px``: pixels, or "native".
    """

    patch_px: int
    short_side_px: int | str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    meta: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self, image: ImageInput, check: Callable[[tuple[int, int]], None] | None = None
    ) -> tuple[Tensor, ImagePlacement]:
        """Normalised pixels (3, H, W), float32, H and W whole patches, and how the image lies on them.

        ``check`` may refuse that size before the pixels are made. Raises ImageError for an image that cannot be used.
        """
        with open_image(image) as source:
            try:
                geometry = plan_patch_grid(source.image_hw, self.patch_px, self.short_side_px)
                if check is not None:
                    check(geometry.padded_hw)
            except (ImageError, MemoryLimitError) as error:  # which know of a size alone
                if not isinstance(image, (str, os.PathLike)):
                    raise
                raise type(error)(f"{os.fspath(image)}: {error}") from error
            planes = source.read(geometry.resized_hw)
        del source  # what Pillow decoded is free before the planes are worked on
        height, width = geometry.resized_hw
        placement = ImagePlacement(geometry, {**self.meta, "resized_hw": f"{height}x{width}"})
        return preprocess(planes, geometry, self.mean, self.std), placement


def preprocess(image: Tensor, geometry: PatchGrid, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Lay an image on the patch grid: float32 (3, padded_h, padded_w), normalised.

    `image`: planes from `load_image`, or what `Image.read` made of them for `geometry.resized_hw`. Resized by bicubic
    interpolation with antialiasing, clamped to [0, 1], normalised by `mean` and `std` (one number per channel),
    padded at the bottom and right by repeating the edge. One channel is worked on at a time, so that a large uint8
    image is not turned into floats as a whole; the numbers are the same.
    """
    reduction = _reduction(image, geometry)
    height_px, width_px = geometry.resized_hw
    padded = torch.empty(3, *geometry.padded_hw)  # (3, padded_h, padded_w)
    for channel, target, channel_mean, channel_std in zip(image, padded, mean, std, strict=True):
        inner = target[:height_px, :width_px]
        inner.copy_(_resized(channel, geometry, reduction))
        inner.clamp_(0, 1).sub_(channel_mean).div_(channel_std)
        target[:height_px, width_px:] = inner[:, -1:]
        target[height_px:] = target[height_px - 1]
    return padded


def _resized(channel: Tensor, geometry: PatchGrid, reduction: int) -> Tensor:
    """One channel (H, W), uint8 or float32, as float32 of `resized_hw`; a bicubic may overshoot [0, 1]."""
    plane = channel.float().div_(255) if channel.dtype == torch.uint8 else channel
    if plane.shape == geometry.resized_hw:
        return plane
    plane, (height_px, width_px) = plane[None, None], geometry.resized_hw  # (1, 1, H, W)
    if reduction == 1:
        return F.interpolate(plane, (height_px, width_px), **_BICUBIC)[0, 0]
    # the last pixels of a reduced image may reach over its edge, so that the scale is not that of the shapes
    scale = [
        (1 + 1e-9) * reduction * wanted_px / image_px  # for rounding: a row too many can be cut, one too few not mended
        for wanted_px, image_px in zip(geometry.resized_hw, geometry.image_hw, strict=True)
    ]
    return F.interpolate(plane, scale_factor=scale, **_BICUBIC)[0, 0, :height_px, :width_px]


def _reduction(image: Tensor, geometry: PatchGrid) -> int:
    """By how much a JPEG was reduced when it was decoded."""
    for reduction in REDUCTIONS:
        if image.shape == (3, *(-(-side_px // reduction) for side_px in geometry.image_hw)):
            return reduction
    raise AssertionError(f"{tuple(image.shape)} does not fit {geometry}")
