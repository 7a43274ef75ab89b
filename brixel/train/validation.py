"""Validation on held-out crops: how near the averaged model's maps are to the teacher's, and the best model so far."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.bootstrap import by_metric
from brixel.evaluate.feature_sources import BASE
from brixel.evaluate.fidelity import (
    BASELINES,
    better_count,
    centred_metrics,
    edges_of_one,
    interpolated,
    l1_and_cosine,
    mean_feature,
    r2,
)
from brixel.train.checkpoint import TrainingState
from brixel.train.loader import TrainingData
from brixel.train.monitoring import Metrics, draw_crops, draw_curve
from brixel.train.setup import describe_crops, describe_loss
from brixel.train.teacher_cache import TeacherCache
from brixel.utils.devices import describe_machine

LAST = "last"


class HeldOut:
    """Held-out crops with the teacher's mean feature, its edges, and the figures of interpolation, all measured once.

    Args:
        crops: Pixels (3, S, S) and the teacher's maps (D, h, w).
        backbone: From pixels (1, 3, S, S) to the backbone's own map, which is interpolated.
        device: Where maps are computed.
    """

    @torch.no_grad()
    def __init__(self, crops: TeacherCache, backbone: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.crops, self.device = crops, device
        self.mean = mean_feature(crops[index][1][None] for index in range(len(crops)))  # D
        # of this process alone, as no other one validates
        self.edges = [edges_of_one(crops[index][1][None].to(device)).cpu() for index in range(len(crops))]
        grid_hw = crops[0][1].shape[1:]
        metrics = {mode: self._metrics(interpolated(backbone, mode, grid_hw)) for mode in BASELINES}
        self._base = metrics[BASE]
        self.baselines = {
            f"{mode}_{name}": value for mode in BASELINES for name, value in _figures(metrics[mode]).items()
        }

    def validate(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Figures of ``predict(pixels)`` over all crops, pixels (1, 3, S, S), and those of the baselines.

        ``better_than_bilinear`` is the share of crops with a higher cosine than bilinear's, and
        ``centred_better_than_bilinear`` that with a higher centred cosine.
        """
        metrics = self._metrics(predict)
        better, centred = (
            better_count(metrics[name], self._base[name]) / len(self.crops) for name in ("cosine", "centred_cosine")
        )
        shares = {"better_than_bilinear": better, "centred_better_than_bilinear": centred}
        return _figures(metrics) | shares | self.baselines

    @torch.no_grad()
    def _metrics(self, predict: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        records = []
        for index, edges in enumerate(self.edges):
            pixels, teacher = self.crops[index]
            maps = predict(pixels[None].to(self.device)).cpu()
            centred = centred_metrics(maps, teacher[None], self.mean, edges)
            records.append(l1_and_cosine(maps, teacher[None]) | centred)
        return by_metric(records)


def _figures(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over crops of metrics by crop, and R2."""
    names = ("l1", "cosine", "centred_cosine", "centred_cosine_edges")
    return {name: sum(metrics[name].tolist()) / len(metrics[name]) for name in names} | {"r2": r2(metrics)[0]}


class Validator:
    """Validates a model at every size, and writes to the output folder: panel, curve, the last and the best model."""

    def __init__(self, model: BrixelFeatures, data: TrainingData) -> None:
        self.model, self.data = model, data
        self.config, self.context = data.config, data.context
        self.held_out: list[HeldOut] = []  # by size, measured at the first validation

    def run(self, state: TrainingState, metrics: Metrics) -> None:
        """Validate after step ``state.step``, log the result, and save the model; updates ``state.best``."""
        out, device = Path(self.config.out), self.context.device
        self.model.eval()
        record: dict[str, float] = {"step": state.step}
        if self.data.held_out:
            record |= self._figures()
            metrics.add(record)
            draw_crops(out / f"panel-{state.step:06d}.png", self.model, self.data.held_out[-1], device)
        draw_curve(out / "curve.png", metrics.records())
        self.model.config = dataclasses.replace(self.model.config, training=self._facts(record))
        self.model.save_pretrained(out / LAST)
        # raw cosine also rises where maps shrink towards the mean feature; without validation, the last model is best
        score = record.get("centred_cosine", state.step)
        if state.best is None or score > state.best:
            state.best = score
            self.model.save_pretrained(out)

    def _figures(self) -> dict[str, float]:
        """The figures averaged over the sizes and, where there are several, those of each, by name and size."""
        if not self.held_out:
            device = self.context.device
            self.held_out = [HeldOut(crops, self.model.backbone_features, device) for crops in self.data.held_out]
        by_size = [held_out.validate(self.model) for held_out in self.held_out]
        means = {name: sum(figures[name] for figures in by_size) / len(by_size) for name in by_size[0]}
        if len(by_size) > 1:
            for size, figures in zip(self.config.sizes, by_size, strict=True):
                means |= {f"{name}_{size}px": value for name, value in figures.items()}
        return means

    def _facts(self, figures: Mapping[str, float]) -> dict[str, str]:
        """The training section of the model's config and card: texts by title, without names of folders."""
        config = self.config
        batch = f"{config.crops_per_step(self.context.world_size):g} crops each"
        about = f", {config.about}" if config.about else ""
        facts = {
            "images": f"{self.data.content}{about}; crops of {describe_crops(config, self.model.patch_px)}",
            "steps": f"{figures['step']} of {config.steps}, {batch}; {config.optimizer}, rate {config.lr:g}",
            "loss": describe_loss(config),
        }
        if self.data.held_out:
            title = f"on {len(self.data.held_out[0])} held-out crops"
            for name, text in (
                ("cosine", "cosine to the teacher"),
                ("centred_cosine", "centred cosine to the teacher"),
                ("l1", "L1 to the teacher"),
            ):
                others = ", ".join(f"{mode} {figures[f'{mode}_{name}']:.4f}" for mode in BASELINES)
                facts[f"{text}, {title}"] = f"{figures[name]:.4f}; {others}"
        return facts | {"made with": f"brixel {version('brixel')}; {describe_machine(self.context.device)}"}
