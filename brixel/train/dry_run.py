"""The sizes, time and memory of a run before it begins, for `brixel train --dry-run`. Nothing is written."""

import itertools
import statistics
import time

import torch

from brixel.train.config import TrainConfig
from brixel.train.data import CropDataset, collate
from brixel.train.distributed import DistributedContext, distributed_context
from brixel.train.fit_blend import micro_batches_to_fit
from brixel.train.loader import crop_datasets
from brixel.train.setup import describe_crops, describe_loss
from brixel.train.trainer import Trainer, check_out
from brixel.utils.memory import peak_bytes

_MEASURED_STEPS = 3


def plan(config: TrainConfig) -> dict[str, str]:
    """Sizes, steps, epochs, disk and memory, and times measured on a few steps, as texts by name.

    Raises:
        BrixelError: The run itself would stop at its start.
    """
    check_out(config)
    with distributed_context(config.device) as context, torch.random.fork_rng():
        return _plan(Trainer(config, context), config, context)


def _plan(trainer: Trainer, config: TrainConfig, context: DistributedContext) -> dict[str, str]:
    vit = trainer.model.config.backbone.vit
    datasets = crop_datasets(config, config.images, vit, random=True)
    sizes = [_Size(trainer, dataset, batch) for dataset, batch in zip(datasets, config.batch_sizes, strict=True)]
    step_s = statistics.mean(size.step_s for size in sizes)
    batch_teacher_s = statistics.mean(size.teacher_s * size.batch for size in sizes)
    cached = [config.scaled(config.cache, index) for index in range(len(sizes))]
    cache_s = sum(count * size.teacher_s for count, size in zip(cached, sizes, strict=True))
    cache_bytes = sum(count * size.crop_bytes for count, size in zip(cached, sizes, strict=True))

    images, cutouts = len(datasets[0]), datasets[0].cutouts
    epoch_crops = sum(cached) or images
    live_s = 0.0 if config.cache else batch_teacher_s * config.accumulate  # of the teacher, in a step
    val_images = len(crop_datasets(config, config.val, vit, random=False)[0]) if config.val else 0
    fit_batches = micro_batches_to_fit(config, context.world_size)
    fit_crops = round(fit_batches * statistics.mean(config.batch_sizes))
    fit_s = 0.0 if config.cache else batch_teacher_s * fit_batches
    total_s = config.steps * (step_s + live_s) + fit_s + cache_s
    peak = peak_bytes(context.device)
    trained = sum(parameter.numel() for parameter in trainer.module.parameters() if parameter.requires_grad)
    epochs = f"{epoch_crops} crops {config.steps * trainer.images_per_step / epoch_crops:.1f} times"
    shapes = " and ".join(str(size.map_shape) for size in sizes)
    return {
        "images": f"{images} to train on, {min(val_images, config.val_images)} to validate with"
        + (f"; {cutouts}" if cutouts else ""),
        "crops": describe_crops(config, vit.patch_px),
        "maps": f"{shapes}, from blocks {', '.join(map(str, trainer.model.blocks))}",
        "trained": f"{trained / 1e6:.2f} M parameters, loss {describe_loss(config)}",
        "fit": f"blend of four maps, to {fit_crops * context.world_size} crops" + (f": {fit_s:.0f} s" if fit_s else ""),
        "steps": f"{config.steps} of {trainer.images_per_step:g} images: {epochs}",
        "device": f"{context.world_size} x {context.device}",
        "teacher": f"{' and '.join(f'{size.teacher_s:.2f}' for size in sizes)} s a crop"
        + (f"; cached once: {_gib(cache_bytes)}" if config.cache else ""),
        "step": f"{step_s:.2f} s" + ("" if config.cache else f", and {live_s:.2f} s for the teacher"),
        "in all": f"{total_s / 60:.0f} min, and validation",
        "memory": "not known" if peak is None else f"{_gib(peak)} at the most on {context.device}",
    }


class _Size:
    """What crops of one size take, measured on a few steps."""

    def __init__(self, trainer: Trainer, dataset: CropDataset, batch: int) -> None:
        self.batch, device = batch, trainer.context.device
        crops = collate([dataset[position] for position in range(batch)])
        start_s = time.perf_counter()
        maps = torch.cat([trainer.teacher(crop[None].to(device)) for crop in crops.teacher])
        self.teacher_s = (time.perf_counter() - start_s) / batch
        pixels = crops.student.to(device)
        times_s = []
        for _ in range(_MEASURED_STEPS):
            start_s = time.perf_counter()
            trainer.step(trainer.module, itertools.repeat((pixels, maps)))  # reads the loss: synchronises the device
            times_s.append(time.perf_counter() - start_s)
        self.step_s = statistics.median(times_s)
        self.map_shape, self.crop_bytes = tuple(maps.shape[1:]), 2 * (maps[0].numel() + pixels[0].numel())


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
