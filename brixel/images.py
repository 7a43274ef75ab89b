"""Pictures in: read a file, a PIL image, an array or a tensor, and lay it on the patch grid.

Shapes: H, W height and width in pixels. Colours are taken as sRGB; ICC profiles are not applied.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from brixel.decoding import REDUCTIONS, from_pil, jpeg_hw, opened_file, reduce
from brixel.errors import ImageError
from brixel.geometry import Geometry
from brixel.pixels import from_array, from_tensor

_BICUBIC: dict[str, Any] = {"mode": "bicubic", "antialias": True, "align_corners": False}

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""What `load_image` reads."""


def load_image(image: ImageInput) -> Tensor:
    """The picture as an RGB tensor (3, H, W) on the CPU: uint8, or float32 in [0, 1] where it came deeper.

    A path or PIL image may have any mode. EXIF orientation is applied, transparency laid over white, 16-bit
    greys divided by 65535; of an animation the first frame is read (of a PIL image the frame it stands at).
    An array is (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1]; a tensor is (3, H, W), uint8 or floats
    in [0, 1], and not copied where it fits. The input is left as it was.
    Raises `FileNotFoundError` for a missing file, `ImageError` for all else that cannot be used.
    """
    with opened(image) as picture:
        return picture.read(picture.image_hw)


def _load(image: ImageInput) -> Tensor:
    """Of what is no path."""
    if isinstance(image, Image.Image):
        return from_pil(image, getattr(image, "filename", "") or "PIL image")
    if isinstance(image, np.ndarray):
        return from_array(image)
    if isinstance(image, Tensor):
        return from_tensor(image)
    hint = ", or for the bytes of a file PIL.Image.open(io.BytesIO(data))" if isinstance(image, bytes) else ""
    raise ImageError(
        f"one picture cannot be a {type(image).__name__}; "
        f"give a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W){hint}"
    )


@dataclass(frozen=True)
class Picture:
    """A picture whose size is known, upright, and how its planes (3, H, W) are had: see `load_image`.

    ``read(wanted_hw)``: of its size, or smaller where it is a JPEG file of which far fewer pixels are wanted.
    """

    image_hw: tuple[int, int]
    read: Callable[[tuple[int, int]], Tensor]


@contextmanager
def opened(image: ImageInput) -> Iterator[Picture]:
    """A picture of any kind; of a JPEG file nothing is decoded before it is read. Raises as `load_image` does."""
    if not isinstance(image, (str, os.PathLike)):
        planes = _load(image)
        yield _whole(planes)
        return
    path = os.fspath(image)
    with opened_file(path) as file:
        image_hw = jpeg_hw(file, path)
        if image_hw is None:
            yield _whole(from_pil(file, path))
        else:
            yield Picture(image_hw, lambda wanted_hw: _reduced(file, path, wanted_hw))


def _whole(planes: Tensor) -> Picture:
    return Picture((planes.shape[1], planes.shape[2]), lambda _: planes)


def _reduced(file: Image.Image, path: str, wanted_hw: tuple[int, int]) -> Tensor:
    reduce(file, wanted_hw)
    return from_pil(file, path)


def preprocess(image: Tensor, geometry: Geometry, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Lay a picture on the patch grid: float32 (3, padded_h, padded_w), normalised.

    `image`: planes from `load_image`, or what `Picture.read` made of them for `geometry.resized_hw`. Resized by bicubic
    interpolation with antialiasing, clamped to [0, 1], normalised by `mean` and `std` (one number per channel),
    padded at the bottom and right by repeating the edge. One channel is worked on at a time, so that a large uint8
    picture is not turned into floats as a whole; the numbers are the same.
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


def _resized(channel: Tensor, geometry: Geometry, reduction: int) -> Tensor:
    """One channel (H, W), uint8 or float32, as float32 of `resized_hw`; a bicubic may overshoot [0, 1]."""
    plane = channel.float().div_(255) if channel.dtype == torch.uint8 else channel
    if plane.shape == geometry.resized_hw:
        return plane
    plane, (height_px, width_px) = plane[None, None], geometry.resized_hw  # (1, 1, H, W)
    if reduction == 1:
        return F.interpolate(plane, (height_px, width_px), **_BICUBIC)[0, 0]
    # the last pixels of a reduced picture may reach over its edge, so that the scale is not that of the shapes
    scale = [
        (1 + 1e-9) * reduction * wanted_px / image_px  # for rounding: a row too many can be cut, one too few not mended
        for wanted_px, image_px in zip(geometry.resized_hw, geometry.image_hw, strict=True)
    ]
    return F.interpolate(plane, scale_factor=scale, **_BICUBIC)[0, 0, :height_px, :width_px]


def _reduction(image: Tensor, geometry: Geometry) -> int:
    """By how much a JPEG was reduced when it was decoded."""
    for reduction in REDUCTIONS:
        if image.shape == (3, *(-(-side_px // reduction) for side_px in geometry.image_hw)):
            return reduction
    raise AssertionError(f"{tuple(image.shape)} does not fit {geometry}")
