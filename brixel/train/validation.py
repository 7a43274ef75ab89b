"""Validation on held-out crops: how near the averaged model's maps are to the teacher's, and the best model so far."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.fidelity import BASELINES, interpolated, l1_and_cosine, mean_of
from brixel.train.checkpoint import TrainingState
from brixel.train.config import TrainConfig
from brixel.train.distributed import DistributedContext
from brixel.train.loader import TrainingData
from brixel.train.metrics_log import Metrics
from brixel.train.monitoring import draw_crops, draw_curve
from brixel.train.setup import teacher_side_px
from brixel.train.teacher_cache import TeacherCache
from brixel.train.training_facts import training_facts

LAST = "last"


def validate(predict: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """Mean ``l1`` and ``cosine`` of ``predict(pixels)`` to the teacher over all crops, pixels (1, 3, S, S)."""
    results: list[dict[str, float]] = []
    with torch.no_grad():
        for index in range(len(crops)):
            pixels, teacher = crops[index]
            results.append(l1_and_cosine(predict(pixels[None].to(device)).cpu(), teacher[None]))
    return mean_of(results)


def baselines(backbone: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """The same of the backbone's maps, upsampled by interpolation: "bilinear_l1" and so on."""
    figures: dict[str, float] = {}
    for mode in BASELINES:
        means = validate(interpolated(backbone, mode, crops[0][1].shape[1:]), crops, device)
        figures |= {f"{mode}_{name}": value for name, value in means.items()}
    return figures


class Validator:
    """Validates a model and writes to the output folder: panel, curve, the last and the best model."""

    def __init__(
        self, config: TrainConfig, model: BrixelFeatures, data: TrainingData, context: DistributedContext
    ) -> None:
        self.config, self.model, self.data, self.context = config, model, data, context
        self.baselines: dict[str, float] = {}  # measured at the first validation

    def run(self, state: TrainingState, metrics: Metrics) -> None:
        """Validate after step ``state.step``, log the result, and save the model; updates ``state.best``."""
        out, held_out, device = Path(self.config.out), self.data.held_out, self.context.device
        self.model.eval()
        record: dict[str, float] = {"step": state.step}
        if held_out is not None:
            record |= validate(self.model, held_out, device)
            self.baselines = self.baselines or baselines(self.model.backbone_features, held_out, device)
            record |= self.baselines
            metrics.add(record)
            draw_crops(out / f"panel-{state.step:06d}.png", self.model, held_out, device)
        draw_curve(out / "curve.png", metrics.records())
        self.model.config = dataclasses.replace(self.model.config, training=self._facts(record))
        self.model.save_pretrained(out / LAST)
        score = record.get("cosine", state.step)  # without validation, the last model counts as the best
        if state.best is None or score > state.best:
            state.best = score
            self.model.save_pretrained(out)

    def _facts(self, record: dict[str, float]) -> dict[str, str]:
        return training_facts(
            self.config,
            images=self.data.image_count,
            held_out=len(self.data.held_out or ()),
            teacher_px=teacher_side_px(self.config, self.model.patch_px),
            processes=self.context.world_size,
            figures=record,
            device=self.context.device,
        )
