"""Image files and PIL images: opened, decoded, turned upright, and converted to RGB tensors (3, H, W)."""

import errno
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from brixel.errors import ImageError
from brixel.images.from_arrays import check_range, check_size, to_rgb
from brixel.images.patch_grid import MAX_PIXELS

REDUCTIONS = (1, 2, 4, 8)
"""Divisors of a JPEG's sides (rounded up) at which it can be decoded."""

_OVERSAMPLING = 3  # pixels per wanted pixel along a side after a reduction; with fewer it would become visible

_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
_FILTERS_LOCK = threading.Lock()

_BAND_PX = 256  # rows that are converted at a time


@contextmanager
def open_image_file(path: str) -> Iterator[Image.Image]:
    """Open an image file and read its header. Raises `FileNotFoundError` or `ImageError`."""
    with _open_file(path) as file:
        with _pillow_errors(path):
            image = _identify(file, path)
        yield image


def jpeg_hw(image: Image.Image, name: str) -> tuple[int, int] | None:
    """Upright height and width of a JPEG that is not decoded yet; None for other formats.

    Some of them must be decoded before their orientation is known.
    """
    if not isinstance(image, JpegImageFile):
        return None
    check_size((image.height, image.width), name)
    return image.size if _transposition(image) in _SIDEWAYS else image.size[::-1]


def reduce_jpeg(image: Image.Image, wanted_hw: tuple[int, int]) -> None:
    """Make Pillow decode a JPEG at one of `REDUCTIONS` if far fewer pixels are wanted: `wanted_hw`, upright.

    Sides are rounded up at the right and at the bottom. An image that will be turned is reduced only by divisors of its
    sides.
    """
    transposition = _transposition(image)
    wanted_wh = wanted_hw if transposition in _SIDEWAYS else wanted_hw[::-1]
    most = min(side_px // (_OVERSAMPLING * wanted_px) for side_px, wanted_px in zip(image.size, wanted_wh, strict=True))
    for reduction in reversed(REDUCTIONS):
        divides = all(side_px % reduction == 0 for side_px in image.size)
        if reduction <= max(1, most) and (divides or transposition is None):
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
            return


def from_pil(image: Image.Image, name: str) -> Tensor:
    """Decode an image and turn it upright: (3, H, W) uint8, or float32 in [0, 1] for deeper modes; else ImageError."""
    check_size((image.height, image.width), name)
    with _pillow_errors(name), _no_size_warning(image):
        image.load()
        transposition = _transposition(image)
        upright = image if transposition is None else image.transpose(transposition)
        if upright.mode == "F":
            return check_range(to_rgb(np.asarray(upright)), name)
        if upright.mode.startswith("I"):
            return _from_deep_grey(upright, name)
        return _to_rgb_in_bands(upright)


def _open_file(path: str) -> BinaryIO:
    if os.path.isdir(path):
        raise ImageError(f"{path}: is a folder; give the images in it one by one")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        url = "; a URL must be downloaded first" if "://" in path else ""
        raise FileNotFoundError(errno.ENOENT, f"no such image, check the path{url}", path) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be opened ({error}); check path and permissions") from error


def _identify(file: BinaryIO, path: str) -> Image.Image:
    """Do what `Image.open` does, without its warning for large images.

    Pillow warns below our limit, and silencing it would change the warning filters of the whole process for every
    image.
    """
    start = file.read(16)
    if not start:
        raise ImageError(f"{path}: is an empty file; fetch or export it again")
    for register_readers in (Image.preinit, Image.init):
        register_readers()
        for reader, accepts in list(Image.OPEN.values()):
            try:
                verdict = accepts is None or accepts(start)
                if verdict and not isinstance(verdict, str):  # a text says why a known format is not supported
                    file.seek(0)
                    return reader(file, path)
            except (SyntaxError, IndexError, TypeError, struct.error):  # not the format of this reader
                continue
    raise ImageError(
        f"{path}: is not an image that the installed Pillow can read, or its head is damaged; "
        "give a PNG, JPEG, TIFF, WebP or other image file"
    )


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


@contextmanager
def _no_size_warning(image: Image.Image) -> Iterator[None]:
    """Silence the warning for large images, which some readers (TIFF) repeat while decoding.

    All threads share the warning filters, so they are changed for large images only, one at a time.
    """
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        yield
        return
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright; None if it is upright already."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF data is ignored, as viewers do
        return None


def _to_rgb_in_bands(image: Image.Image) -> Tensor:
    """An image of any 8-bit mode as uint8 (3, H, W), converted in bands of rows to save memory."""
    rgb = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for top in range(0, image.height, _BAND_PX):
        band = image.crop((0, top, image.width, min(top + _BAND_PX, image.height)))
        rgb[:, top : top + band.height] = torch.from_numpy(np.array(_over_white(band))).permute(2, 0, 1)
    return rgb


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


def _from_deep_grey(image: Image.Image, name: str) -> Tensor:
    """Modes I and I;16*, whose integers range over 0..65535."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name}: values go from {low} to {high}; greys of mode {image.mode} must lie in 0..65535: "
            "scale them, or give an array of floats in [0, 1]"
        )
    transparent = image.info.get("transparency")  # the transparent grey of a PNG
    if transparent is not None:
        grey = np.where(grey == transparent, 65535, grey)
    return to_rgb(grey.astype(np.float32)).div_(65535)
