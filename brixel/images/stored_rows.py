"""Rows of an uncompressed image of 32-bit samples, straight from its file.

Pillow would hold the whole image, which with the result makes 8 bytes per pixel and more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

_DTYPES = {"F;32F": "<f4", "F;32BF": ">f4", "I;32S": "<i4", "I;32BS": ">i4", "I;32N": "=i4"}  # by Pillow's layouts


@dataclass(frozen=True)
class _Strip:
    """Rows of an image that follow one another in its file."""

    rows: range
    offset: int
    dtype: np.dtype[Any]
    direction: int


def are_stored(image: Image.Image) -> bool:
    """Whether :func:`stored_rows` can read an image, which is then not decoded yet."""
    strips = _strips(image)
    ends = [0, *(strip.rows.stop for strip in strips)]
    return [*(strip.rows.start for strip in strips), image.height] == ends


def stored_rows(image: Image.Image, height: int) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    """Bands of up to ``height`` rows, and which rows they are. Raises OSError where the file ends before them."""
    assert isinstance(image, ImageFile.ImageFile)
    assert image.fp is not None
    for strip in _strips(image):
        image.fp.seek(strip.offset)
        for start in range(0, len(strip.rows), height):
            rows = strip.rows[:: strip.direction][start : start + height]
            data = image.fp.read(len(rows) * image.width * strip.dtype.itemsize)
            if len(data) < len(rows) * image.width * strip.dtype.itemsize:
                raise OSError("image file is truncated")
            values = np.frombuffer(data, strip.dtype).reshape(len(rows), image.width)
            yield slice(min(rows), max(rows) + 1), values[:: strip.direction]


def _strips(image: Image.Image) -> list[_Strip]:
    """The strips of an image that is stored as it is, without gaps in a row; none where Pillow must decode it."""
    if getattr(image, "fp", None) is None:  # not of a file, or closed
        return []
    strips = []
    for codec, extents, offset, layout in getattr(image, "tile", ()):
        match codec, extents, layout:
            case "raw", (0, upper, image.width, lower), (str(name), 0, 1 | -1 as direction) if name in _DTYPES:
                strips.append(_Strip(range(upper, lower), offset, np.dtype(_DTYPES[name]), direction))
            case _:
                return []
    return strips
