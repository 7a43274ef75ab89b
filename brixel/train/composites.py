"""Composites: objects, cut out of images with masks, pasted on training crops at random places, sizes and angles.

Shapes: H x W an image, T the side of a crop, in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.datasets.labelled import NONE, Sample, paired
from brixel.images.from_arrays import to_bytes
from brixel.images.load import load_image
from brixel.images.target_files import check_aspect, read_numbers
from brixel.utils.seeds import derived_seed

Pixels = npt.NDArray[np.uint8]
_MOST_OBJECTS = 3  # on a crop
_SIZES = (0.15, 0.7)  # of an object's longer side, of the crop's
_MOST_DEGREES = 30.0
_SMALLEST_PX = 4


@dataclass(frozen=True)
class Cutouts:
    """Objects to paste on crops: a function of the seed and the crop's position, like the crops.

    Args:
        samples: Images with masks: 0 is the background, 255 means none, other numbers are classes. A mask of 0 and 255
            alone is black and white: its object is white.
        share: Of the crops that get objects, from 0 to 1.
        seed: Seed of the random choices.
    """

    samples: tuple[Sample, ...]
    share: float
    seed: int = 0

    def __str__(self) -> str:
        return f"objects of {len(self.samples)} others on {self.share:.0%} of the crops"

    def paste(self, crop: Tensor, position: int) -> tuple[Tensor, tuple[str, ...]]:
        """Paste objects on a crop, or none.

        Args:
            crop: (3, T, T), float32 in [0, 1].
            position: Of the crop in the run.

        Returns:
            The composite, of the same shape and type; and files that could not be used, whose objects are left out.
        """
        rng = np.random.default_rng(derived_seed("composite", self.seed, position, size_bytes=8))
        if rng.random() >= self.share:
            return crop, ()
        canvas = to_bytes(crop)  # T T 3
        unusable = []
        for _ in range(rng.integers(1, _MOST_OBJECTS + 1)):
            sample = self.samples[rng.integers(len(self.samples))]
            try:
                canvas = pasted(canvas, *_an_object(sample, rng), rng)
            except BrixelError:
                unusable.append(str(sample.image))
        return torch.from_numpy(canvas.copy()).permute(2, 0, 1).float().div(255), tuple(unusable)


def find_cutouts(folders: Sequence[str]) -> tuple[Sample, ...]:
    """The images with masks in folders, each of which has `images` and `masks/NAME.png`.

    Raises:
        BrixelError: A folder is not so, or an image has no mask.
    """
    return tuple(sample for folder in folders for sample in paired(Path(folder), "masks", (".png",)))


def _an_object(sample: Sample, rng: np.random.Generator) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """An image (H, W, 3), mirrored or not, and where one of its classes is: (H, W)."""
    mask = read_numbers(sample.target)
    check_aspect(sample.image, sample.target, mask.shape)
    pixels = to_bytes(load_image(sample.image))
    size = (pixels.shape[1], pixels.shape[0])
    labels = np.asarray(Image.fromarray(mask.numpy().astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    classes = np.unique(labels)
    objects = classes[(classes != 0) & (classes != NONE)]
    chosen: Any = rng.choice(objects) if len(objects) else NONE
    inside = labels == chosen
    return (pixels[:, ::-1], inside[:, ::-1]) if rng.random() < 0.5 else (pixels, inside)


def pasted(canvas: Pixels, image: Pixels, inside: npt.NDArray[np.bool_], rng: np.random.Generator) -> Pixels:
    """Paste an object at a random place, partly outside at times, 15 to 70 % of the canvas in size.

    Args:
        canvas: Square, (T, T, 3).
        image: What the object is cut out of, (H, W, 3).
        inside: Where the object is, (H, W).
        rng: Draws place, size and angle.

    Returns:
        The composite (T, T, 3); the canvas itself where the object is empty.
    """
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if len(rows) == 0:
        return canvas
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    side_px = canvas.shape[0]
    scale = side_px * rng.uniform(*_SIZES) / max(right - left, bottom - top)
    size = tuple(max(_SMALLEST_PX, round(scale * length)) for length in (right - left, bottom - top))
    angle = rng.uniform(-_MOST_DEGREES, _MOST_DEGREES)
    layers = []
    for layer in (image, (inside * 255).astype(np.uint8)):
        part = Image.fromarray(np.ascontiguousarray(layer[top:bottom, left:right]))
        resized = part.resize(size, Image.Resampling.BICUBIC)
        layers.append(resized.rotate(angle, Image.Resampling.BICUBIC, expand=True))
    composite = Image.fromarray(canvas)
    left_px, top_px = (
        int(rng.integers(-length_px // 3, side_px - 2 * length_px // 3 + 1)) for length_px in layers[0].size
    )
    composite.paste(layers[0], (left_px, top_px), layers[1])
    return np.asarray(composite)
