"""What a probe is fitted to, as users give it: masks, values of pixels and clicks, checked against their images.

Shapes: H x W pixels of an image or a mask, N clicks.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.load import ImageInput, open_image
from brixel.images.target_files import check_aspect, read_floats, read_numbers, same_aspect
from brixel.utils.fields import short_repr

PixelTarget: TypeAlias = str | os.PathLike[str] | npt.NDArray[Any] | Tensor
"""A mask or values of pixels: an array or tensor (H, W), or a file."""

Click: TypeAlias = Sequence[float]
"""(y, x, class): a point of an image in pixels, as in :meth:`FeatureMap.at`, and its class."""


def read_mask(mask: PixelTarget) -> Tensor:
    """The numbers of a mask, (H, W), int64. BrixelError for anything but whole numbers for pixels."""
    if isinstance(mask, str | os.PathLike):
        return read_numbers(Path(mask))
    array = _array(mask, "a mask")
    if array.dtype.kind not in "biu":
        raise BrixelError(f"a mask is an array of {array.dtype}; expected whole numbers, a class for every pixel")
    return torch.from_numpy(array.astype(np.int64))


def read_values(values: PixelTarget, png_unit: float, ignored: float | None) -> Tensor:
    """The values of pixels, (H, W), float32, NaN where there is none.

    ``png_unit``: the value of 1 in a PNG of 16 bits, where 0 is none. ``ignored``: a number that means none.
    """
    if not isinstance(values, str | os.PathLike):
        array = _array(values, "the values of an image")
        if array.dtype.kind not in "iuf":
            raise BrixelError(f"the values of an image are an array of {array.dtype}; expected numbers")
        found = torch.from_numpy(array.astype(np.float32))
    elif Path(values).suffix.lower() == ".npy":
        found = read_floats(Path(values)).clone()
    else:
        numbers = read_numbers(Path(values), deep="a number that png_unit scales")
        found = torch.where(numbers == 0, torch.nan, numbers.float() * png_unit)
    found[~found.isfinite()] = torch.nan
    if ignored is not None:
        found[found == ignored] = torch.nan
    return found


def _image_hw(image: ImageInput | FeatureMap) -> tuple[int, int]:
    """Upright height and width of an image in pixels."""
    if isinstance(image, FeatureMap):
        return image.image_hw
    with open_image(image) as opened:
        return opened.image_hw


def check_fits(image: ImageInput | FeatureMap, target: PixelTarget, target_hw: Sequence[int], number: int) -> None:
    """Raise BrixelError where a mask or values do not have the aspect of their image, which comes as ``number``."""
    if isinstance(image, str | os.PathLike) and isinstance(target, str | os.PathLike):
        return check_aspect(Path(image), Path(target), target_hw)
    image_hw = _image_hw(image)
    if not same_aspect(image_hw, target_hw):
        image_px, target_px = (" x ".join(map(str, size)) for size in (image_hw, target_hw))
        raise BrixelError(
            f"image {number} has {image_px} px upright, its target has {target_px}: different aspects, so they cannot "
            "belong together; expected (H, W) of the image, or of the image resized"
        )


def read_clicks(
    clicks: Sequence[Click], image: ImageInput | FeatureMap, number: int
) -> tuple[npt.NDArray[np.float64], list[int]]:
    """The points (N, 2) and classes of the clicks on an image, which comes as ``number``."""
    if not len(clicks):
        return np.zeros((0, 2)), []
    points, classes, image_hw = [], [], _image_hw(image)
    for click in clicks:
        try:
            y, x, label = click
            point = (float(y), float(x))
            if label != int(label) or isinstance(label, str | bool):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise BrixelError(
                f"a click on image {number} is {short_repr(click)}; expected (y, x, class), the class a whole number"
            ) from error
        if not all(0 <= at <= side for at, side in zip(point, image_hw, strict=True)):
            raise BrixelError(
                f"a click on image {number} is at {point}, outside the image: expected (y, x) from (0, 0) to {image_hw}"
            )
        points.append(point)
        classes.append(int(label))
    return np.array(points), classes


def check_count(images: Sequence[object], targets: object, what: str) -> Sequence[Any]:
    """The targets, one for each image; BrixelError for another number, or for what is no sequence."""
    if isinstance(targets, str | bytes) or not isinstance(targets, Sequence | np.ndarray | Tensor):
        raise BrixelError(f"{what} are {short_repr(targets)}; expected a list with one entry for each image")
    if len(targets) != len(images):
        raise BrixelError(f"{len(images)} images and {len(targets)} {what}; expected one for each image")
    return targets  # type: ignore[return-value]


def _array(target: object, what: str) -> npt.NDArray[Any]:
    """An array or tensor (H, W) as array."""
    if isinstance(target, Tensor):
        target = target.detach().cpu().numpy()
    if not isinstance(target, np.ndarray):
        raise BrixelError(f"{what} is a {type(target).__name__}; expected an array (H, W) or a path")
    if target.ndim != 2 or 0 in target.shape:
        raise BrixelError(f"{what} has shape {target.shape}; expected (H, W), one number for each pixel")
    return target
