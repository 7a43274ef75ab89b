"""`brixel.upsample`: features that exist already, upsampled by the universal upsampler, guided by their image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.checkpoints.bundled_universal import shared_universal
from brixel.errors import BrixelError
from brixel.images.load import ImageInput, image_list, load_image
from brixel.inference.memory.chunked_universal import universal_in_chunks
from brixel.inference.memory.row_chunks import row_ranges
from brixel.model.universal import CELLS, GUIDE_PX, UniversalUpsampler
from brixel.utils.fields import short_repr
from brixel.utils.tensor_kinds import not_plain
from brixel.utils.torch_defaults import plain_defaults

_WINDOW_BYTES = 2**26  # of the windows of low-resolution cells that exist at once, where no gradient is needed


@plain_defaults()
def upsample(
    features: Tensor,
    image: ImageInput | Sequence[ImageInput],
    scale: float = 4,
    *,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Upsample features of any model along the outlines in the image that they are of.

    The universal upsampler of the package (`docs/universal.md`) weighs the features around every output cell by the
    image, and by how alike they are. It works for any width and grid. Gradients flow to ``features``.

    Args:
        features: (B, D, h, w), floating point, on any device. They cover the whole image.
        image: The image: a path, PIL image, array (H, W, 3) or (H, W), or tensor (3, H, W), of any size. For several
            feature maps, a list of B images.
        scale: Output cells per cell of ``features`` on each axis, from 1 up; fractions of an output cell are cut off.
        size: Height and width of the output in cells, in place of ``scale``.

    Returns:
        (B, D, H, W) on the device and in the dtype of ``features``; channels last in memory.

    Raises:
        ImageError: An image cannot be used.
        BrixelError: Another argument is out of range.
    """
    _check_features(features)
    size_hw = _output_size(features, scale, size)
    images = image_list(image, len(features))
    universal = shared_universal(torch.float32, features.device)
    outputs = [
        _upsample_one(universal, one[None], _guide(guide, size_hw).to(features.device), size_hw)
        for one, guide in zip(features, images, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _upsample_one(universal: UniversalUpsampler, features: Tensor, guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
    _, width, rows, columns = features.shape
    row_bytes = columns * (CELLS + 1) * width * features.element_size()
    chunk_rows = max(1, _WINDOW_BYTES // row_bytes)
    if chunk_rows >= rows or (features.requires_grad and torch.is_grad_enabled()):
        upsampled: Tensor = universal(features, guide, size_hw)
        return upsampled
    out = features.new_empty(1, *size_hw, width).permute(0, 3, 1, 2)
    universal_in_chunks(universal, features, guide, out[0], size_hw, row_ranges(rows, chunk_rows))
    return out


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise BrixelError(f"features are a {type(features).__name__}; expected a tensor (B, D, h, w)")
    if problem := not_plain(features):
        raise BrixelError(f"features: the tensor {problem}")
    if features.ndim != 4 or 0 in features.shape or not features.is_floating_point():
        hint = ""
        if features.ndim == 3:
            hint = "; for one map give features[None], for tokens (B, h*w, D) tokens.mT.unflatten(2, (h, w))"
        shape = f"{tuple(features.shape)} of {features.dtype}"
        raise BrixelError(f"features have shape {shape}; expected floating point, (B, D, h, w), none of them 0{hint}")
    if not features.isfinite().all():
        raise BrixelError("features hold values that are not finite; one would spread over the whole map")


def _output_size(features: Tensor, scale: float, size: tuple[int, int] | None) -> tuple[int, int]:
    grid_hw = (features.shape[2], features.shape[3])
    if size is None:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < math.inf:
            raise BrixelError(f"scale is {scale!r}; expected a number from 1 up, such as 4")
        return int(grid_hw[0] * scale), int(grid_hw[1] * scale)
    try:
        height, width = (int(side) for side in size if int(side) == side)
    except (TypeError, ValueError, RuntimeError):
        raise BrixelError(f"size is {short_repr(size)}; expected (height, width) in cells") from None
    if height < grid_hw[0] or width < grid_hw[1]:
        raise BrixelError(
            f"size is {(height, width)}, below the {grid_hw} of the features; expected at least that: to make them "
            "smaller use torch.nn.functional.interpolate"
        )
    return height, width


def _guide(image: ImageInput, size_hw: tuple[int, int]) -> Tensor:
    """The image in [0, 1], float32, not larger than the network reads it: (1, 3, H', W')."""
    rgb = load_image(image)[None]
    rgb = rgb.float().div_(255) if rgb.dtype == torch.uint8 else rgb.float()
    wanted = (GUIDE_PX * size_hw[0], GUIDE_PX * size_hw[1])
    if rgb.shape[2] <= wanted[0] and rgb.shape[3] <= wanted[1]:
        return rgb
    return F.interpolate(rgb, wanted, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
