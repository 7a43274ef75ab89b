"""Training images: folders in, pairs of normalised crops out, each a pure function of the seed and its position.

A run reads positions 0, 1, 2, ... A position says which epoch it is in, which image it takes and how that is cropped,
so neither workers nor ranks nor restarts change what is read. Method: arXiv 2511.05168, `docs/method.md`.

Shapes: B batch, H x W an image, T the side of the teacher's crop, all in pixels.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from brixel.errors import BrixelError, ImageError
from brixel.images.crops import CropSettings, normalised, student_view, teacher_crop
from brixel.images.find_images import find_images
from brixel.images.load import load_image


def find_training_images(folders: Sequence[Path]) -> list[Path]:
    """The images in folders and all folders below, each once; sorted within a folder, folders in the order given.

    Names that start with a dot are passed over, of files and of folders. Raises BrixelError for a folder that does not
    exist, is a file, or holds no image.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BrixelError(f"{folder} is {'a file' if folder.exists() else 'missing'}; expected a folder")
        found |= {os.path.abspath(path): path for path, _ in find_images([folder])}
    return list(found.values())


class Crop(NamedTuple):
    """Normalised ``teacher`` (3, T, T) and ``student`` (3, T/4, T/4); paths of their image, and of unusable ones."""

    teacher: Tensor
    student: Tensor
    image: str
    skipped: tuple[str, ...]


class CropBatch(NamedTuple):
    """Crops together: ``teacher`` (B, 3, T, T), ``student`` (B, 3, T/4, T/4), their images, and all skipped."""

    teacher: Tensor
    student: Tensor
    images: tuple[str, ...]
    skipped: tuple[str, ...]


def collate(crops: Sequence[Crop]) -> CropBatch:
    """Crops as one batch, for a DataLoader."""
    teachers, students, images, skipped = zip(*crops, strict=True)
    return CropBatch(torch.stack(teachers), torch.stack(students), images, sum(skipped, ()))


class CropDataset(Dataset[Crop]):
    """Crops by position; any position from 0 up, so it has no end: to iterate, give a sampler of positions.

    Each epoch, of as many positions as there are images, goes through all of them in an order of its own. An image
    that cannot be used is named in ``skipped`` and the next of that order stands in for it; where no image can be
    used, BrixelError names some with the reason. ``mean`` and ``std``: per channel, for RGB in [0, 1].
    """

    def __init__(
        self, images: Sequence[Path], settings: CropSettings, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        if not images:
            raise BrixelError("no training images; expected at least one")
        self.images, self.settings = tuple(images), settings
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Crop:
        assert position >= 0, position
        failures: dict[str, str] = {}
        for attempt in range(len(self)):
            image = self.images[shuffled(position, len(self), self.settings.seed, ahead=attempt)]
            try:
                planes = load_image(image)  # 3 H W
                if self.settings.small == "skip" and min(planes.shape[1:]) < self.settings.teacher_px:
                    raise ImageError(f"{image}: smaller than teacher_px={self.settings.teacher_px}")
            except (ImageError, FileNotFoundError) as error:
                failures[str(image)] = str(error)
                continue
            crop = teacher_crop(planes, self.settings, _generator("crop", self.settings.seed, position))
            return Crop(self._normalised(crop), self._normalised(student_view(crop)), str(image), tuple(failures))
        some = "; ".join(list(failures.values())[:3])
        raise BrixelError(f"none of the {len(self)} training images can be used; the first of them: {some}")

    def _normalised(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, self.mean, self.std)


def shuffled(position: int, number: int, seed: int, *, ahead: int = 0) -> int:
    """Which of ``number`` things a position takes, or one ``ahead`` of it in the same epoch's order, a ring."""
    epoch, place = divmod(position, number)
    return _epoch_order(number, seed, epoch)[(place + ahead) % number]


@functools.lru_cache(maxsize=4)  # training, validation, and each of them where an epoch ends
def _epoch_order(number: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(torch.randperm(number, generator=_generator("epoch", seed, epoch)).tolist())


def _generator(purpose: str, seed: int, number: int) -> torch.Generator:
    """A fresh source of randomness, unrelated to those of the neighbouring seeds and numbers."""
    digest = hashlib.blake2b(f"{purpose} {seed} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class PositionSampler(Sampler[int]):
    """The positions of one rank, for ``steps`` steps from ``start_step`` on: a restart needs nothing but the step.

    Step s takes positions s*G ... s*G + G-1 for the global batch G; rank r has the r-th of ``world`` equal slices.
    """

    def __init__(self, *, start_step: int, steps: int, global_batch: int, rank: int = 0, world: int = 1) -> None:
        if global_batch <= 0 or global_batch % world:
            near = max(1, global_batch // world) * world
            raise BrixelError(f"a global batch of {global_batch} does not divide among {world} processes; take {near}")
        assert 0 <= rank < world, (rank, world)
        self.steps, self.global_batch = range(start_step, start_step + steps), global_batch
        self.share = range(rank * global_batch // world, (rank + 1) * global_batch // world)

    def __len__(self) -> int:
        return len(self.steps) * len(self.share)

    def __iter__(self) -> Iterator[int]:
        return (step * self.global_batch + place for step in self.steps for place in self.share)
