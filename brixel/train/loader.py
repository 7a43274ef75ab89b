"""The data of a run: crops from folders, the teacher's maps of them, live or cached, and micro-batches on the device.

Shapes: B batch, T side of the teacher's crop and S = T/4 of the student's in pixels, D width, h x w the student's grid.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.images.crops import CropSettings
from brixel.model.config import BackboneConfig
from brixel.train.config import TrainConfig
from brixel.train.data import CropDataset, PositionSampler, collate, find_training_images, shuffled_index
from brixel.train.distributed import DistributedContext, barrier
from brixel.train.setup import teacher_side_px
from brixel.train.teacher_cache import TeacherCache

Teacher = Callable[[Tensor], Tensor]
"""From normalised pixels (B, 3, T, T) to maps (B, D, 4h, 4w)."""


def crop_dataset(
    config: TrainConfig, folders: Sequence[str], vit: ViTConfig | ForeignConfig, *, random: bool
) -> CropDataset:
    """Crops of the images in ``folders``: random ones for training, centre crops for validation."""
    settings = CropSettings(
        teacher_side_px(config, vit.patch_px), config.max_zoom, config.flip, config.small, config.seed, random
    )
    return CropDataset(find_training_images([Path(folder) for folder in folders]), settings, mean=vit.mean, std=vit.std)


class ShuffledCache(Dataset[tuple[Tensor, Tensor]]):
    """The items of a cache by position, shuffled anew in every epoch."""

    def __init__(self, cache: TeacherCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self.cache[shuffled_index(position, len(self.cache), self.seed)]


class TrainingData:
    """The images of a run. The constructor opens the folders and, on rank 0, builds the caches that are missing."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: BackboneConfig,
        teacher: Teacher,
        teacher_name: str,
        context: DistributedContext,
    ) -> None:
        self.config, self.teacher, self.context = config, teacher, context
        vit = dataclasses.asdict(backbone.vit)
        self.teacher_id = {"name": teacher_name, "vit": vit, "weights": backbone.fingerprint}
        self.skipped: set[str] = set()  # paths of images that could not be used so far
        dataset = crop_dataset(config, config.images, backbone.vit, random=True)
        self.image_count = len(dataset)
        self.source: CropDataset | ShuffledCache = dataset
        if config.cache:
            cache = self._cached(dataset, config.cache, Path(config.cache_dir or Path(config.out) / "cache"))
            self.source = ShuffledCache(cache, config.seed)
        self.held_out: TeacherCache | None = None
        if config.val and config.val_images:
            dataset = crop_dataset(config, config.val, backbone.vit, random=False)
            self.held_out = self._cached(dataset, min(len(dataset), config.val_images), Path(config.out) / "val")

    def micro_batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, S, S) and teacher maps (B, D, 4h, 4w) on the device, ``config.accumulate`` pairs per step."""
        config, device = self.config, self.context.device
        is_live = isinstance(self.source, CropDataset)  # the teacher runs now, its maps are not in a cache
        sampler = PositionSampler(
            start_step=start_step,
            steps=config.steps - start_step,
            global_batch=config.crops_per_step(self.context.world_size),
            rank=self.context.rank,
            world_size=self.context.world_size,
        )
        loader: DataLoader[Any] = DataLoader(
            self.source,
            batch_size=config.batch_size,
            sampler=sampler,
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

    def _cached(self, dataset: CropDataset, count: int, folder: Path) -> TeacherCache:
        """The cache in ``folder``, which rank 0 builds and all processes open."""
        if self.context.is_main:
            with tqdm(total=count, desc="teacher", unit="crop", disable=None) as bar:
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
