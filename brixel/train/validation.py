"""Validation on held-out crops: how near the averaged model's maps are to the teacher's, and the best model so far."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.fidelity import BASELINES, interpolated, l1_and_cosine, mean_of
from brixel.model.upsampler import UPSCALE
from brixel.train.checkpoint import TrainingState
from brixel.train.loader import TrainingData
from brixel.train.monitoring import Metrics, draw_crops, draw_curve
from brixel.train.setup import teacher_side_px
from brixel.train.teacher_cache import TeacherCache
from brixel.utils.devices import describe_machine

LAST = "last"


@torch.no_grad()
def validate(predict: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """Mean ``l1`` and ``cosine`` of ``predict(pixels)`` to the teacher over all crops, pixels (1, 3, S, S)."""
    pairs = (crops[index] for index in range(len(crops)))
    return mean_of([l1_and_cosine(predict(pixels[None].to(device)).cpu(), teacher[None]) for pixels, teacher in pairs])


def baselines(backbone: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """The same of the backbone's maps, upsampled by interpolation: "bilinear_l1" and so on."""
    figures: dict[str, float] = {}
    for mode in BASELINES:
        means = validate(interpolated(backbone, mode, crops[0][1].shape[1:]), crops, device)
        figures |= {f"{mode}_{name}": value for name, value in means.items()}
    return figures


class Validator:
    """Validates a model and writes to the output folder: panel, curve, the last and the best model."""

    def __init__(self, model: BrixelFeatures, data: TrainingData) -> None:
        self.model, self.data = model, data
        self.config, self.context = data.config, data.context
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

    def _facts(self, figures: Mapping[str, float]) -> dict[str, str]:
        """The training section of the model's config and card: texts by title, without names of folders."""
        config, teacher_px = self.config, teacher_side_px(self.config, self.model.patch_px)
        batch = config.batch_size * config.accumulate * self.context.world_size
        pixels = f"{teacher_px} px for the teacher, {teacher_px // UPSCALE} px for the student"
        about = f", {config.about}" if config.about else ""
        facts = {
            "images": f"{self.data.image_count}{about}; crops of {pixels}",
            "steps": f"{figures['step']} of {config.steps}, {batch} crops each; {config.optimizer}, rate {config.lr:g}",
            "loss": f"{config.l1:g} L1 + {config.edge:g} edge + {config.spectral:g} spectral",
        }
        if self.data.held_out is not None:
            title = f"on {len(self.data.held_out)} held-out crops"
            for name, text in (("cosine", "cosine to the teacher"), ("l1", "L1 to the teacher")):
                others = ", ".join(f"{mode} {figures[f'{mode}_{name}']:.4f}" for mode in BASELINES)
                facts[f"{text}, {title}"] = f"{figures[name]:.4f}; {others}"
        return facts | {"made with": f"brixel {version('brixel')}; {describe_machine(self.context.device)}"}
