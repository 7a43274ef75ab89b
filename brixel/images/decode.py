"""Images from files and from Pillow: found out about, decoded, turned upright, brought to planes (3, H, W)."""

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
"""By what a JPEG's sides can be divided while it is decoded, rounded up."""

_SPARE = 3  # pixels a side that are left for each one wanted: with fewer the reduction would begin to be seen

_UPRIGHT = {  # EXIF orientation: the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_FILTERS_LOCK = threading.Lock()

_BAND_PX = 256  # rows that are brought to planes at a time


@contextmanager
def open_image_file(path: str) -> Iterator[Image.Image]:
    """An image's file, its head read. Raises `FileNotFoundError` or `ImageError`."""
    with _open_file(path) as file:
        with _pillow_errors(path):
            image = _identify(file, path)
        yield image


def jpeg_hw(image: Image.Image, name: str) -> tuple[int, int] | None:
    """Height and width of a JPEG, upright, of which nothing was decoded yet; None of any other file.

    Others may have to be decoded before they tell their orientation.
    """
    if not isinstance(image, JpegImageFile):
        return None
    check_size((image.height, image.width), name)
    return image.size if _turn(image) in _SIDEWAYS else image.size[::-1]


def reduce(image: Image.Image, wanted_hw: tuple[int, int]) -> None:
    """Have a JPEG decoded at one of `REDUCTIONS` where far fewer pixels are wanted: `wanted_hw`, upright.

    What is rounded up lies at the right and at the bottom. An image that has yet to be turned is reduced only by what
    divides its sides.
    """
    turn = _turn(image)
    wanted = wanted_hw if turn in _SIDEWAYS else wanted_hw[::-1]
    spare = min(side_px // (_SPARE * wanted_px) for side_px, wanted_px in zip(image.size, wanted, strict=True))
    for reduction in reversed(REDUCTIONS):
        divides = all(side_px % reduction == 0 for side_px in image.size)
        if reduction <= max(1, spare) and (divides or turn is None):
            image.draft(image.mode, (image.width // reduction, image.height // reduction))
            return


def from_pil(image: Image.Image, name: str) -> Tensor:
    """Decode, and turn upright: uint8, or float32 in [0, 1] of what is deeper; else ImageError."""
    check_size((image.height, image.width), name)
    with _pillow_errors(name), _no_size_warning(image):
        image.load()
        turn = _turn(image)
        upright = image if turn is None else image.transpose(turn)
        if upright.mode == "F":
            return check_range(to_rgb(np.asarray(upright)), name)
        if upright.mode.startswith("I"):
            return _from_deep_grey(upright, name)
        return _in_bands(upright)


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
    """What `Image.open` does, less its warning for large images.

    That warning comes below our limit, and could be silenced there only by changing the warning filters,
    which belong to the whole process, for every image read.
    """
    start = file.read(16)
    if not start:
        raise ImageError(f"{path}: is an empty file; fetch or export it again")
    for register_readers in (Image.preinit, Image.init):
        register_readers()
        for reader, accepts in list(Image.OPEN.values()):
            try:
                verdict = accepts is None or accepts(start)
                if verdict and not isinstance(verdict, str):  # text says why a known format is not supported
                    file.seek(0)
                    return reader(file, path)
            except (SyntaxError, IndexError, TypeError, struct.error):  # how readers say "not mine"
                continue
    raise ImageError(
        f"{path}: is not an image that the installed Pillow can read, or its head is damaged; "
        "give a PNG, JPEG, TIFF, WebP or other image file"
    )


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Pillow's readers raise nearly anything on damaged data; say which image it was."""
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
    """Some readers (TIFF) warn of a large image while decoding it, too.

    Warning filters are shared by all threads, so they are touched for such images only, one at a time.
    """
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        yield
        return
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, where that is anything."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF data: the image as it is stored, which is what viewers show
        return None


def _in_bands(image: Image.Image) -> Tensor:
    """An image of any 8-bit mode as uint8 planes, some rows after others: what lies between is never whole."""
    planes = torch.empty(3, image.height, image.width, dtype=torch.uint8)
    for top in range(0, image.height, _BAND_PX):
        band = image.crop((0, top, image.width, min(top + _BAND_PX, image.height)))
        planes[:, top : top + band.height] = torch.from_numpy(np.array(_over_white(band))).permute(2, 0, 1)
    return planes


def _over_white(image: Image.Image) -> Image.Image:
    """Any 8-bit mode as RGB."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that La converts to
    elif image.mode == "P":
        image = image.copy()  # converting writes the transparency into the palette
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _from_deep_grey(image: Image.Image, name: str) -> Tensor:
    """Modes I and I;16*: integers that mean 0..65535."""
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name}: values go from {low} to {high}; greys of mode {image.mode} must lie in 0..65535: "
            "scale them, or give an array of floats in [0, 1]"
        )
    transparent = image.info.get("transparency")  # of a PNG: the one grey that is see-through
    if transparent is not None:
        grey = np.where(grey == transparent, 65535, grey)
    return to_rgb(grey.astype(np.float32)).div_(65535)
