"""Image files and PIL images: opened, decoded, turned upright, and converted to RGB tensors (3, H, W)."""

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from brixel.errors import ImageError, MissingFileError, printable
from brixel.images.formats import identify
from brixel.images.from_arrays import check_size
from brixel.images.modes import SIDEWAYS, check_samples, correct_transparent_grey, to_rgb_tensor
from brixel.images.quiet import quiet_decoding
from brixel.images.stored_rows import are_stored

REDUCTIONS = (1, 2, 4, 8)
"""Divisors of a JPEG's sides (rounded up) at which it can be decoded."""

_OVERSAMPLING = 3  # pixels per wanted pixel along a side after a reduction; with fewer it would become visible


@dataclass(frozen=True)
class ImageFile:
    """An image file that is not on a disk of this machine: what reads its bytes, when it is decoded.

    It is an `os.PathLike` that stands for its name, which is only shown.
    """

    name: str
    read: Callable[[], bytes]

    def __fspath__(self) -> str:
        return self.name


@contextmanager
def open_image_file(source: str | ImageFile) -> Iterator[Image.Image]:
    """Open an image file and read its header. Raises `FileNotFoundError` or `ImageError`."""
    name = printable(os.fspath(source))
    with open_regular_file(source) as file:
        with _pillow_errors(name), quiet_decoding():
            image = identify(file, name)
            check_size((image.height, image.width), name)
            check_samples(image, name)
            correct_transparent_grey(image, name)
        yield image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, of 1 to 8."""
    try:
        with quiet_decoding():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable EXIF data is ignored, as viewers do
        return 1
    return orientation if orientation in range(1, 9) else 1


def jpeg_hw(image: Image.Image) -> tuple[int, int] | None:
    """Upright height and width of a JPEG that is not decoded yet; None for other formats.

    Some of them must be decoded before their orientation is known.
    """
    if not isinstance(image, JpegImageFile):
        return None
    return image.size if exif_orientation(image) in SIDEWAYS else image.size[::-1]


def reduce_jpeg(image: Image.Image, wanted_hw: tuple[int, int]) -> None:
    """Make Pillow decode a JPEG at one of `REDUCTIONS` if far fewer pixels are wanted: `wanted_hw`, upright.

    Sides are rounded up at the right and at the bottom. An image that will be turned is reduced only by divisors of its
    sides.
    """
    orientation = exif_orientation(image)
    wanted_wh = wanted_hw if orientation in SIDEWAYS else wanted_hw[::-1]
    most = min(side_px // (_OVERSAMPLING * wanted_px) for side_px, wanted_px in zip(image.size, wanted_wh, strict=True))
    for reduction in reversed(REDUCTIONS):
        divides = all(side_px % reduction == 0 for side_px in image.size)
        if reduction <= max(1, most) and (divides or orientation == 1):
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
            return


def from_pil(image: Image.Image, name: str) -> Tensor:
    """Decode an image and turn it upright: (3, H, W) uint8, or float32 in [0, 1] for deeper modes; else ImageError."""
    check_size((image.height, image.width), name)
    with _pillow_errors(name), quiet_decoding():
        check_samples(image, name)
        if not are_stored(image):
            image.load()
        return to_rgb_tensor(image, exif_orientation(image), name)


def open_regular_file(source: str | ImageFile) -> BinaryIO:
    """Open a regular file; what else has a path may never give a byte. Raises as :func:`open_image_file`."""
    path = os.fspath(source)
    name = printable(path)
    try:
        if isinstance(source, ImageFile):
            return io.BytesIO(source.read())
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError as error:
        is_url = "://" in path and not isinstance(source, ImageFile)
        url = "; a URL must be downloaded first" if is_url else ""
        raise MissingFileError(f"{name}: no such file, check the path{url}", path) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be opened ({error}); check path and permissions") from error
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name}: is a folder; give the files in it one by one")
    raise ImageError(f"{name}: is a pipe, a socket or a device; give a file")


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Name the image in errors: Pillow's readers raise nearly anything on damaged data."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: is more than Pillow is set to read ({error}); make it smaller") from error
    except Exception as error:
        raise ImageError(
            f"{name}: cannot be decoded ({error or type(error).__name__}); the file is damaged, cut short or "
            "closed: fetch or open it again"
        ) from error
