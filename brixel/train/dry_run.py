"""The sizes, time and memory of a run before it begins, for `brixel train --dry-run`. Nothing is written."""

import itertools
import statistics
import time

import torch

from brixel.train.config import TrainConfig
from brixel.train.data import collate
from brixel.train.distributed import DistributedContext, distributed_context
from brixel.train.fit_blend import micro_batches_to_fit
from brixel.train.loader import crop_dataset
from brixel.train.setup import describe_crops
from brixel.train.trainer import Trainer
from brixel.utils.memory import peak_bytes

_MEASURED_STEPS = 3


def plan(config: TrainConfig) -> dict[str, str]:
    """Sizes, steps, epochs, disk and memory, and times measured on a few steps, as texts by name.

    Raises:
        BrixelError: The run itself would stop at its start.
    """
    with distributed_context(config.device) as context, torch.random.fork_rng():
        return _plan(Trainer(config, context), config, context)


def _plan(trainer: Trainer, config: TrainConfig, context: DistributedContext) -> dict[str, str]:
    vit = trainer.model.config.backbone.vit
    dataset = crop_dataset(config, config.images, vit, random=True)
    crops = collate([dataset[position] for position in range(config.batch_size)])
    start_s = time.perf_counter()
    maps = torch.cat([trainer.teacher(crop[None].to(context.device)) for crop in crops.teacher])
    teacher_s = (time.perf_counter() - start_s) / config.batch_size
    pixels = crops.student.to(context.device)
    step_times_s = []
    for _ in range(_MEASURED_STEPS):
        start_s = time.perf_counter()
        trainer.step(trainer.module, itertools.repeat((pixels, maps)))  # reads the loss, which synchronises the device
        step_times_s.append(time.perf_counter() - start_s)
    step_s = statistics.median(step_times_s)

    epoch_crops = config.cache or len(dataset)
    live_s = 0.0 if config.cache else teacher_s * config.batch_size * config.accumulate  # of the teacher, in a step
    cache_bytes = config.cache * 2 * (maps[0].numel() + pixels[0].numel())
    val_images = len(crop_dataset(config, config.val, vit, random=False)) if config.val else 0
    fit_crops = micro_batches_to_fit(config, context.world_size) * config.batch_size
    fit_s = 0.0 if config.cache else teacher_s * fit_crops
    total_s = config.steps * (step_s + live_s) + fit_s + config.cache * teacher_s
    peak = peak_bytes(context.device)
    trained = sum(parameter.numel() for parameter in trainer.module.parameters() if parameter.requires_grad)
    epochs = f"{epoch_crops} crops {config.steps * trainer.images_per_step / epoch_crops:.1f} times"
    return {
        "images": f"{len(dataset)} to train on, {min(val_images, config.val_images)} to validate with",
        "crops": describe_crops(config, vit.patch_px),
        "maps": f"{tuple(maps.shape[1:])}, from blocks {', '.join(map(str, trainer.model.blocks))}",
        "trained": f"{trained / 1e6:.2f} M parameters, loss L1 + {config.edge:g} edge + {config.spectral:g} spectral",
        "fit": f"blend of four maps, to {fit_crops * context.world_size} crops" + (f": {fit_s:.0f} s" if fit_s else ""),
        "steps": f"{config.steps} of {trainer.images_per_step} images: {epochs}",
        "device": f"{context.world_size} x {context.device}",
        "teacher": f"{teacher_s:.2f} s a crop" + (f"; cached once: {_gib(cache_bytes)}" if config.cache else ""),
        "step": f"{step_s:.2f} s" + ("" if config.cache else f", and {live_s:.2f} s for the teacher"),
        "in all": f"{total_s / 60:.0f} min, and validation",
        "memory": "not known" if peak is None else f"{_gib(peak)} at the most on {context.device}",
    }


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
