"""The pixels of a decoded PIL image as an RGB tensor, by its mode; modes without a known range are refused.

An image takes up to 4 bytes per pixel in Pillow and 3 (greys of more than 8 bits: 4) in the result. Both exist at once,
so everything else is done for some rows at a time.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from brixel.errors import ImageError
from brixel.images.from_arrays import range_hint
from brixel.images.stored_rows import are_stored, stored_rows

Array: TypeAlias = npt.NDArray[Any]

EIGHT_BITS = ("1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "La", "PA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
"""Modes that Pillow converts to RGB of 8 bits; deeper colours (PNG, TIFF, PPM) come as their upper 8 bits in these."""

DEEP_GREYS = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
"""Modes of greys with more than 8 bits, and the value of white."""

_BAND_PIXELS = 1 << 16

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _SUBFILE, _SUBSAMPLING = 258, 262, 339, 254, 530  # tags of TIFF
_SIGNED = 2
_WHITE_IS_ZERO, _YCBCR = 0, 6

_UPRIGHT: dict[int, Callable[[Array], Array]] = {  # EXIF orientation -> the upright array (C, H, W) as it is stored
    1: lambda upright: upright,
    2: lambda upright: upright[:, :, ::-1],
    3: lambda upright: upright[:, ::-1, ::-1],
    4: lambda upright: upright[:, ::-1],
    5: lambda upright: upright.swapaxes(1, 2),
    6: lambda upright: upright[:, :, ::-1].swapaxes(1, 2),
    7: lambda upright: upright[:, ::-1, ::-1].swapaxes(1, 2),
    8: lambda upright: upright[:, ::-1].swapaxes(1, 2),
}
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


def check_samples(image: Image.Image, name: str) -> None:
    """Raise ImageError for samples whose range or meaning is not known; before or after decoding."""
    if image.mode not in EIGHT_BITS and image.mode not in DEEP_GREYS:
        raise ImageError(f"{name}: has the mode {image.mode} in Pillow, which is not read; convert it to RGB")
    if not isinstance(image, TiffImageFile):
        return
    tags = image.tag_v2
    bits = max(tags.get(_BITS, (1,)))
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) and bits != 32:  # Pillow itself writes greys of mode I as signed
        raise ImageError(f"{name}: has signed samples of {bits} bits, whose range is not known; save them unsigned")
    if tags.get(_PHOTOMETRIC) == _YCBCR and image.info.get("compression") == "raw" and tags.get(_SUBSAMPLING) != (1, 1):
        raise ImageError(f"{name}: has YCbCr colours at a lower resolution, without compression; save it as RGB")
    if tags.get(_SUBFILE, 0) & 1:
        raise ImageError(f"{name}: begins with a thumbnail, as camera raw files do; export it as PNG or JPEG")


def correct_transparent_grey(image: Image.Image, name: str) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits as Pillow will scale its pixels; before decoding.

    Raises ImageError for a transparent colour of 16 bits a channel, which cannot be told apart in 8.
    """
    transparent = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or transparent is None or not image.tile:
        return
    layout = image.tile[0][3]
    if layout == "RGB;16B":
        raise ImageError(f"{name}: has a transparent colour of 16 bits a channel; save it with an alpha channel")
    white = {"L;2": 3, "L;4": 15}.get(str(layout))
    if white is not None and transparent <= white:
        image.info["transparency"] = transparent * 255 // white


def to_rgb_tensor(image: Image.Image, orientation: int, name: str) -> Tensor:
    """An image, turned upright: (3, H, W) uint8; of deep greys float32 in [0, 1], one channel seen three times.

    It is decoded, or its rows `are_stored`. Raises ImageError for values outside of the range of the mode.
    """
    upright_hw = image.size if orientation in SIDEWAYS else image.size[::-1]
    if image.mode in DEEP_GREYS:
        grey = np.empty((1, *upright_hw), np.float32)
        _write_deep_grey(image, _UPRIGHT[orientation](grey), name)
        return torch.from_numpy(grey).expand(3, -1, -1)
    rgb = np.empty((3, *upright_hw), np.uint8)
    stored = _UPRIGHT[orientation](rgb)  # a view: what is written to it lands in `rgb`
    for rows, band in _bands(image):
        stored[:, rows] = np.asarray(_over_white(band)).transpose(2, 0, 1)
    return torch.from_numpy(rgb)


def _value_bands(image: Image.Image) -> Iterator[tuple[slice, Array]]:
    if are_stored(image):
        return stored_rows(image, _band_height(image))
    return ((rows, np.asarray(band)) for rows, band in _bands(image))


def _band_height(image: Image.Image) -> int:
    return max(1, _BAND_PIXELS // image.width)


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image cut into bands of rows."""
    height = _band_height(image)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _over_white(image: Image.Image) -> Image.Image:
    """Any 8-bit mode as RGB, transparency over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # La converts to no other mode
    elif image.mode == "P":
        image = image.copy()  # converting changes the palette of the original
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _write_deep_grey(image: Image.Image, stored: Array, name: str) -> None:
    """Write an image of a deep grey to (1, H, W), float32, scaled to [0, 1]."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    white = 4095 if tags.get(_BITS) == (12,) else DEEP_GREYS[image.mode]
    inverted = isinstance(image, TiffImageFile) and tags.get(_PHOTOMETRIC, 0) == _WHITE_IS_ZERO
    transparent = image.info.get("transparency")  # the transparent grey of a PNG
    low, high = math.inf, -math.inf
    for rows, values in _value_bands(image):
        low, high = np.minimum(low, values.min()), np.maximum(high, values.max())  # NaN stays
        grey = stored[:, rows]
        np.divide(values, np.float32(white), out=grey, dtype=np.float32, casting="unsafe")
        if inverted:
            np.subtract(1, grey, out=grey)
        if transparent is not None:
            grey[:, values == transparent] = 1
    if not (low >= 0 and high <= white):
        floats = image.mode == "F"
        range_ = "floats must lie in [0, 1]" if floats else f"greys of mode {image.mode} must lie in 0..{white}"
        hint = range_hint(low, high) if floats else "scale them, or give an array of floats in [0, 1]"
        raise ImageError(f"{name}: values go from {low:.10g} to {high:.10g}; {range_}: {hint}")
