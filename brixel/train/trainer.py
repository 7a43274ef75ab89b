"""The training run: `distill` and what it is made of. Method: section 3 of `docs/method.md` (arXiv 2511.05168).

A step's batch and randomness are functions of seed, step and rank, so that a run which was killed goes on from its last
state to the same weights. Only the adapter and head are trained, wrapped for several processes and averaged.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.model_folder import ADAPTER
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError
from brixel.images.crops import CropSettings
from brixel.model.losses import total_loss
from brixel.train.checkpoint import Average, Progress, load_state, save_state
from brixel.train.config import TrainConfig, write_settings
from brixel.train.data import CropDataset, find_training_images
from brixel.train.distributed import World, joined, mean_over_all, synchronised, wait_for_all
from brixel.train.fit_blend import fit_blend, is_fresh
from brixel.train.loader import batches
from brixel.train.metrics_log import Metrics
from brixel.train.monitoring import draw_crops, draw_curve
from brixel.train.setup import learning_rate, make_optimizer, passes_to_fit, prepared_model, teacher_side
from brixel.train.teacher_cache import TeacherCache
from brixel.train.training_facts import training_facts
from brixel.train.validation import baselines, validate

SETTINGS, STATE, METRICS, LAST = "train.toml", "state.pt", "metrics.jsonl", "last"

Teacher = Callable[[Tensor], Tensor]


def distill(
    config: TrainConfig, *, model: BrixelFeatures | None = None, teacher: Teacher | None = None
) -> BrixelFeatures:
    """Train an adapter and head, and return the best model; it also lies in ``config.out``, for `from_pretrained`.

    Started again with the same settings, a run goes on where its last state was written. Under `torchrun` every process
    calls this. ``model``: what to train, in place of a fresh adapter on ``config.backbone``. ``teacher``: (B, 3, T, T),
    normalised as for the backbone -> (B, D, T/p, T/p), in place of the backbone itself on the large image.
    Raises BrixelError for settings that do not go together, a run with other settings in ``out``, a loss that is not
    finite (the last good state is kept).
    """
    with joined(config.device) as world, torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        run = Run(config, world, model, teacher)
        return run.train()


class Run:
    """One process's part in a run, and its state."""

    def __init__(
        self, config: TrainConfig, world: World, model: BrixelFeatures | None, teacher: Teacher | None
    ) -> None:
        self.config, self.world, self.out = config, world, Path(config.out)
        torch.manual_seed(config.seed)  # of the fresh adapter's weights
        self.model = prepared_model(config, model).to(world.device)
        self.teacher_px = teacher_side(config, self.model.patch_px)
        self.teacher: Teacher = teacher or self._own_teacher
        self.teacher_name = "the backbone" if teacher is None else "given in code"
        self.module = synchronised(self.model.upsampler, world)
        self.average = Average(self.module, config.ema)
        self.kept = BrixelFeatures(self.model.backbone, self.average.module, self.model.config)
        self.optimizer = make_optimizer(config, self.module)
        self.progress = Progress(processes=world.size)
        self.given = model is not None
        self.buffers: list[Tensor] = []  # the running statistics of before this step
        self.plain: dict[str, float] = {}  # what interpolation gives on the held-out crops, once it was measured
        self.skipped: set[str] = set()
        self.image_count = 0  # found to train on

    # ---------------------------------------------------------------- the run

    def train(self) -> BrixelFeatures:
        """All steps that are left; the best model."""
        taken_up = self._begin()
        source, held_out = self._source(), self._held_out()
        if not taken_up:
            self._fit(source)
        metrics = Metrics(self.out / METRICS, self.progress.step) if self.world.leads else None
        wrapped = self._wrapped()
        bar = tqdm(
            total=self.config.steps, initial=self.progress.step, unit="step", disable=None if self.world.leads else True
        )
        started, images = time.perf_counter(), 0
        passes = self._passes(source)
        while self.progress.step < self.config.steps:
            loss, parts = self.step(wrapped, passes)
            self.progress.step += 1
            images += self.config.batch_size * self.config.accumulate * self.world.size
            rate = images / (time.perf_counter() - started)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{rate:.1f}")
            if metrics is not None:
                self._write(metrics, held_out, loss, parts, rate)
        bar.close()
        wait_for_all(self.world)
        self._say_skipped()
        self.model.eval()
        if not self.given:
            return BrixelFeatures.from_pretrained(self.out, backbone=self.config.backbone, device=self.world.device)
        self.kept.upsampler.load_state_dict(read_tensors(self.out / ADAPTER))
        return self.kept

    def _begin(self) -> bool:
        """Take up the state in ``out``, if there is one, and write down the settings; whether there was one."""
        state = self.out / STATE
        taken_up = state.exists()
        if taken_up:
            self.progress = load_state(
                state, self.config, self.module, self.average, self.optimizer, processes=self.world.size
            )
        wait_for_all(self.world)
        if self.world.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            write_settings(self.out / SETTINGS, self.config)
        return taken_up

    def _passes(self, source: CropDataset | TeacherCache) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            self.config, source, self.teacher, self.world, start_step=self.progress.step, skipped=self.skipped
        )

    def _fit(self, source: CropDataset | TeacherCache) -> None:
        """Fit a fresh blend to the first crops of the run; one that was trained before is left alone."""
        blend, number = self.model.adapter.blend, passes_to_fit(self.config, self.world.size)
        if blend is None or not number or not is_fresh(blend):
            return
        bar = tqdm(
            itertools.islice(self._passes(source), number),
            desc="fit",
            total=number,
            unit="pass",
            disable=None if self.world.leads else True,
        )
        fit_blend(blend, lambda pixels: self.model.backbone.block_maps(pixels, self.model.blocks), bar, self.world)
        self.average.module.load_state_dict(self.module.state_dict())

    def _wrapped(self) -> nn.Module:
        if self.world.size == 1:
            return self.module
        return DistributedDataParallel(self.module, [self.world.device] if self.world.device.type == "cuda" else None)

    # ---------------------------------------------------------------- a step

    def step(self, wrapped: nn.Module, passes: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, float]]:
        """One step of the optimiser: its loss and the loss's parts, means over all processes."""
        config = self.config
        self.module.train()
        torch.manual_seed(hash((config.seed, self.progress.step, self.world.rank)))  # of stochastic depth
        self.buffers = [buffer.clone() for buffer in self.module.buffers()]
        figures: list[Tensor] = []  # of each pass: the total, then its parts
        for number in range(config.accumulate):
            last = number == config.accumulate - 1
            quiet = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()
            with quiet:
                total, parts = self._loss(wrapped, *next(passes))
                (total / config.accumulate).backward()
            figures.append(torch.stack([total.detach(), *parts.values()]))
        loss, *means = mean_over_all(torch.stack(figures).mean(0), self.world).tolist()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip_norm or math.inf)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop(f"loss {loss}, gradient norm {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.module, self.progress.step)
        return loss, dict(zip(parts, means, strict=True))

    def _loss(self, wrapped: nn.Module, pixels: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if mean_over_all(target.isfinite().all().float(), self.world) < 1:  # all stop, or none
            self._stop("the teacher's maps are not finite")
        with self._autocast():
            with torch.no_grad():
                maps = self.model.backbone.block_maps(pixels, self.model.blocks)
            student = wrapped(pixels, maps)
        return total_loss(student, target, self.config.loss_weights)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.world.device.type == "cuda")

    def _own_teacher(self, pixels: Tensor) -> Tensor:
        with self._autocast(), torch.no_grad():
            return self.model.backbone_features(pixels.to(self.world.device))

    def _stop(self, reason: str) -> None:
        """Something is not finite. The weights of before this step are still good: keep them, and stop."""
        for buffer, before in zip(self.module.buffers(), self.buffers, strict=True):
            buffer.copy_(before)
        self._save()
        raise BrixelError(
            f"step {self.progress.step}: {reason}; training stops here. The state before this step is kept in "
            f"{self.out / STATE}; look at the images of this batch, or try a smaller lr with another --out"
        )

    # ---------------------------------------------------------------- images

    def dataset(self, folders: Sequence[str], *, random: bool) -> CropDataset:
        """The crops of the images in ``folders``, drawn for training or, where not ``random``, cut for validation."""
        config, vit = self.config, self.model.config.backbone.vit
        settings = CropSettings(self.teacher_px, config.max_zoom, config.flip, config.small, config.seed, random)
        images = find_training_images([Path(folder) for folder in folders])
        return CropDataset(images, settings, mean=vit.mean, std=vit.std)

    def _cached(self, dataset: CropDataset, count: int, folder: Path) -> TeacherCache:
        """A cache that the leading process builds and all open."""
        if self.world.leads:
            backbone = self.model.config.backbone
            who = {"name": self.teacher_name, "vit": dataclasses.asdict(backbone.vit), "weights": backbone.fingerprint}
            bar = tqdm(total=count, desc="teacher", unit="crop", disable=None)
            TeacherCache.build_or_open(
                folder,
                dataset=dataset,
                count=count,
                teacher=self.teacher,
                teacher_id=who,
                workers=self.config.workers,
                progress=lambda done, _: _advance(bar, done),
            )
            bar.close()
        wait_for_all(self.world)
        cache = TeacherCache(folder)
        self.skipped.update(cache.skipped)
        return cache

    def _source(self) -> CropDataset | TeacherCache:
        dataset = self.dataset(self.config.images, random=True)
        self.image_count = len(dataset)
        if not self.config.cache:
            return dataset
        return self._cached(dataset, self.config.cache, Path(self.config.cache_dir or self.out / "cache"))

    def _held_out(self) -> TeacherCache | None:
        if not self.config.val or not self.config.val_images:
            return None
        dataset = self.dataset(self.config.val, random=False)
        return self._cached(dataset, min(len(dataset), self.config.val_images), self.out / "val")

    # ---------------------------------------------------------------- what is written

    def _write(
        self, metrics: Metrics, held_out: TeacherCache | None, loss: float, parts: dict[str, float], rate: float
    ) -> None:
        """What is due after this step: a line of metrics, a validation, a state."""
        config, step = self.config, self.progress.step
        last = step == config.steps
        if step % config.log_every == 0 or last:
            lr = learning_rate(config, step - 1)
            metrics.add({"step": step, "loss": loss, **parts, "lr": lr, "pictures_per_s": round(rate, 2)})
            if not sys.stderr.isatty():
                left = (config.steps - step) * config.batch_size * config.accumulate * self.world.size / rate
                told = f"step {step}/{config.steps} loss {loss:.4f}, {rate:.1f} images/s, {left:.0f} s left"
                print(told, file=sys.stderr, flush=True)
        if step % config.val_every == 0 or last:
            self._validate(metrics, held_out)
        if step % config.save_every == 0 or last:
            self._save()

    def _validate(self, metrics: Metrics, held_out: TeacherCache | None) -> None:
        self.kept.eval()
        record: dict[str, Any] = {"step": self.progress.step}
        if held_out is not None:
            record |= validate(self.kept, held_out, self.world.device)
            self.plain = self.plain or baselines(self.kept.backbone_features, held_out, self.world.device)
            metrics.add(record | self.plain)
            draw_crops(self.out / f"panel-{self.progress.step:06d}.png", self.kept, held_out, self.world.device)
        draw_curve(self.out / "curve.png", metrics.records())
        self.kept.config = dataclasses.replace(self.kept.config, training=self._facts(record, held_out))
        self.kept.save_pretrained(self.out / LAST)
        score = record.get("cosine", self.progress.step)  # without validation the latest is the best there is
        if self.progress.best is None or score > self.progress.best:
            self.progress.best = score
            self.kept.save_pretrained(self.out)

    def _facts(self, record: dict[str, float], held_out: TeacherCache | None) -> dict[str, str]:
        return training_facts(
            self.config,
            images=self.image_count,
            held_out=len(held_out) if held_out is not None else 0,
            teacher_px=self.teacher_px,
            processes=self.world.size,
            figures=record | self.plain,
            device=self.world.device,
        )

    def _save(self) -> None:
        if self.world.leads:
            save_state(self.out / STATE, self.config, self.progress, self.module, self.average, self.optimizer)

    def _say_skipped(self) -> None:
        if self.skipped and self.world.leads:
            some = ", ".join(sorted(self.skipped)[:5])
            print(f"brixel: {len(self.skipped)} images could not be used: {some}", file=sys.stderr)


def _advance(bar: "tqdm[Any]", done: int) -> None:
    bar.update(done - bar.n)
