"""What a run would do and cost, told before it begins: `brixel train --dry-run`. Nothing is written."""

import itertools
import statistics
import time
from pathlib import Path

import torch

from brixel.train.config import TrainConfig
from brixel.train.data import collate, find_training_images
from brixel.train.distributed import World, joined
from brixel.train.setup import passes_to_fit
from brixel.train.trainer import Run
from brixel.utils.memory import peak_bytes

_MEASURED_STEPS = 3


def plan(config: TrainConfig) -> dict[str, str]:
    """Sizes, steps, epochs, disk and memory, and times measured on a few steps; each by name, as text.

    Raises BrixelError for whatever would stop the run itself at its start.
    """
    with joined(config.device) as world, torch.random.fork_rng():
        return _plan(Run(config, world, None, None), config, world)


def _plan(run: Run, config: TrainConfig, world: World) -> dict[str, str]:
    dataset = run.dataset(config.images, random=True)
    crops = collate([dataset[position] for position in range(config.batch_size)])
    started = time.perf_counter()
    maps = torch.cat([run.teacher(crop[None].to(world.device)) for crop in crops.teacher])
    teacher_s = (time.perf_counter() - started) / config.batch_size
    pixels = crops.student.to(world.device)
    steps_s = []
    for _ in range(_MEASURED_STEPS):
        started = time.perf_counter()
        run.step(run.module, itertools.repeat((pixels, maps)))  # reads its loss back: the device is done
        steps_s.append(time.perf_counter() - started)
    step_s = statistics.median(steps_s)

    per_step = config.batch_size * config.accumulate * world.size
    length = config.cache or len(dataset)
    live_s = 0.0 if config.cache else teacher_s * config.batch_size * config.accumulate
    cache_bytes = config.cache * 2 * (maps[0].numel() + pixels[0].numel())
    validated = len(find_training_images([Path(each) for each in config.val])) if config.val else 0
    fitted = passes_to_fit(config, world.size) * config.batch_size
    fit_s = 0.0 if config.cache else teacher_s * fitted
    all_s = config.steps * (step_s + live_s) + fit_s + config.cache * teacher_s
    peak = peak_bytes(world.device)
    trained = sum(each.numel() for each in run.module.parameters() if each.requires_grad)
    return {
        "images": f"{len(dataset)} to train on, {min(validated, config.val_images)} to validate with",
        "crops": f"{run.teacher_px} px for the teacher, {run.teacher_px // 4} px for the student",
        "maps": f"{tuple(maps.shape[1:])}, from blocks {', '.join(map(str, run.model.blocks))}",
        "trained": f"{trained / 1e6:.2f} M parameters, loss L1 + {config.edge:g} edge + {config.spectral:g} spectral",
        "fit": f"blend of four maps, to {fitted * world.size} crops" + (f": {fit_s:.0f} s" if fit_s else ""),
        "steps": f"{config.steps} of {per_step} images: {length} crops {config.steps * per_step / length:.1f} times",
        "device": f"{world.size} x {world.device}",
        "teacher": f"{teacher_s:.2f} s a crop" + (f"; cached once: {_gib(cache_bytes)}" if config.cache else ""),
        "step": f"{step_s:.2f} s" + ("" if config.cache else f", and {live_s:.2f} s for the teacher"),
        "in all": f"{all_s / 60:.0f} min, and validation",
        "memory": "not known" if peak is None else f"{_gib(peak)} at the most on {world.device}",
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
