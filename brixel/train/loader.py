"""What a step reads: the student's pixels and the teacher's maps, live or from a cache."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from brixel.train.config import TrainConfig
from brixel.train.data import CropDataset, PositionSampler, collate, shuffled
from brixel.train.distributed import World
from brixel.train.teacher_cache import TeacherCache


class CachedCrops(Dataset[tuple[Tensor, Tensor]]):
    """A cache by position: every epoch goes through all of it in an order of its own."""

    def __init__(self, cache: TeacherCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return self.cache[shuffled(position, len(self.cache), self.seed)]


def batches(
    config: TrainConfig,
    source: CropDataset | TeacherCache,
    teacher: Callable[[Tensor], Tensor],
    world: World,
    *,
    start_step: int,
    skipped: set[str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of pixels (B, 3, S, S) and teacher maps (B, D, 4h, 4w) on the device; ``config.accumulate`` to a step.

    ``skipped`` takes up the names of images that could not be used.
    """
    sampler = PositionSampler(
        start_step=start_step,
        steps=config.steps - start_step,
        global_batch=config.batch_size * config.accumulate * world.size,
        rank=world.rank,
        world=world.size,
    )
    cached = isinstance(source, TeacherCache)
    loader: DataLoader[Any] = DataLoader(
        CachedCrops(source, config.seed) if isinstance(source, TeacherCache) else source,
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=config.workers,
        collate_fn=None if cached else collate,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the global one
    )
    for batch in loader:
        if cached:
            pixels, maps = batch
            yield pixels.to(world.device, non_blocking=True), maps.to(world.device, non_blocking=True)
        else:
            skipped.update(batch.skipped)
            with torch.no_grad():
                maps = teacher(batch.teacher.to(world.device, non_blocking=True)).to(world.device)
            yield batch.student.to(world.device, non_blocking=True), maps
