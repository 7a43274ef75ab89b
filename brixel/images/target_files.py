"""Files of targets: whole numbers, colours or floats for every pixel, and whether they lie on the image as it is seen.

Shapes: H x W pixels.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, ImageError
from brixel.images.decode import exif_orientation, jpeg_hw, open_image_file
from brixel.utils.npy_files import open_npy
from brixel.utils.structured_files import checking_content

_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_NUMBERS = ("1", "L", "P", *_SIXTEEN_BITS)
_COLOURS = ("RGB", "RGBA")
_WHITE = 128  # from here on, in a mask of black and white
_GREY = (64, 192)  # what a JPEG of black and white has along outlines alone
_MOST_GREY = 0.1  # share of such pixels
_LOG = logging.getLogger("brixel")


def read_numbers(path: Path, *, deep: str = "") -> Tensor:
    """An image of one number per pixel, without applying a palette: (H, W), int64.

    ``deep``: what a file of 16 bits has in every pixel, where one of 8 bits is refused.
    """
    with _decoded(path) as image:
        if image.mode not in _NUMBERS:
            raise BrixelError(
                f"{path} has mode {image.mode}; expected one whole number per pixel (grey or palette){_hint(image)}"
            )
        if deep and image.mode not in _SIXTEEN_BITS:
            raise BrixelError(f"{path} has mode {image.mode}, 8 bits; expected 16 bits with {deep}")
        return torch.from_numpy(np.asarray(image).astype(np.int64))


def read_black_and_white(path: Path) -> Tensor:
    """An image of black and white, 1 where it is white: (H, W), int64. It may be a JPEG, whose greys are rounded."""
    with _decoded(path, exact=False) as image:
        values: npt.NDArray[Any] = np.asarray(image.convert("L"))
    between = ((values >= _GREY[0]) & (values < _GREY[1])).mean()
    if between > _MOST_GREY or (values.max(initial=0) < _GREY[0] and values.any()):
        raise BrixelError(
            f"{path} is no mask of black and white: {between:.0%} of its pixels are grey, and the brightest is "
            f"{values.max()}; expected 0 and 255"
        )
    return torch.from_numpy((values >= _WHITE).astype(np.int64))


def read_palette(path: Path) -> "npt.NDArray[np.uint8] | None":
    """The colours of a palette by number, (K, 3); None for an image without one."""
    with _decoded(path) as image:
        colours = image.getpalette("RGB") if image.mode == "P" else None
    return None if colours is None else np.array(colours, np.uint8).reshape(-1, 3)


def read_colours(path: Path) -> Tensor:
    """An image of three numbers per pixel: (H, W, 3), float32 from 0 to 255."""
    with _decoded(path) as image:
        if image.mode not in _COLOURS:
            raise BrixelError(f"{path} has mode {image.mode}; expected three numbers per pixel (RGB)")
        return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32))


def read_floats(path: Path, channels: Sequence[int] = ()) -> Tensor:
    """The floats in a `.npy` file: (H, W), or (H, W, C) where ``channels`` is [C]; float32."""
    with checking_content(path, "an array of measurements", "write it again with numpy.save"):
        array = open_npy(path)
    other_numbers = array.dtype.kind != "f" or array.dtype.itemsize > 8
    if other_numbers or array.ndim != 2 + len(channels) or array.shape[2:] != tuple(channels):
        expected = ", ".join(["H", "W", *map(str, channels)])
        raise BrixelError(f"{path} contains {array.dtype} {array.shape}; expected floats ({expected})")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).float()


def check_aspect(image: Path, target: Path, target_hw: Sequence[int]) -> None:
    """Raise BrixelError where a target does not have the aspect of its image, turned upright by its EXIF data."""
    image_hw, orientation = _upright(image)
    if not same_aspect(image_hw, target_hw):
        image_px, target_px = (" x ".join(map(str, size)) for size in (image_hw, target_hw))
        turned = same_aspect(image_hw[::-1], target_hw)
        hint = f"; the EXIF orientation {orientation} of the image is applied" if turned and orientation != 1 else ""
        raise BrixelError(
            f"{image} has {image_px} px upright, {target} has {target_px}: different aspects, so "
            f"they cannot belong together; rotate or crop one like the other{hint}"
        )
    if orientation != 1 and (orientation < 5 or image_hw[0] == image_hw[1]):
        _warn_once(str(image.parent), image.name, orientation)


@functools.cache
def _warn_once(folder: str, name: str, orientation: int) -> None:
    _LOG.warning(
        "images in %s, such as %s, are turned by their EXIF orientation (%d), and their targets are taken to be drawn "
        "on the turned image: the sizes cannot tell",
        *(folder, name, orientation),
    )


def _upright(path: Path) -> tuple[tuple[int, int], int]:
    """Upright height and width of an image, and its EXIF orientation."""
    with open_image_file(str(path)) as image:
        upright_hw, orientation = jpeg_hw(image), exif_orientation(image)
        if upright_hw is None:  # other formats have to be decoded; Pillow itself turns some of them
            _load(image, path)
            left = exif_orientation(image)
            upright_hw = image.size if left >= 5 else image.size[::-1]
            orientation = orientation if left == 1 else left
    return upright_hw, orientation


def same_aspect(one_hw: Sequence[int], other_hw: Sequence[int]) -> bool:
    """Whether one is the other resized to whole pixels."""
    return abs(one_hw[0] * other_hw[1] - one_hw[1] * other_hw[0]) <= max(sum(one_hw), sum(other_hw))


@contextmanager
def _decoded(path: Path, *, exact: bool = True) -> Iterator[Image.Image]:
    """An image file whose numbers are stored as they lie on the image, and ``exact``. BrixelError for any other."""
    with open_image_file(str(path)) as image:
        _load(image, path)
        if exact and image.format in ("JPEG", "MPO"):
            raise ImageError(f"{path} is a JPEG, whose compression changes the numbers in it; export it as PNG")
        if (orientation := exif_orientation(image)) != 1:
            raise ImageError(
                f"{path} has the EXIF orientation {orientation}, which programs apply or do not; export it without, as "
                "it lies on the image"
            )
        yield image


def _load(image: Image.Image, path: Path) -> None:
    """Decode an image. Pillow's readers raise nearly anything on damaged data."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{path} cannot be decoded ({reason}); fetch or export it again") from error


def _hint(image: Image.Image) -> str:
    """What a mask of several channels may be; opens with a separator."""
    if image.mode not in _COLOURS:
        return ""
    channels: npt.NDArray[Any] = np.asarray(image.convert("RGB"))
    if (channels == channels[..., :1]).all():
        return "; its channels are equal: save one of them"
    return "; this looks like a mask for people, with a colour for each class"
