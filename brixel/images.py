"""Pictures in: read a file, a PIL image, an array or a tensor, and lay it on the patch grid.

Shapes: H, W height and width in pixels. Colours are taken as sRGB; ICC profiles are not applied.
"""

import errno
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from brixel.errors import ImageError
from brixel.geometry import MAX_PIXELS, Geometry

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor
"""What `load_image` reads."""

_ARRAY_DTYPES = ("uint8", "uint16", "float16", "float32", "float64")
_TENSOR_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UPRIGHT = {  # EXIF orientation: the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS_LOCK = threading.Lock()


def load_image(image: ImageInput) -> Tensor:
    """The picture as an RGB tensor (3, H, W) on the CPU: uint8, or float32 in [0, 1] where it came deeper.

    A path or PIL image may have any mode. EXIF orientation is applied, transparency laid over white, 16-bit
    greys divided by 65535; of an animation the first frame is read (of a PIL image the frame it stands at).
    An array is (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1]; a tensor is (3, H, W), uint8 or floats
    in [0, 1], and not copied where it fits. The input is left as it was.
    Raises `FileNotFoundError` for a missing file, `ImageError` for all else that cannot be used.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_path(os.fspath(image))
    if isinstance(image, Image.Image):
        return _from_pil(image, getattr(image, "filename", "") or "PIL image")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    hint = ", or for the bytes of a file PIL.Image.open(io.BytesIO(data))" if isinstance(image, bytes) else ""
    raise ImageError(
        f"one picture cannot be a {type(image).__name__}; "
        f"give a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W){hint}"
    )


def preprocess(image: Tensor, geometry: Geometry, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Lay a picture from `load_image` on the patch grid: float32 (3, padded_h, padded_w), normalised.

    Resized by bicubic interpolation with antialiasing, clamped to [0, 1], normalised by `mean` and `std` (one
    number per channel), padded at the bottom and right by repeating the edge. One channel is worked on at a
    time, so that a large uint8 picture is not turned into floats as a whole; the numbers are the same.
    """
    assert image.shape == (3, *geometry.image_hw), f"{tuple(image.shape)} does not fit {geometry}"
    height_px, width_px = geometry.resized_hw
    padded = torch.empty(3, *geometry.padded_hw)  # (3, padded_h, padded_w)
    for channel, target, channel_mean, channel_std in zip(image, padded, mean, std, strict=True):
        inner = target[:height_px, :width_px]
        inner.copy_(_resized(channel, geometry.resized_hw))
        inner.clamp_(0, 1).sub_(channel_mean).div_(channel_std)
        target[:height_px, width_px:] = inner[:, -1:]
        target[height_px:] = target[height_px - 1]
    return padded


def _resized(channel: Tensor, resized_hw: tuple[int, int]) -> Tensor:
    """One channel (H, W), uint8 or float32, as float32 of `resized_hw`; a bicubic may overshoot [0, 1]."""
    plane = channel.float().div_(255) if channel.dtype == torch.uint8 else channel
    if plane.shape == resized_hw:
        return plane
    plane = plane[None, None]  # (1, 1, H, W)
    return F.interpolate(plane, resized_hw, mode="bicubic", antialias=True, align_corners=False)[0, 0]


def _from_path(path: str) -> Tensor:
    with _open_file(path) as file:
        with _pillow_errors(path):
            picture = _identify(file, path)
        return _from_pil(picture, path)


def _open_file(path: str) -> BinaryIO:
    if os.path.isdir(path):
        raise ImageError(f"{path}: is a folder; give the pictures in it one by one")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        url = "; a URL must be downloaded first" if "://" in path else ""
        raise FileNotFoundError(errno.ENOENT, f"no such picture, check the path{url}", path) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be opened ({error}); check path and permissions") from error


def _identify(file: BinaryIO, path: str) -> Image.Image:
    """What `Image.open` does, less its warning for large pictures.

    That warning comes below our limit, and could be silenced there only by changing the warning filters,
    which belong to the whole process, for every picture read.
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
        f"{path}: is not a picture that the installed Pillow can read, or its head is damaged; "
        "give a PNG, JPEG, TIFF, WebP or other picture file"
    )


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Pillow's readers raise nearly anything on damaged data; say which picture it was."""
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
    """Some readers (TIFF) warn of a large picture while decoding it, too.

    Warning filters are shared by all threads, so they are touched for such pictures only, one at a time.
    """
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        yield
        return
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _from_pil(image: Image.Image, name: str) -> Tensor:
    _check_size((image.height, image.width), name)
    with _pillow_errors(name), _no_size_warning(image):
        image.load()
        upright = _upright(image)
        if upright.mode == "F":
            return _check_range(_to_planes(np.asarray(upright)), name)
        if upright.mode.startswith("I"):
            return _from_deep_grey(upright, name)
        return _to_planes(np.asarray(_over_white(upright)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF data: the picture as it is stored, which is what viewers show
        return image
    return image if turn is None else image.transpose(turn)


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
    return _to_planes(grey.astype(np.float32)).div_(65535)


def _from_array(array: np.ndarray[Any, Any]) -> Tensor:
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    native = array.dtype.newbyteorder("=")
    if native not in _ARRAY_DTYPES:
        raise ImageError(
            f"{name}: expected uint8, uint16 or floats in [0, 1]; integers 0..255: array.astype('uint8'), "
            "a mask: array.astype('float32')"
        )
    if array.ndim != 2 and array.shape[2:] != (3,):
        raise ImageError(f"{name}: expected (H, W, 3) or (H, W){_array_hint(array.shape)}")
    _check_size(array.shape[:2], name)
    if native == np.uint8:
        return _to_planes(array)
    if native == np.uint16:
        return _to_planes(array.astype(np.float32)).div_(65535)
    return _check_range(_to_planes(array), name)


def _from_tensor(tensor: Tensor) -> Tensor:
    name = f"tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    if tensor.dtype not in _TENSOR_DTYPES:
        raise ImageError(
            f"{name}: expected uint8 or floats in [0, 1]; integers 0..255: tensor.to(torch.uint8), "
            "16 bits: tensor / 65535"
        )
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"{name}: expected (3, H, W){_tensor_hint(tuple(tensor.shape))}")
    _check_size(tuple(tensor.shape[1:]), name)
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.uint8 else _check_range(tensor, name)


def _to_planes(array: np.ndarray[Any, Any]) -> Tensor:
    """(H, W, 3) or (H, W) as a tensor (3, H, W) that shares no memory with it."""
    planes = np.broadcast_to(array, (3, *array.shape)) if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, dtype=array.dtype.newbyteorder("="), order="C"))


def _array_hint(shape: tuple[int, ...]) -> str:
    match shape:
        case (_, _, _, _):
            return "; of a batch give one picture at a time: array[0]"
        case (_, _, 4):
            return "; drop alpha: array[..., :3], or lay it over white: PIL.Image.fromarray(array)"
        case (_, _, 1):
            return "; for a grey picture: array[..., 0]"
        case (1 | 3 | 4, _, _):
            return "; channels come last: array.transpose(1, 2, 0)"
    return ""


def _tensor_hint(shape: tuple[int, ...]) -> str:
    match shape:
        case (_, _, _, _):
            return "; of a batch give one picture at a time: tensor[0]"
        case (4, _, _):
            return "; drop alpha: tensor[:3]"
        case (_, _) | (1, _, _):
            return "; for a grey picture: tensor.expand(3, -1, -1)"
        case (_, _, 1 | 3 | 4):
            return "; channels come first: tensor.permute(2, 0, 1)"
    return ""


def _check_size(image_hw: tuple[int, ...], name: str) -> None:
    height_px, width_px = image_hw
    if height_px == 0 or width_px == 0:
        raise ImageError(f"{name}: is empty, {height_px}x{width_px} pixels; give one with at least one pixel")
    if height_px * width_px > MAX_PIXELS:
        raise ImageError(
            f"{name}: has {height_px}x{width_px} pixels (height x width), and the limit is {MAX_PIXELS:,}; "
            "make it smaller, or cut it into pieces"
        )


def _check_range(tensor: Tensor, name: str) -> Tensor:
    """Floats of any width as float32, or an error where they leave [0, 1]."""
    tensor = tensor.to(torch.float32)
    low, high = (float(value) for value in tensor.aminmax())
    if not (low >= 0 and high <= 1):
        hint = _range_hint(low, high)
        raise ImageError(f"{name}: values go from {low:g} to {high:g}; floats must lie in [0, 1]: {hint}")
    return tensor


def _range_hint(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "replace NaN and infinite values"
    if low >= -0.5 and high <= 1.5:
        return "if it is rounding or ringing, .clip(0, 1)"
    if low >= 0:
        return "divide by 255" if high <= 255 else "divide by the largest value there can be"
    return "give the picture as it was before normalisation"
