"""Training crops for the universal upsampler: photographs, composites and flat drawings, with camera-like faults.

Every crop is a function of the seed and its number. Composites paste cut-outs, from a folder with ``images`` and
``masks``, on photographs.
"""

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from brixel.images.from_arrays import to_bytes
from brixel.images.load import load_image
from brixel.train.composites import pasted
from brixel.utils.seeds import derived_seed

COMPOSITES, DRAWINGS = 0.25, 0.06  # shares of the crops
ENLARGED = 1.6  # at most: a crop of 448 px shows at least 280 px of its image


@dataclass(frozen=True)
class CropSource:
    """Crops by number, from photographs and, where there are any, cut-outs.

    Args:
        photos: Paths of images.
        cutouts: Pairs of an image and a mask, in which 0 is the background.
        seed: Seed of all random choices.
    """

    photos: Sequence[Path]
    cutouts: Sequence[tuple[Path, Path]]
    seed: int = 0

    def crop(self, name: str, number: int, side_px: int) -> Tensor:
        """Crop ``number`` of the set ``name``: uint8 (3, side_px, side_px)."""
        rng = np.random.default_rng(derived_seed(name, self.seed, number, size_bytes=8))
        kind = rng.random()
        if kind < DRAWINGS:
            image = drawing(rng, side_px)
        else:
            image = random_region(_read(self.photos[rng.integers(len(self.photos))]), rng, side_px)
            if self.cutouts and kind < DRAWINGS + COMPOSITES:
                for _ in range(rng.integers(1, 4)):
                    cutout, mask = map(_read, self.cutouts[rng.integers(len(self.cutouts))])
                    image = pasted(image, cutout, mask > 0, rng)
        image = camera_faults(image, rng)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


@functools.lru_cache(maxsize=256)
def _read(path: Path) -> np.ndarray:
    if path.parent.name == "masks":
        return np.asarray(Image.open(path))
    return np.ascontiguousarray(to_bytes(load_image(path)))


def random_region(image: np.ndarray, rng: np.random.Generator, side_px: int) -> np.ndarray:
    """A square of random size at a random place, resized: uint8 (H, W, 3) -> (side_px, side_px, 3)."""
    short_px = min(image.shape[:2])
    least_px = min(short_px, side_px / ENLARGED)
    region_px = round(math.exp(rng.uniform(math.log(least_px), math.log(short_px))))
    top, left = (int(rng.integers(side - region_px + 1)) for side in image.shape[:2])
    region = Image.fromarray(image[top : top + region_px, left : left + region_px])
    return np.asarray(region.resize((side_px, side_px), Image.Resampling.BICUBIC))


def drawing(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """A flat drawing: polygons, ellipses and lines of one colour each on a plain background."""
    canvas = Image.new("RGB", (2 * side_px, 2 * side_px), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(3, 14)):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        centre, radius = rng.uniform(0, 2 * side_px, 2), 2 * side_px * rng.uniform(0.03, 0.3)
        kind = rng.integers(3)
        if kind == 0:
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 8)))
            lengths = radius * rng.uniform(0.5, 1, len(angles))
            points = centre[:, None] + lengths * np.stack([np.cos(angles), np.sin(angles)])
            draw.polygon([tuple(point) for point in points.T], fill=colour)
        elif kind == 1:
            radii = radius * rng.uniform(0.3, 1, 2)
            draw.ellipse([*(centre - radii), *(centre + radii)], fill=colour)
        else:
            end = centre + radius * rng.uniform(-3, 3, 2)
            draw.line([*centre, *end], fill=colour, width=int(rng.integers(2, side_px // 12)))
    return np.asarray(canvas.resize((side_px, side_px), Image.Resampling.BOX))


def camera_faults(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change colours, blur, add noise, compress as JPEG: each with some chance. uint8 (H, W, 3)."""
    if rng.random() < 0.5:
        image = changed_colours(image, rng)
    if rng.random() < 0.1:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5))))
    if rng.random() < 0.1:
        noise = rng.normal(0, rng.uniform(2, 16), image.shape)
        image = (image + noise).clip(0, 255).round().astype(np.uint8)
    if rng.random() < 0.15:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(25, 90)))
        image = np.asarray(Image.open(file).convert("RGB"))
    return image


def changed_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change gain and gamma of every channel, contrast and saturation."""
    values = (image / 255.0) ** np.exp(rng.normal(0, 0.25)) * np.exp(rng.normal(0, 0.12, 3))
    mean, grey = values.mean(), values.mean(-1, keepdims=True)
    saturation = 0.0 if rng.random() < 0.08 else np.exp(rng.normal(0, 0.3))
    values = grey + saturation * (values - grey)
    values = mean + np.exp(rng.normal(0, 0.2)) * (values - mean)
    return (255 * values).clip(0, 255).round().astype(np.uint8)


def resized(image: Tensor, side_px: int) -> Tensor:
    """Resize a uint8 image (3, S, S) to a square, bicubic with antialiasing; uint8."""
    values = image[None].float()
    values = F.interpolate(values, (side_px, side_px), mode="bicubic", antialias=True, align_corners=False)
    return values[0].clamp(0, 255).round().byte()
