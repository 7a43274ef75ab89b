"""Square crops of images for training and evaluation: the teacher's crop, and the student's smaller view of it.

Shapes: H x W an image, T the side of the teacher's crop, in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError

DOWNSAMPLING = 4  # side of the teacher's crop / side of the student's view


@dataclass(frozen=True)
class CropSettings:
    """How square crops are cut from images; plain JSON values only.

    Args:
        teacher_px: Side of the teacher's crop; see :func:`check_teacher_px`.
        max_zoom: The image's short side is resized to ``teacher_px`` times a random factor from 1 to this, but not
            enlarged, unless it is below ``teacher_px``.
        flip: Mirror half of the crops.
        small: Whether images with a short side below ``teacher_px`` are enlarged or skipped.
        seed: Seed of the random crops.
        random: False for centre crops without zoom and flip, as in validation.
    """

    teacher_px: int
    max_zoom: float = 1.0
    flip: bool = True
    small: Literal["upsample", "skip"] = "upsample"
    seed: int = 0
    random: bool = True

    def __post_init__(self) -> None:
        check_teacher_px(self.teacher_px, patch_px=1)
        if not 1 <= self.max_zoom < math.inf:
            raise BrixelError(f"max_zoom is {self.max_zoom!r}; expected a number from 1 up, such as 1.5")
        if self.small not in ("upsample", "skip"):
            raise BrixelError(f"small is {self.small!r}; expected 'upsample' or 'skip'")


def check_teacher_px(teacher_px: int, patch_px: int) -> None:
    """Raise BrixelError unless the sides of the student's view, a quarter of ``teacher_px``, are whole patches."""
    unit = DOWNSAMPLING * patch_px
    if isinstance(teacher_px, bool) or not isinstance(teacher_px, int) or teacher_px <= 0:
        raise BrixelError(f"teacher_px is {teacher_px!r}; expected a whole number of pixels, such as {64 * patch_px}")
    if teacher_px % unit:
        below = teacher_px // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise BrixelError(f"teacher_px is {teacher_px}; expected a multiple of {unit}, 4 x {patch_px}: take {near}")


def teacher_crop(rgb: Tensor, settings: CropSettings, generator: torch.Generator) -> Tensor:
    """Cut a square crop of an image: (3, H, W) from `load_image` -> (3, T, T), float32 in [0, 1].

    As if the image were resized and then cropped, but a region of whole pixels is cut first, and only that is resized.
    The generator draws the same amount of numbers whatever the settings.
    """
    zoom, down, right, flip = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if not settings.random:
        zoom, down, right, flip = 0.0, 0.5, 0.5, 1.0
    crop_px, (height_px, width_px) = settings.teacher_px, rgb.shape[-2:]
    short_px = min(height_px, width_px)
    resized_px = min(crop_px * (1 + zoom * (settings.max_zoom - 1)), max(short_px, crop_px))  # of the short side
    region_px = max(1, round(short_px * crop_px / resized_px))
    top, left = (int(share * (side - region_px + 1)) for share, side in ((down, height_px), (right, width_px)))
    region = rgb[:, top : top + region_px, left : left + region_px]  # 3 region_px region_px
    region = region.float().div_(255) if region.dtype == torch.uint8 else region.float()
    crop = resized(region, (crop_px, crop_px))
    return crop.flip(-1) if settings.flip and flip < 0.5 else crop.contiguous()


def student_view(crop: Tensor) -> Tensor:
    """Downsample a teacher's crop for the student, antialiased: (..., 3, H, W) in [0, 1] -> (..., 3, H/4, W/4)."""
    height_px, width_px = crop.shape[-2] // DOWNSAMPLING, crop.shape[-1] // DOWNSAMPLING
    assert crop.shape[-2:] == (DOWNSAMPLING * height_px, DOWNSAMPLING * width_px), tuple(crop.shape)
    return resized(crop, (height_px, width_px))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean from pixels (..., 3, H, W) and divide by the standard deviation, per channel."""
    means, deviations = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels - means) / deviations


def resized(images: Tensor, out_hw: tuple[int, int]) -> Tensor:
    """Resize images (..., 3, H, W) by bicubic interpolation with antialiasing, clamped to [0, 1]."""
    if images.shape[-2:] == out_hw:
        return images.clamp(0, 1)
    batch = images.reshape(-1, *images.shape[-3:])
    batch = F.interpolate(batch, out_hw, mode="bicubic", antialias=True, align_corners=False)
    return batch.reshape(*images.shape[:-2], *out_hw).clamp_(0, 1)
