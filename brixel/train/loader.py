"""The data of a run: crops from folders, the teacher's maps of them, live or cached, and micro-batches on the device.

Shapes: B batch, T side of the teacher's crop and S = T/4 of the student's in pixels, D width, h x w the student's grid.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError
from brixel.images.crops import CropSettings
from brixel.model.config import BackboneConfig
from brixel.train.composites import Cutouts, find_cutouts
from brixel.train.config import TrainConfig
from brixel.train.data import (
    CropDataset,
    CropSources,
    MicroBatchSampler,
    collate,
    find_training_images,
    shuffled_index,
)
from brixel.train.distributed import DistributedContext, barrier
from brixel.train.setup import teacher_sides_px
from brixel.train.teacher_cache import TeacherCache
from brixel.utils.progress import progress_bar

Teacher = Callable[[Tensor], Tensor]
"""From normalised pixels (B, 3, T, T) to maps (B, D, 4h, 4w)."""


def crop_datasets(
    config: TrainConfig, folders: Sequence[str], vit: ViTConfig | ForeignConfig, *, random: bool
) -> list[CropDataset]:
    """Crops of the images in ``folders``, by size: random ones for training, centre crops for validation."""
    images = find_training_images([Path(folder) for folder in folders])
    cutouts = (
        Cutouts(find_cutouts(config.cutouts), config.composites, config.seed) if random and config.cutouts else None
    )
    return [
        CropDataset(
            images,
            CropSettings(side_px, config.max_zoom, config.flip, config.small, config.seed, random),
            mean=vit.mean,
            std=vit.std,
            cutouts=cutouts,
        )
        for side_px in teacher_sides_px(config, vit.patch_px)
    ]


class PairDataset(Protocol):
    """What crops of one size are read from: a map-style dataset, such as :class:`TeacherCache`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Normalised pixels of the student's crop (3, S, S), and the teacher's map of it (D, 4h, 4w); float32."""


class ShuffledPairs(Dataset[tuple[Tensor, Tensor]]):
    """The items of a dataset by position, shuffled anew in every epoch."""

    def __init__(self, pairs: PairDataset, seed: int) -> None:
        self.pairs, self.seed = pairs, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self.pairs[shuffled_index(position, len(self.pairs), self.seed)]


class TrainingData:
    """The images of a run. The constructor opens the folders and, on rank 0, builds the caches that are missing."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: BackboneConfig,
        teacher: Teacher,
        teacher_name: str,
        context: DistributedContext,
        crops: Sequence[PairDataset] | None = None,
    ) -> None:
        self.config, self.teacher, self.context = config, teacher, context
        vit = dataclasses.asdict(backbone.vit)
        self.teacher_id = {"name": teacher_name, "vit": vit, "weights": backbone.fingerprint}
        self.skipped: set[str] = set()  # paths of images that could not be used so far
        self.sources: list[CropDataset] | list[ShuffledPairs] = []
        if crops is None:
            datasets = crop_datasets(config, config.images, backbone.vit, random=True)
            self.content = str(len(datasets[0]))
            if (cutouts := datasets[0].cutouts) is not None:
                self.content += f", with {cutouts}"
            self.sources = self._cached_sources(datasets) if config.cache else datasets
        else:
            if len(crops) != config.size_count:
                raise BrixelError(
                    f"{len(crops)} datasets of crops for {config.size_count} sizes; expected one for each"
                )
            self.content = " and ".join(str(len(pairs)) for pairs in crops) + " crops given in code"
            self.sources = [ShuffledPairs(pairs, config.seed) for pairs in crops]
        self.held_out: list[TeacherCache] = []
        if config.val and config.val_images:
            self.held_out = [
                self._cached(
                    dataset, min(len(dataset), config.val_images), self._own_folder(Path(config.out) / "val", index)
                )
                for index, dataset in enumerate(crop_datasets(config, config.val, backbone.vit, random=False))
            ]

    def micro_batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, S, S) and teacher maps (B, D, 4h, 4w) on the device, ``config.accumulate`` pairs per step.

        The sizes take turns.
        """
        config, device = self.config, self.context.device
        is_live = isinstance(self.sources[0], CropDataset)  # the teacher runs now, its maps are not in a cache
        sampler = MicroBatchSampler(
            config.batch_sizes,
            start=start_step * config.accumulate,
            stop=config.steps * config.accumulate,
            rank=self.context.rank,
            world_size=self.context.world_size,
        )
        loader: DataLoader[Any] = DataLoader(
            CropSources(self.sources),
            batch_sampler=sampler,
            num_workers=config.workers,
            collate_fn=collate if is_live else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default is to draw from the global one
        )
        for batch in loader:
            if is_live:
                self.skipped.update(batch.skipped)
                with torch.no_grad():
                    maps = self.teacher(batch.teacher.to(device, non_blocking=True)).to(device)
                yield batch.student.to(device, non_blocking=True), maps
            else:
                pixels, maps = batch
                yield pixels.to(device, non_blocking=True), maps.to(device, non_blocking=True)

    def _cached_sources(self, datasets: Sequence[CropDataset]) -> list[ShuffledPairs]:
        folder = Path(self.config.cache_dir or Path(self.config.out) / "cache")
        counts = (self.config.scaled(self.config.cache, index) for index in range(len(datasets)))
        return [
            ShuffledPairs(self._cached(dataset, count, self._own_folder(folder, index)), self.config.seed)
            for index, (dataset, count) in enumerate(zip(datasets, counts, strict=True))
        ]

    def _own_folder(self, folder: Path, index: int) -> Path:
        """A folder for each of several sizes."""
        return folder / str(self.config.sizes[index]) if len(self.config.sizes) > 1 else folder

    def _cached(self, dataset: CropDataset, count: int, folder: Path) -> TeacherCache:
        """The cache in ``folder``, which rank 0 builds and all processes open."""
        if self.context.is_main:
            with progress_bar(total=count, desc="teacher", unit="crop") as bar:
                TeacherCache.build_or_open(
                    folder,
                    dataset=dataset,
                    count=count,
                    teacher=self.teacher,
                    teacher_id=self.teacher_id,
                    workers=self.config.workers,
                    progress=lambda done, _: bar.update(done - bar.n),
                )
        barrier(self.context)
        cache = TeacherCache(folder)
        self.skipped.update(cache.skipped)
        return cache
