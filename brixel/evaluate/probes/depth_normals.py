"""Depth and surface normals by a small convolutional readout on frozen features: how much shape do features tell.

Trained at the cells' centres, judged at the data's own pixels after bilinear upsampling. Of depth the logarithm is read
out. Images are cut to their centre squares; figures are taken of one image and then averaged.

Shapes: D channels, C = 1 (depth) or 3 (normals), h x w cells, H x H pixels.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from brixel.errors import BrixelError
from brixel.evaluate import metrics
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.depth_normals import MeasuredImages
from brixel.evaluate.datasets.labelled import centre_square
from brixel.evaluate.feature_cache import features_of
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.probes.training import Maps, Probe, ProbeSettings, convolutional_readout, train_probe
from brixel.evaluate.report import Report
from brixel.images.crops import DOWNSAMPLING
from brixel.utils.devices import describe_machine

_LOG = logging.getLogger("brixel")
CONVOLUTIONAL = ProbeSettings(steps=300, batch_size=8, learning_rates=(3e-4, 1e-3, 3e-3))
BASE = "bilinear"
_FIRST = {"depth": "rmse", "normals": "mean_deg"}  # what is told of with an interval
_COLUMNS = {
    "depth": {"rmse": ("RMSE, m", ".4f"), "abs_rel": ("abs-rel", ".4f"), "delta1": ("delta1", ".4f")},
    "normals": {
        **{"mean_deg": ("mean, deg", ".2f"), "median_deg": ("median, deg", ".2f"), "within_11.25": ("11.25", ".1%")},
        **{"within_22.5": ("22.5", ".1%"), "within_30": ("30", ".1%")},
    },
}


def probe_shape(
    kind: str,
    source: FeatureSource,
    train: MeasuredImages,
    val: MeasuredImages,
    teacher_px: int,
    *,
    settings: ProbeSettings = CONVOLUTIONAL,
    cache: Path | None = None,
) -> tuple[Probe, list[dict[str, float]]]:
    """Train a readout for "depth" or "normals" on ``train``; it, and its figures on each image of ``val``.

    Every image of ``val`` has a value in its centre square; :func:`leave_out_empty` sees to it.
    """
    images = [each.image for data in (train, val) for each in data.samples]
    fitted, judged = features_of(source, images, teacher_px, cache, keep=len(train.samples)).split(len(train.samples))
    targets = _targets(kind, train, fitted[0].shape[-2:])
    loss_of, figures = (_depth_loss, _depth_figures) if kind == "depth" else (_normals_loss, _normals_figures)
    offset = _mean_log(targets) if kind == "depth" else 0.0

    def new(width: int) -> nn.Module:
        readout = convolutional_readout(width, 1 if kind == "depth" else 3)
        nn.init.constant_(readout[-1].get_parameter("bias"), offset)
        return readout

    def loss(outputs: Tensor, images: Sequence[int]) -> Tensor:
        return loss_of(outputs, targets[list(images)])

    def score(readout: nn.Module, images: Sequence[int]) -> float:
        return -sum(float(loss(readout(fitted[number][None]), [number])) for number in images)

    probe = train_probe(new, Maps(fitted), loss, score, settings)
    found = []
    for number in tqdm(range(len(val.samples)), f"images, {source.name}", disable=None):
        target = centre_square(val.target(number))
        with torch.no_grad():
            output = probe.readout(judged[number][None])
            output = F.interpolate(output, size=target.shape[-2:], mode="bilinear", align_corners=False)
        found.append(figures(output[0], target))
    return probe, found


def shape(
    kind: str,
    sources: Sequence[FeatureSource],
    train: MeasuredImages,
    val: MeasuredImages,
    teacher_px: Sequence[int],
    *,
    model: str,
    settings: ProbeSettings = CONVOLUTIONAL,
    cache: Path | None = None,
) -> Report:
    """Depth or normals of several sources at several sizes; ``model``: what they are of, for the table."""
    (train, val), left_out = leave_out_empty(kind, (train, val))
    rows: list[dict[str, Any]] = []
    first = _FIRST[kind]
    for side in teacher_px:
        base: Tensor | None = None
        for source in sources:
            probe, found = probe_shape(kind, source, train, val, side, settings=settings, cache=cache)
            values = {key: torch.tensor([each[key] for each in found], dtype=torch.float64) for key in found[0]}
            row: dict[str, Any] = {"model": model, "image_px": side * source.scale // DOWNSAMPLING}
            row |= {"source": source.name, **{key: float(each.mean()) for key, each in values.items()}}
            row["learning_rate"], row["interval"] = probe.learning_rate, interval(values[first])
            if source.name == BASE:
                base = values[first]
            elif base is not None:
                row["change"] = interval(values[first] - base)
            rows.append(row)
    form = "+.3f" if kind == "depth" else "+.2f"
    columns = {
        **{"model": ("model", ""), "image_px": ("image, px", "d"), "source": ("source", "")},
        **_COLUMNS[kind],
        "interval": (f"{_COLUMNS[kind][first][0]}, 95 %", form[1:]),
        "change": ("over bilinear, 95 % (below 0 is better)", form),
    }
    recipe = (
        f"{val.name}: {len(train.samples)} images to fit, {len(val.samples)} to report, centre squares; {left_out}"
        f"{settings.steps} steps of {settings.batch_size} images, seed {settings.seed}, learning rate of "
        f"{', '.join(f'{rate:g}' for rate in settings.learning_rates)} chosen on {settings.held_out:.0%} of the "
        f"images to fit; {describe_machine(torch.device(sources[0].device))}."
    )
    title = "Depth by a convolutional readout" if kind == "depth" else "Surface normals by a convolutional readout"
    return Report(kind, title, columns, rows, recipe)


def leave_out_empty(kind: str, splits: Sequence[MeasuredImages]) -> tuple[list[MeasuredImages], str]:
    """The splits less the images without a value in their centre square, and how many these are, for a recipe.

    Raises BrixelError where none is left of a split.
    """
    kept, empty = [], []
    for data in splits:
        numbers = tqdm(range(len(data.samples)), f"{kind}, {data.name}", disable=None)
        having = [bool(_known(kind, centre_square(data.target(number))[None]).any()) for number in numbers]
        without = [sample.target for sample, has in zip(data.samples, having, strict=True) if not has]
        if len(without) == len(having):
            first = f", the first {without[0]}" if without else ""
            raise BrixelError(
                f"none of {len(having)} images of {data.name} has {kind} in its centre square{first}; expected such "
                "images both to fit and to report"
            )
        kept.append(replace(data, samples=[sample for sample, has in zip(data.samples, having, strict=True) if has]))
        empty += without
    if not empty:
        return kept, ""
    said = f"{len(empty)} of {sum(len(data.samples) for data in splits)} images without a value left out"
    _LOG.warning("%s: %s, the first %s", kind, said, empty[0])
    return kept, f"{said}; "


def _targets(kind: str, data: MeasuredImages, grid_hw: Sequence[int]) -> Tensor:
    """What was measured at the cells' centres, (N, C, h, w)."""
    squares = (centre_square(data.target(number))[None] for number in range(len(data.samples)))
    targets = torch.cat([F.interpolate(each, size=tuple(grid_hw), mode="nearest-exact") for each in squares])
    if not _known(kind, targets).any():
        cells = " x ".join(map(str, grid_hw))
        raise BrixelError(f"no image of {data.name} has {kind} at the centre of any of its {cells} cells")
    return targets


def _known(kind: str, targets: Tensor) -> Tensor:
    """Where there is a value, (B, C, H, W) -> (B, H, W)."""
    return targets[:, 0] > 0 if kind == "depth" else targets.square().sum(1) > 1e-6


def _mean_log(depth: Tensor) -> float:
    """Mean logarithm of what was measured, of which there is some."""
    return float(depth[depth > 0].log().mean())


def _depth_loss(outputs: Tensor, depth: Tensor) -> Tensor:
    """Mean absolute difference of logarithms where there is a depth, (B, 1, h, w)."""
    known = depth > 0
    difference = (outputs - depth.clamp(min=1e-6).log()).abs()
    return (difference * known).sum() / known.sum().clamp(min=1)


def _normals_loss(outputs: Tensor, normals: Tensor) -> Tensor:
    """Mean of 1 - cosine where there is a normal, (B, 3, h, w)."""
    known = _known("normals", normals)
    cosine = F.cosine_similarity(outputs, normals, dim=1)
    return ((1 - cosine) * known).sum() / known.sum().clamp(min=1)


def _depth_figures(output: Tensor, depth: Tensor) -> dict[str, float]:
    return metrics.depth_errors(output.exp(), depth)


def _normals_figures(output: Tensor, normals: Tensor) -> dict[str, float]:
    return metrics.normal_errors(metrics.angles(output, normals))
