"""Reading an image of any kind: a file, a PIL image, an array or a tensor.

Shapes: H, W height and width in pixels. Colours are interpreted as sRGB; ICC profiles are not applied.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, ImageError, printable
from brixel.images.decode import ImageFile, from_pil, jpeg_hw, open_image_file, reduce_jpeg
from brixel.images.frame import Frame
from brixel.images.from_arrays import from_array, from_tensor
from brixel.utils.fields import short_repr

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor | Frame
"""What `load_image` reads."""


def load_image(image: ImageInput) -> Tensor:
    """Read an image as an RGB tensor; the input is not changed.

    EXIF orientation is applied, transparency is laid over white, and of an animation the first frame is read (of a PIL
    image the current one).

    Args:
        image: A path or PIL image of any mode; an array (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1]; or a
            tensor (3, H, W), uint8 or floats in [0, 1], which is not copied if possible; or a frame of a video.

    Returns:
        (3, H, W) on the CPU: uint8, or float32 in [0, 1] for 16-bit and floating-point images.

    Raises:
        FileNotFoundError: There is no such file.
        ImageError: The image cannot be read or used.
    """
    with open_image(image) as source:
        return source.read(source.image_hw)


def image_list(image: ImageInput | Sequence[ImageInput], count: int) -> list[ImageInput]:
    """One image, or several, as a list of ``count``; else BrixelError: there must be one for each feature map."""
    single = isinstance(image, str | os.PathLike | Image.Image) or (
        isinstance(image, Tensor | np.ndarray) and image.ndim < 4
    )
    if not single and (isinstance(image, Mapping) or not isinstance(image, Iterable)):
        raise BrixelError(f"image is {short_repr(image)}; expected an image, or a list of one for each feature map")
    images: list[ImageInput] = [image] if single else list(image)  # type: ignore[arg-type, list-item]
    if len(images) != count:
        raise BrixelError(f"{len(images)} images for {count} feature maps; expected one image for each, as a list")
    return images


@dataclass(frozen=True)
class OpenedImage:
    """An image of known upright height and width that may not be decoded yet.

    ``read(wanted_hw)`` returns what `load_image` returns, but smaller for a JPEG file if far fewer pixels are wanted.
    ``meta``: texts for its feature map.
    """

    image_hw: tuple[int, int]
    read: Callable[[tuple[int, int]], Tensor]
    meta: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_image(image: ImageInput) -> Iterator[OpenedImage]:
    """Open an image of any kind. A JPEG file is decoded when it is read. Raises as `load_image` does."""
    if isinstance(image, Frame):
        yield replace(_decoded(_from_memory(image.rgb)), meta=image.meta)
        return
    if not isinstance(image, (str, os.PathLike)):
        yield _decoded(_from_memory(image))
        return
    path = os.fsdecode(image)
    with open_image_file(image if isinstance(image, ImageFile) else path) as file:
        image_hw = jpeg_hw(file)
        if image_hw is None:
            yield _decoded(from_pil(file, printable(path)))
        else:
            yield OpenedImage(image_hw, lambda wanted_hw: _read_jpeg(file, printable(path), wanted_hw))


def _from_memory(image: Image.Image | np.ndarray[Any, Any] | Tensor) -> Tensor:
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


def _decoded(rgb: Tensor) -> OpenedImage:
    return OpenedImage((rgb.shape[1], rgb.shape[2]), lambda _: rgb)


def _read_jpeg(file: Image.Image, path: str, wanted_hw: tuple[int, int]) -> Tensor:
    reduce_jpeg(file, wanted_hw)
    return from_pil(file, path)
