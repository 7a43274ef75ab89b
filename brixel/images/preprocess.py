"""Preprocessing of an image for a model, and the feature map of the model's output."""

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
from brixel.utils.torch_defaults import plain_defaults

_BICUBIC: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}


@dataclass(frozen=True)
class ImagePlacement:
    """The position of an image on the patch grid, which turns a model's output into a feature map of the image.

    Args:
        patch_grid: The sizes of the image before and after preprocessing.
        meta: Texts for the ``meta`` of its feature maps.
    """

    patch_grid: PatchGrid
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def geometry(self) -> PatchGrid:
        """The name of ``patch_grid`` in version 0.1."""
        return self.patch_grid

    def feature_map(
        self,
        features: Tensor,
        *,
        meta: Mapping[str, str] | None = None,
        in_place: bool = False,
        as_view: bool = False,
    ) -> FeatureMap:
        """Make the feature map of the image from a model's output: remove the padding, and attach the geometry.

        Args:
            features: (D, u h, u w) for the h x w patches of the padded image and u cells per side of a patch, on any
                device: u is 4 for the dense map, 1 for the backbone's own.
            meta: More texts for the map's ``meta``.
            in_place: Reuse the memory of ``features``, which must not be used afterwards.
            as_view: Leave the features where they are: the map is a part of them, and gradients flow through it.

        Returns:
            The map, on the CPU; ``as_view``, on the device of ``features``.

        Raises:
            BrixelError: The features have another shape than the patches of this image.
        """
        grid = self.patch_grid
        patches_hw = tuple(side_px // grid.patch_px for side_px in grid.padded_hw)
        upscale = features.shape[-1] // patches_hw[1] if features.ndim == 3 else 0
        if upscale < 1 or features.shape[1:] != (upscale * patches_hw[0], upscale * patches_hw[1]):
            raise BrixelError(
                f"features have shape {tuple(features.shape)}; expected (D, 4h, 4w) for the {patches_hw[0]} x "
                f"{patches_hw[1]} patches of this image, without a batch's axis: give features[i]"
            )
        height, width = grid.map_hw(upscale)
        part = features[:, :height, :width]
        cells = part if as_view else crop(features, (height, width)) if in_place else part.detach().cpu().clone()
        return FeatureMap(cells, grid.image_hw, grid.map_stride(upscale), {**self.meta, **(meta or {})})


@dataclass(frozen=True)
class Preprocessor:
    """Reads, resizes, normalises and pads images for a model; small, and without the model, for DataLoader workers.

    Args:
        patch_px: Side of a patch in pixels.
        short_side_px: Length of the short side after resizing, in pixels, or "native".
        mean: Mean of red, green and blue, for pixels in [0, 1].
        std: Standard deviation of red, green and blue.
        meta: Texts for the ``meta`` of feature maps.
    """

    patch_px: int
    short_side_px: int | str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    meta: Mapping[str, str] = field(default_factory=dict)

    @plain_defaults()
    def __call__(
        self, image: ImageInput, check: Callable[[tuple[int, int]], None] | None = None
    ) -> tuple[Tensor, ImagePlacement]:
        """Preprocess one image.

        Args:
            image: A path, PIL image, array, tensor or frame, as :func:`brixel.images.load.load_image` takes it.
            check: Called with the padded height and width before the image is decoded; may raise to refuse them.

        Returns:
            Normalised pixels (3, H, W), float32, H and W multiples of ``patch_px``; and the image's placement.

        Raises:
            MissingFileError: There is no such file.
            ImageError: The image cannot be read or used.
        """
        with open_image(image) as source:
            try:
                grid = plan_patch_grid(source.image_hw, self.patch_px, self.short_side_px)
                if check is not None:
                    check(grid.padded_hw)
            except (ImageError, MemoryLimitError) as error:  # their messages do not name the file
                if not isinstance(image, (str, os.PathLike)):
                    raise
                raise type(error)(f"{os.fspath(image)}: {error}") from error
            rgb, meta = source.read(grid.resized_hw), source.meta
        del source  # frees the image that Pillow decoded
        height, width = grid.resized_hw
        placement = ImagePlacement(grid, {**self.meta, **meta, "resized_hw": f"{height}x{width}"})
        return resize_normalise_pad(rgb, grid, self.mean, self.std), placement


def resize_normalise_pad(rgb: Tensor, grid: PatchGrid, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize, normalise and pad an image for the patch grid.

    Bicubic interpolation with antialiasing, clamped to [0, 1]; the padding at the bottom and right repeats the edge.
    Channels are processed one by one, so that a large uint8 image is not converted to floats as a whole.

    ``rgb`` is the image of ``grid`` or a JPEG reduction of it, (3, H, W), uint8 or float32 in [0, 1]. Returns float32
    (3, padded_h, padded_w).
    """
    reduction = _reduction(rgb, grid)
    height_px, width_px = grid.resized_hw
    padded = torch.empty(3, *grid.padded_hw, dtype=torch.float32, device="cpu")
    for channel, target, channel_mean, channel_std in zip(rgb, padded, mean, std, strict=True):
        inner = target[:height_px, :width_px]
        inner.copy_(_resized(channel, grid, reduction))
        inner.clamp_(0, 1).sub_(channel_mean).div_(channel_std)
        target[:height_px, width_px:] = inner[:, -1:]
        target[height_px:] = target[height_px - 1]
    return padded


def _resized(channel: Tensor, grid: PatchGrid, reduction: int) -> Tensor:
    """One channel (H, W), uint8 or float32, as float32 of `resized_hw`; the bicubic filter may overshoot [0, 1]."""
    values = channel.float().div_(255) if channel.dtype == torch.uint8 else channel
    if values.shape == grid.resized_hw:
        return values
    values, (height_px, width_px) = values[None, None], grid.resized_hw  # 1 1 H W
    if reduction == 1:
        return F.interpolate(values, (height_px, width_px), **_BICUBIC)[0, 0]
    # a reduced image may extend beyond the original's edge, so the scale does not follow from the shapes
    scale = [
        (1 + 1e-9) * reduction * resized_px / image_px  # rather a row too many, which is cut off, than one too few
        for resized_px, image_px in zip(grid.resized_hw, grid.image_hw, strict=True)
    ]
    return F.interpolate(values, scale_factor=scale, **_BICUBIC)[0, 0, :height_px, :width_px]


def _reduction(rgb: Tensor, grid: PatchGrid) -> int:
    """The reduction at which a JPEG was decoded; 1 for other images."""
    for reduction in REDUCTIONS:
        if rgb.shape == (3, *(-(-side_px // reduction) for side_px in grid.image_hw)):
            return reduction
    raise AssertionError(f"{tuple(rgb.shape)} does not fit {grid}")
