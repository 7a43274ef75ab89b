"""Arrays and tensors that hold images: checked, and converted to RGB tensors (3, H, W), uint8 or float32 in [0, 1].

And back, to bytes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from brixel.errors import ImageError
from brixel.images.patch_grid import MAX_PIXELS
from brixel.utils.tensor_kinds import not_plain

_ARRAY_DTYPES = ("uint8", "uint16", "float16", "float32", "float64")
_TENSOR_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_bytes(rgb: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """An RGB tensor (3, H, W), uint8 or floats in [0, 1], as an array of bytes (H, W, 3); a view of uint8."""
    pixels = (rgb * 255).round().byte() if rgb.is_floating_point() else rgb
    return pixels.permute(1, 2, 0).numpy()


def from_array(array: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array (H, W, 3) or (H, W), uint8, uint16 or floats in [0, 1], to (3, H, W); else ImageError."""
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    native = array.dtype.newbyteorder("=")
    if native not in _ARRAY_DTYPES:
        raise ImageError(
            f"{name}: expected uint8, uint16 or floats in [0, 1]; integers 0..255: array.astype('uint8'), "
            "a mask: array.astype('float32')"
        )
    if array.ndim != 2 and array.shape[2:] != (3,):
        raise ImageError(f"{name}: expected (H, W, 3) or (H, W){_array_hint(array.shape)}")
    check_size(array.shape[:2], name)
    if native == np.uint8:
        return to_rgb(array)
    if native == np.uint16:
        return to_rgb(array.astype(np.float32)).div_(65535)
    return check_range(to_rgb(array), name)


def from_tensor(tensor: Tensor) -> Tensor:
    """Move a tensor (3, H, W), uint8 or floats in [0, 1], to the CPU, without a copy if possible; else ImageError."""
    if problem := not_plain(tensor):
        raise ImageError(f"an image tensor {problem}")
    name = f"tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    if tensor.dtype not in _TENSOR_DTYPES:
        raise ImageError(
            f"{name}: expected uint8 or floats in [0, 1]; integers 0..255: tensor.to(torch.uint8), "
            "16 bits: tensor / 65535"
        )
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(f"{name}: expected (3, H, W){_tensor_hint(tuple(tensor.shape))}")
    check_size(tuple(tensor.shape[1:]), name)
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.uint8 else check_range(tensor, name)


def to_rgb(array: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array (H, W, 3) or (H, W) to a tensor (3, H, W)."""
    rgb = np.broadcast_to(array, (3, *array.shape)) if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(rgb, dtype=array.dtype.newbyteorder("="), order="C"))


def _array_hint(shape: tuple[int, ...]) -> str:
    match shape:
        case (_, _, _, _):
            return "; of a batch give one image at a time: array[0]"
        case (_, _, 4):
            return "; drop alpha: array[..., :3], or lay it over white: PIL.Image.fromarray(array)"
        case (_, _, 1):
            return "; for a grey image: array[..., 0]"
        case (1 | 3 | 4, _, _):
            return "; channels come last: array.transpose(1, 2, 0)"
    return ""


def _tensor_hint(shape: tuple[int, ...]) -> str:
    match shape:
        case (_, _, _, _):
            return "; of a batch give one image at a time: tensor[0]"
        case (4, _, _):
            return "; drop alpha: tensor[:3]"
        case (_, _) | (1, _, _):
            return "; for a grey image: tensor.expand(3, -1, -1)"
        case (_, _, 1 | 3 | 4):
            return "; channels come first: tensor.permute(2, 0, 1)"
    return ""


def check_size(image_hw: tuple[int, ...], name: str) -> None:
    """Raise ImageError for an image without pixels or with more than `MAX_PIXELS`."""
    height_px, width_px = image_hw
    if height_px == 0 or width_px == 0:
        raise ImageError(f"{name}: is empty, {height_px}x{width_px} pixels; give one with at least one pixel")
    if height_px * width_px > MAX_PIXELS:
        raise ImageError(
            f"{name}: has {height_px}x{width_px} pixels (height x width), and the limit is {MAX_PIXELS:,}; "
            "make it smaller, or cut it into several"
        )


def check_range(tensor: Tensor, name: str) -> Tensor:
    """Convert floats to float32; ImageError if they are not in [0, 1]."""
    tensor = tensor.to(torch.float32)
    low, high = (float(value) for value in tensor.aminmax())
    if not (low >= 0 and high <= 1):
        hint = range_hint(low, high)
        raise ImageError(f"{name}: values go from {low:g} to {high:g}; floats must lie in [0, 1]: {hint}")
    return tensor


def range_hint(low: float, high: float) -> str:
    """What to do about floats that are not in [0, 1]."""
    if not np.isfinite([low, high]).all():
        return "replace NaN and infinite values"
    if low >= -0.5 and high <= 1.5:
        return "if it is rounding or ringing, .clip(0, 1)"
    if low >= 0:
        return "divide by 255" if high <= 255 else "divide by the largest value there can be"
    return "give the image as it was before normalisation"
