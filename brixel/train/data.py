"""Training images: from folders to pairs of normalised crops, each a pure function of the seed and its position.

A run reads positions 0, 1, 2, ... The position determines the epoch, the image and the crop, so the number of workers,
of processes and of restarts does not change what is read. Method: arXiv 2511.05168, `docs/method.md`.

Shapes: B batch, H x W an image, T the side of the teacher's crop, all in pixels.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from brixel.errors import BrixelError, ImageError, MissingFileError
from brixel.images.crops import CropSettings, normalised, student_view, teacher_crop
from brixel.images.find_images import find_images
from brixel.images.load import load_image
from brixel.train.composites import Cutouts
from brixel.utils.seeds import derived_seed


def find_training_images(folders: Sequence[Path]) -> list[Path]:
    """The images in folders and their subfolders, without duplicates; sorted by folder, folders in the order given.

    Files and folders whose names start with a dot are ignored. Raises BrixelError for a folder that does not exist, is
    a file, or holds no image.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BrixelError(f"{folder} is {'a file' if folder.exists() else 'missing'}; expected a folder")
        found |= {os.path.abspath(path): path for path, _ in find_images([folder])}
    return list(found.values())


class Crop(NamedTuple):
    """Normalised crops ``teacher`` (3, T, T) and ``student`` (3, T/4, T/4); paths of the image and of unusable ones."""

    teacher: Tensor
    student: Tensor
    image: str
    skipped: tuple[str, ...]


class CropBatch(NamedTuple):
    """A batch of crops: ``teacher`` (B, 3, T, T), ``student`` (B, 3, T/4, T/4); paths of images and unusable ones."""

    teacher: Tensor
    student: Tensor
    images: tuple[str, ...]
    skipped: tuple[str, ...]


def collate(crops: Sequence[Crop]) -> CropBatch:
    """Stack crops to a batch, for a DataLoader."""
    teachers, students, images, skipped = zip(*crops, strict=True)
    return CropBatch(torch.stack(teachers), torch.stack(students), images, sum(skipped, ()))


class CropDataset(Dataset[Crop]):
    """Crops by position, which has no upper bound: iterate with a sampler of positions.

    Each epoch has as many positions as there are images, and shuffles them anew. An image that cannot be used is listed
    in ``skipped`` and replaced by the next one in that order. If none can be used, BrixelError gives reasons.
    ``mean`` and ``std``: per channel, for RGB in [0, 1]. ``cutouts``: objects that are pasted on a share of the crops.
    """

    def __init__(
        self,
        images: Sequence[Path],
        settings: CropSettings,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        cutouts: Cutouts | None = None,
    ) -> None:
        if not images:
            raise BrixelError("no training images; expected at least one")
        self.images, self.settings, self.cutouts = tuple(images), settings, cutouts
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Crop:
        assert position >= 0, position
        failures: dict[str, str] = {}
        for attempt in range(len(self)):
            image = self.images[shuffled_index(position, len(self), self.settings.seed, offset=attempt)]
            try:
                rgb = load_image(image)  # 3 H W
                if self.settings.small == "skip" and min(rgb.shape[1:]) < self.settings.teacher_px:
                    raise ImageError(f"{image}: smaller than teacher_px={self.settings.teacher_px}")
            except (ImageError, MissingFileError) as error:
                failures[str(image)] = str(error)
                continue
            crop = teacher_crop(rgb, self.settings, _generator("crop", self.settings.seed, position))
            unusable: tuple[str, ...] = ()
            if self.cutouts is not None:
                crop, unusable = self.cutouts.paste(crop, position)
            teacher, student = (normalised(pixels, self.mean, self.std) for pixels in (crop, student_view(crop)))
            return Crop(teacher, student, str(image), (*failures, *unusable))
        some = "; ".join(list(failures.values())[:3])
        raise BrixelError(f"none of the {len(self)} training images can be used; the first of them: {some}")


def shuffled_index(position: int, count: int, seed: int, *, offset: int = 0) -> int:
    """Index of the item, of ``count``, at a position; or at ``offset`` items later in the same epoch, cyclically."""
    epoch, index = divmod(position, count)
    return _epoch_order(count, seed, epoch)[(index + offset) % count]


@functools.lru_cache(maxsize=4)  # training and validation, two neighbouring epochs of each
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=_generator("epoch", seed, epoch)).tolist())


def _generator(purpose: str, seed: int, number: int) -> torch.Generator:
    """A fresh generator, independent of those of neighbouring seeds and numbers."""
    return torch.Generator().manual_seed(derived_seed(purpose, seed, number, size_bytes=4))


class CropSources(Dataset[Any]):
    """Several sources of crops, one per size; an item is named by the source's index and a position in it."""

    def __init__(self, sources: Sequence[Dataset[Any]]) -> None:
        self.sources = tuple(sources)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        source, position = key
        return self.sources[source][position]


class MicroBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one rank, from number ``start`` to before ``stop``: all that a restart needs is the number.

    Micro-batch m takes its crops from source m mod n, of n sources. The k-th micro-batch of a source, over all ranks
    together, reads its positions k*G ... k*G + G-1, with G = ``sizes[source]`` * ``world_size``; rank r the r-th of
    ``world_size`` equal slices.
    """

    def __init__(self, sizes: Sequence[int], *, start: int, stop: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert min(sizes) > 0, sizes
        self.sizes, self.numbers, self.rank, self.world_size = tuple(sizes), range(start, stop), rank, world_size

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.numbers:
            turn, source = divmod(number, len(self.sizes))
            first = (turn * self.world_size + self.rank) * self.sizes[source]
            yield [(source, position) for position in range(first, first + self.sizes[source])]
