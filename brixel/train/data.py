"""Training pictures: folders in, pairs of normalised crops out, each a pure function of the seed and its position.

A run reads positions 0, 1, 2, ... A position says which epoch it is in, which picture it takes and how that is cropped,
so neither workers nor ranks nor restarts change what is read. Method: arXiv 2511.05168, `docs/method.md`.

Shapes: B batch, H x W a picture, T the side of the teacher's crop, all in pixels.
"""

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from brixel.errors import BrixelError, ImageError
from brixel.images import load_image
from brixel.pictures import find_pictures

DOWNSAMPLING = 4  # how much smaller the student's view is, along each side


def find_training_pictures(folders: Sequence[Path]) -> list[Path]:
    """The pictures in folders and all folders below, each once; sorted within a folder, folders in the order given.

    Names that start with a dot are passed over, of files and of folders. Raises BrixelError for a folder that does not
    exist, is a file, or holds no picture.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BrixelError(f"{folder} is {'a file' if folder.exists() else 'missing'}; expected a folder")
        found |= {os.path.abspath(path): path for path, _ in find_pictures([folder])}
    return list(found.values())


@dataclass(frozen=True)
class CropSettings:
    """How square crops are cut from pictures; plain JSON values only.

    ``teacher_px``: side of the teacher's crop, see :func:`check_teacher_px`. ``max_zoom``: the picture's short side
    becomes ``teacher_px`` times a random factor from 1 to this, yet no more than it is, if that is more. ``flip``:
    mirror half of the crops. ``small``: what becomes of pictures with a short side below ``teacher_px``. ``random``:
    False for centre crops without zoom and flip, as in validation.
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
    """Raise BrixelError unless the student's view, a quarter of the crop, is made of whole patches."""
    unit = DOWNSAMPLING * patch_px
    if isinstance(teacher_px, bool) or not isinstance(teacher_px, int) or teacher_px <= 0:
        raise BrixelError(f"teacher_px is {teacher_px!r}; expected a whole number of pixels, such as {64 * patch_px}")
    if teacher_px % unit:
        below = teacher_px // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise BrixelError(f"teacher_px is {teacher_px}; expected a multiple of {unit}, 4 x {patch_px}: take {near}")


def teacher_crop(planes: Tensor, settings: CropSettings, generator: torch.Generator) -> Tensor:
    """A square crop of a picture, resized: (3, H, W) from `load_image` -> (3, T, T), float32 in [0, 1].

    As if the picture were resized to cover the crop and then cropped; but a region of whole pixels is cut first, and
    only that is resized. The generator moves on by the same amount whatever the settings.
    """
    zoom, down, right, flip = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if not settings.random:
        zoom, down, right, flip = 0.0, 0.5, 0.5, 1.0
    crop_px, (height_px, width_px) = settings.teacher_px, planes.shape[-2:]
    short_px = min(height_px, width_px)
    resized_px = min(crop_px * (1 + zoom * (settings.max_zoom - 1)), max(short_px, crop_px))  # of the short side
    region_px = max(1, round(short_px * crop_px / resized_px))
    top, left = (int(at * (side - region_px + 1)) for at, side in ((down, height_px), (right, width_px)))
    region = planes[:, top : top + region_px, left : left + region_px]  # 3 region_px region_px
    region = region.float().div_(255) if region.dtype == torch.uint8 else region.float()
    crop = _resized(region, crop_px)
    return crop.flip(-1) if settings.flip and flip < 0.5 else crop.contiguous()


def student_view(crop: Tensor) -> Tensor:
    """What the student sees of the teacher's crop: (..., 3, T, T) in [0, 1] -> (..., 3, T/4, T/4), antialiased."""
    side_px = crop.shape[-1] // DOWNSAMPLING
    assert crop.shape[-2:] == (DOWNSAMPLING * side_px, DOWNSAMPLING * side_px), tuple(crop.shape)
    return _resized(crop, side_px)


def _resized(square: Tensor, side_px: int) -> Tensor:
    """Squares (..., 3, S, S) at another size, by bicubic interpolation with antialiasing, in [0, 1]."""
    if square.shape[-1] == side_px:
        return square.clamp(0, 1)
    batch = square.reshape(-1, *square.shape[-3:])
    batch = F.interpolate(batch, (side_px, side_px), mode="bicubic", antialias=True, align_corners=False)
    return batch.reshape(*square.shape[:-2], side_px, side_px).clamp_(0, 1)


class Crop(NamedTuple):
    """Normalised ``teacher`` (3, T, T) and ``student`` (3, T/4, T/4); paths of their picture, and of unusable ones."""

    teacher: Tensor
    student: Tensor
    picture: str
    skipped: tuple[str, ...]


class CropBatch(NamedTuple):
    """Crops together: ``teacher`` (B, 3, T, T), ``student`` (B, 3, T/4, T/4), their pictures, and all skipped."""

    teacher: Tensor
    student: Tensor
    pictures: tuple[str, ...]
    skipped: tuple[str, ...]


def collate(crops: Sequence[Crop]) -> CropBatch:
    """Crops as one batch, for a DataLoader."""
    teachers, students, pictures, skipped = zip(*crops, strict=True)
    return CropBatch(torch.stack(teachers), torch.stack(students), pictures, sum(skipped, ()))


class CropDataset(Dataset[Crop]):
    """Crops by position; any position from 0 up, so it has no end: to iterate, give a sampler of positions.

    Each epoch, of as many positions as there are pictures, goes through all of them in an order of its own. A picture
    that cannot be used is named in ``skipped`` and the next of that order stands in for it; where no picture can be
    used, BrixelError names some with the reason. ``mean`` and ``std``: per channel, for RGB in [0, 1].
    """

    def __init__(
        self, pictures: Sequence[Path], settings: CropSettings, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        if not pictures:
            raise BrixelError("no training pictures; expected at least one")
        self.pictures, self.settings = tuple(pictures), settings
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int) -> Crop:
        assert position >= 0, position
        failures: dict[str, str] = {}
        for attempt in range(len(self)):
            picture = self.pictures[shuffled(position, len(self), self.settings.seed, ahead=attempt)]
            try:
                planes = load_image(picture)  # 3 H W
                if self.settings.small == "skip" and min(planes.shape[1:]) < self.settings.teacher_px:
                    raise ImageError(f"{picture}: smaller than teacher_px={self.settings.teacher_px}")
            except (ImageError, FileNotFoundError) as error:
                failures[str(picture)] = str(error)
                continue
            crop = teacher_crop(planes, self.settings, _generator("crop", self.settings.seed, position))
            return Crop(self._normalised(crop), self._normalised(student_view(crop)), str(picture), tuple(failures))
        some = "; ".join(list(failures.values())[:3])
        raise BrixelError(f"none of the {len(self)} training pictures can be used; the first of them: {some}")

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


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
