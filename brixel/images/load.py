"""Images in: a file, a PIL image, an array or a tensor, read as an RGB tensor.

Shapes: H, W height and width in pixels. Colours are taken as sRGB; ICC profiles are not applied.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from brixel.errors import ImageError
from brixel.images.decode import from_pil, jpeg_hw, open_image_file, reduce
from brixel.images.from_arrays import from_array, from_tensor

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""What `load_image` reads."""


def load_image(image: ImageInput) -> Tensor:
    """The image as an RGB tensor (3, H, W) on the CPU: uint8, or float32 in [0, 1] where it came deeper.

    A path or PIL image may have any mode. EXIF orientation is applied, transparency laid over white, 16-bit
    greys divided by 65535; of an animation the first frame is read (of a PIL image the frame it stands at).
    An array is (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1]; a tensor is (3, H, W), uint8 or floats
    in [0, 1], and not copied where it fits. The input is left as it was.
    Raises `FileNotFoundError` for a missing file, `ImageError` for all else that cannot be used.
    """
    with open_image(image) as source:
        return source.read(source.image_hw)


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
        f"one image cannot be a {type(image).__name__}; "
        f"give a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W){hint}"
    )


@dataclass(frozen=True)
class OpenedImage:
    """An image whose size is known, upright, and how its planes (3, H, W) are had: see `load_image`.

    ``read(wanted_hw)``: of its size, or smaller where it is a JPEG file of which far fewer pixels are wanted.
    """

    image_hw: tuple[int, int]
    read: Callable[[tuple[int, int]], Tensor]


@contextmanager
def open_image(image: ImageInput) -> Iterator[OpenedImage]:
    """An image of any kind; of a JPEG file nothing is decoded before it is read. Raises as `load_image` does."""
    if not isinstance(image, (str, os.PathLike)):
        planes = _load(image)
        yield _whole(planes)
        return
    path = os.fspath(image)
    with open_image_file(path) as file:
        image_hw = jpeg_hw(file, path)
        if image_hw is None:
            yield _whole(from_pil(file, path))
        else:
            yield OpenedImage(image_hw, lambda wanted_hw: _reduced(file, path, wanted_hw))


def _whole(planes: Tensor) -> OpenedImage:
    return OpenedImage((planes.shape[1], planes.shape[2]), lambda _: planes)


def _reduced(file: Image.Image, path: str, wanted_hw: tuple[int, int]) -> Tensor:
    reduce(file, wanted_hw)
    return from_pil(file, path)
