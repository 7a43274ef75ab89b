"""The training loop: `distill` and its `Trainer`. Method: section 3 of `docs/method.md` (arXiv 2511.05168).

The batch and the randomness of a step are functions of seed, step and rank, so an interrupted run resumes from its last
state to the same weights. Only the upsampler (adapter and head) is trained; the average of its weights is validated.

Shapes: B batch, S side of the student's crop in pixels, D width, h x w the student's grid.
"""

import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.model_folder import ADAPTER, CONFIG, read_config
from brixel.checkpoints.weight_files import read_tensors
from brixel.errors import BrixelError, printable
from brixel.images.find_images import IMAGE_SUFFIXES
from brixel.model.losses import FeatureScale, total_loss
from brixel.model.upsampler import SecondUpsampler
from brixel.train.checkpoint import Parts, TrainingState, load_state, save_state
from brixel.train.config import TrainConfig, write_settings
from brixel.train.distributed import DistributedContext, all_reduce_mean, barrier, distributed_context, sync_batch_norm
from brixel.train.fit_blend import BlendFit, TargetScale, is_fresh, micro_batches_to_fit
from brixel.train.loader import PairDataset, Teacher, TrainingData
from brixel.train.monitoring import Metrics
from brixel.train.optim import WeightAverage, learning_rate, make_optimizer
from brixel.train.setup import prepare_model
from brixel.train.validation import Validator
from brixel.utils.atomic_files import check_output_folder, remove_unfinished
from brixel.utils.fields import short_repr
from brixel.utils.progress import progress_bar
from brixel.utils.torch_defaults import plain_defaults

SETTINGS, STATE, METRICS = "train.toml", "state.pt", "metrics.jsonl"


def distill(
    config: TrainConfig,
    *,
    model: BrixelFeatures | None = None,
    teacher: Teacher | None = None,
    crops: Sequence[PairDataset] | None = None,
) -> BrixelFeatures:
    """Train an adapter and head for a frozen backbone.

    Called again with the same settings, an interrupted run resumes from its last state in ``config.out``. Under
    `torchrun`, every process calls this. The caller's random state is left as it is.

    Args:
        config: The settings.
        model: The model to train, in place of a fresh adapter on ``config.backbone``. It is changed in place.
        teacher: From crops (B, 3, T, T), normalised as for the backbone, to maps (B, D, T/p, T/p), with T px the side
            of a crop and p px that of a patch. None: the backbone itself.
        crops: Training crops of your own in place of those of ``config.images``, a dataset for each size: item i is the
            student's crop (3, S, S), normalised, and the teacher's map (D, 4h, 4w), both float32.

    Returns:
        The best model: the averaged weights with the highest centred cosine similarity to the teacher on held-out
        crops, or the last ones without ``config.val``. `BrixelFeatures.from_pretrained` loads it from ``config.out``.

    Raises:
        BrixelError: The settings do not fit the backbone, the images or the run in ``config.out``; no image can be
            read; the disk is full; or the loss is not finite (the state before that step is saved).
    """
    if not isinstance(config, TrainConfig):
        raise BrixelError(f"config is {short_repr(config)}; expected a TrainConfig, as brixel.train.TrainConfig(...)")
    check_out(config)
    with distributed_context(config.device) as context, plain_defaults(dtype=True):
        cuda_devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(cuda_devices):
            return Trainer(config, context, model, teacher, crops).train()


def check_out(config: TrainConfig) -> None:
    """Raise BrixelError where a run cannot be written to the output folder: it is a file, or a folder of images."""
    out = Path(config.out)
    check_output_folder(out)
    for folder in (*config.images, *config.val):
        inside, given = out.resolve(), Path(folder).resolve()
        if given.is_dir() and (inside == given or given in inside.parents) and not (out / STATE).exists():
            raise BrixelError(
                f"{out} lies in {folder}, which holds images to train on; give another folder as out, or what the run "
                "draws would be among them"
            )
    if (out / SETTINGS).exists() or not out.is_dir():
        return
    if images := [entry.name for entry in os.scandir(out) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]:
        raise BrixelError(
            f"{out} holds images, such as {images[0]!r}, and no run; give another folder as out: the images belong to "
            "`images`"
        )


class Trainer:
    """One process of a training run: the model, its optimiser and the training state."""

    def __init__(
        self,
        config: TrainConfig,
        context: DistributedContext,
        model: BrixelFeatures | None = None,
        teacher: Teacher | None = None,
        crops: Sequence[PairDataset] | None = None,
    ) -> None:
        self.config, self.context, self.out, self.crops = config, context, Path(config.out), crops
        torch.manual_seed(config.seed)  # for the weights of a fresh adapter
        self.model = prepare_model(config, model).to(context.device)
        self.model_was_given = model is not None
        self.teacher: Teacher = teacher or self._backbone_teacher
        self.teacher_name = "the backbone" if teacher is None else "given in code"
        self.module = sync_batch_norm(self.model.upsampler, context)
        self.average = WeightAverage(self.module, config.ema)
        self.averaged_model = BrixelFeatures(self.model.backbone, self.average.module, self.model.config)
        self.optimizer = make_optimizer(config, self.module)
        self.parts: Parts = {"module": self.module, "average": self.average.module, "optimizer": self.optimizer}
        self.state = TrainingState(processes=context.world_size)
        self.images_per_step = config.crops_per_step(context.world_size)
        self.buffers_before: list[Tensor] = []  # the running statistics before this step

    # ---------------------------------------------------------------- the run

    def train(self) -> BrixelFeatures:
        """Take the steps that are left, and return the best model."""
        resumed = self._resume()
        data = TrainingData(
            self.config, self.model.config.backbone, self.teacher, self.teacher_name, self.context, self.crops
        )
        if not resumed:
            self._fit(data)
        metrics = Metrics(self.out / METRICS, self.state.step) if self.context.is_main else None
        validator = Validator(self.averaged_model, data)
        wrapped = self._wrap()
        micro_batches = data.micro_batches(self.state.step)
        start_s, image_count = time.perf_counter(), 0.0
        with self._progress_bar(total=self.config.steps, initial=self.state.step, unit="step") as bar:
            while self.state.step < self.config.steps:
                loss, parts = self.step(wrapped, micro_batches)
                self.state.step += 1
                image_count += self.images_per_step
                images_per_s = image_count / (time.perf_counter() - start_s)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", images_s=f"{images_per_s:.1f}")
                if metrics is not None:
                    self._write_due(metrics, validator, loss, parts, images_per_s)
                if self._is_validation_due():
                    barrier(self.context)  # which waits for days: other collectives give up within minutes
        barrier(self.context)
        if data.skipped and self.context.is_main:
            some = ", ".join(sorted(data.skipped)[:5])
            print(printable(f"brixel: {len(data.skipped)} images could not be used: {some}"), file=sys.stderr)
        return self._best_model()

    def _resume(self) -> bool:
        """Load the state in the output folder, if there is one, and write the settings; whether there was one."""
        path = self.out / STATE
        resumed = path.exists()
        if self.context.is_main:
            remove_unfinished(self.out)
        if resumed:
            self.state = load_state(path, self.config, self.parts, processes=self.context.world_size)
        barrier(self.context)
        if self.context.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_settings(self.out / SETTINGS, self.config)
        return resumed

    def _fit(self, data: TrainingData) -> None:
        """Fit a fresh blend to the first crops of the run, and measure the teacher's scale on them."""
        blend, upsampler = self.model.adapter.blend, self.model.upsampler
        fit = BlendFit(blend) if blend is not None and self.config.fit and is_fresh(blend) else None
        scale = TargetScale(upsampler) if isinstance(upsampler, SecondUpsampler) else None
        count = micro_batches_to_fit(self.config, self.context.world_size)
        if fit is None and scale is None:
            return
        micro_batches = itertools.islice(data.micro_batches(self.state.step), count)
        with self._progress_bar(micro_batches, desc="fit", total=count, unit="batch") as bar:
            for pixels, teacher in bar:
                if scale is not None:
                    scale.add(teacher)
                if fit is not None:
                    with torch.no_grad():
                        fit.add(self._block_maps(pixels), teacher)
        if scale is not None:
            scale.store(self.context)
        if fit is not None:
            fit.solve(self.context)
        self.average.module.load_state_dict(self.module.state_dict())

    def _wrap(self) -> nn.Module:
        """The module in DistributedDataParallel, where there are several processes."""
        if self.context.world_size == 1:
            return self.module
        device = self.context.device
        return DistributedDataParallel(self.module, [device] if device.type == "cuda" else None)

    def _best_model(self) -> BrixelFeatures:
        self.model.eval()
        if not self.model_was_given:
            return BrixelFeatures.from_pretrained(self.out, backbone=self.config.backbone, device=self.context.device)
        self.averaged_model.upsampler.load_state_dict(read_tensors(self.out / ADAPTER))
        self.averaged_model.config = dataclasses.replace(  # that of the best, not of the last validation
            self.averaged_model.config, training=read_config(self.out / CONFIG).training
        )
        return self.averaged_model

    # ---------------------------------------------------------------- one step

    def step(
        self, wrapped: nn.Module, micro_batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[float, dict[str, float]]:
        """Take one optimiser step; the loss and its parts, averaged over micro-batches and processes.

        ``wrapped``: the module, or DistributedDataParallel around it. ``micro_batches``: pixels (B, 3, S, S) with
        teacher maps (B, D, 4h, 4w), of which ``config.accumulate`` are read.
        """
        config = self.config
        self.module.train()
        torch.manual_seed(hash((config.seed, self.state.step, self.context.rank)))  # for stochastic depth
        self.buffers_before = [buffer.clone() for buffer in self.module.buffers()]
        losses: list[Tensor] = []  # of each micro-batch: the total, then its parts
        for index in range(config.accumulate):
            last = index == config.accumulate - 1
            with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
                total, parts = self._loss(wrapped, *next(micro_batches))
                (total / config.accumulate).backward()
            losses.append(torch.stack([total.detach(), *parts.values()]))
        loss, *means = all_reduce_mean(torch.stack(losses).mean(0), self.context).tolist()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip_norm or math.inf)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._stop(f"loss {loss}, gradient norm {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.state.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.module, self.state.step)
        return loss, dict(zip(parts, means, strict=True))

    def _loss(self, wrapped: nn.Module, pixels: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if all_reduce_mean(target.isfinite().all().float(), self.context) < 1:  # all processes stop, or none
            self._stop("the teacher's maps are not finite")
        with self._autocast():
            with torch.no_grad():
                maps = self._block_maps(pixels)
            student: Tensor = wrapped(pixels, maps)
        return total_loss(student, target, self.config.loss_weights, self._feature_scale())

    def _feature_scale(self) -> FeatureScale | None:
        upsampler = self.model.upsampler
        if not isinstance(upsampler, SecondUpsampler):
            return None
        return FeatureScale(upsampler.feature_mean, upsampler.feature_std)

    def _block_maps(self, pixels: Tensor) -> list[Tensor]:
        return self.model.backbone.block_maps(pixels, self.model.blocks)

    def _backbone_teacher(self, pixels: Tensor) -> Tensor:
        with self._autocast(), torch.no_grad():
            return self.model.backbone_features(pixels.to(self.context.device))

    def _autocast(self) -> torch.autocast:
        device_type = self.context.device.type
        return torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda")

    def _stop(self, reason: str) -> None:
        """Save the state before this step, whose weights are still finite, and raise BrixelError."""
        for buffer, before in zip(self.module.buffers(), self.buffers_before, strict=True):
            buffer.copy_(before)
        self._save_state()
        raise BrixelError(
            f"step {self.state.step}: {reason}; training stops here. The state before this step is saved in "
            f"{self.out / STATE}; check the images of this batch, or try a smaller lr in another output folder"
        )

    # ---------------------------------------------------------------- output

    def _progress_bar(self, iterable: Any = None, **options: Any) -> Any:
        """A progress bar on rank 0, on a terminal."""
        return progress_bar(iterable, disable=not self.context.is_main, **options)

    def _write_due(
        self, metrics: Metrics, validator: Validator, loss: float, parts: dict[str, float], images_per_s: float
    ) -> None:
        """Write what is due after this step: a line of metrics, a validation, the state."""
        config, step = self.config, self.state.step
        last = step == config.steps
        if step % config.log_every == 0 or last:
            lr = learning_rate(config, step - 1)
            metrics.add({"step": step, "loss": loss, **parts, "lr": lr, "pictures_per_s": round(images_per_s, 2)})
            if sys.stderr is not None and not sys.stderr.isatty():
                left_s = (config.steps - step) * self.images_per_step / images_per_s
                line = f"step {step}/{config.steps} loss {loss:.4f}, {images_per_s:.1f} images/s, {left_s:.0f} s left"
                print(line, file=sys.stderr, flush=True)
        if self._is_validation_due():
            validator.run(self.state, metrics)
        if step % config.save_every == 0 or last:
            self._save_state()

    def _is_validation_due(self) -> bool:
        return self.state.step % self.config.val_every == 0 or self.state.step == self.config.steps

    def _save_state(self) -> None:
        if self.context.is_main:
            save_state(self.out / STATE, self.config, self.state, self.parts)
