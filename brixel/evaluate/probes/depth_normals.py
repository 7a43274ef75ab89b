"""Depth and surface normals by a small convolutional readout on frozen features.

Trained at the cells' centres, evaluated at the data's own pixels after bilinear upsampling. The readout gives the
logarithm of the depth. Images are cut to their centre squares; metrics are computed per image and then averaged.

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

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import by_metric, interval
from brixel.evaluate.datasets.labelled import LabelledDataset, centre_square
from brixel.evaluate.feature_cache import features_of
from brixel.evaluate.feature_sources import BASE, FeatureSource
from brixel.evaluate.metrics import angles, depth_errors, normal_errors
from brixel.evaluate.probes.training import Maps, Probe, ProbeSettings, convolutional_readout, train_probe
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar

_LOG = logging.getLogger("brixel")
CONVOLUTIONAL = ProbeSettings(steps=300, batch_size=8, learning_rates=(3e-4, 1e-3, 3e-3))
_TITLES = {"depth": "Depth by a convolutional readout", "normals": "Surface normals by a convolutional readout"}
_COLUMNS = {  # the first metric is the one with an interval
    "depth": {"rmse": ("RMSE, m", ".4f"), "abs_rel": ("abs-rel", ".4f"), "delta1": ("delta1", ".4f")},
    "normals": {
        **{"mean_deg": ("mean, deg", ".2f"), "median_deg": ("median, deg", ".2f"), "within_11.25": ("11.25", ".1%")},
        **{"within_22.5": ("22.5", ".1%"), "within_30": ("30", ".1%")},
    },
}


def probe_depth_normals(
    kind: str,
    source: FeatureSource,
    train: LabelledDataset,
    val: LabelledDataset,
    teacher_px: int,
    *,
    settings: ProbeSettings = CONVOLUTIONAL,
    cache: Path | None = None,
) -> tuple[Probe, list[dict[str, float]]]:
    """Train a readout for "depth" or "normals" on ``train``; the readout, and its metrics on each image of ``val``.

    Every image of ``val`` must have a value in its centre square, see :func:`leave_out_empty`.
    """
    images = [sample.image for data in (train, val) for sample in data.samples]
    features = features_of(source, images, teacher_px, cache, keep=len(train.samples))
    fitted, evaluated = features.split(len(train.samples))
    targets = _targets(kind, train, fitted[0].shape[-2:])
    offset = float(targets[targets > 0].log().mean()) if kind == "depth" else 0.0

    def new(width: int) -> nn.Module:
        readout = convolutional_readout(width, 1 if kind == "depth" else 3)
        nn.init.constant_(readout[-1].get_parameter("bias"), offset)
        return readout

    def loss(outputs: Tensor, images: Sequence[int]) -> Tensor:
        return _loss(kind, outputs, targets[list(images)])

    def score(readout: nn.Module, images: Sequence[int]) -> float:
        return -sum(float(loss(readout(fitted[index][None]), [index])) for index in images)

    probe = train_probe(new, Maps(fitted), loss, score, settings)
    found = []
    for index in progress_bar(range(len(val.samples)), f"images, {source.name}"):
        target = centre_square(val.target(index))
        with torch.no_grad():
            output = probe.readout(evaluated[index][None])
            output = F.interpolate(output, size=target.shape[-2:], mode="bilinear", align_corners=False)[0]
        found.append(depth_errors(output.exp(), target) if kind == "depth" else normal_errors(angles(output, target)))
    return probe, found


def depth_normals(
    kind: str,
    sources: Sequence[FeatureSource],
    train: LabelledDataset,
    val: LabelledDataset,
    teacher_px: Sequence[int],
    *,
    model: str,
    settings: ProbeSettings = CONVOLUTIONAL,
    cache: Path | None = None,
) -> Report:
    """Compare sources by the depth or the surface normals that a convolutional readout predicts from them.

    Args:
        kind: "depth" or "normals".
        sources: What is compared; see :func:`sources_of`.
        train: Images that train the readout and choose its learning rate.
        val: Images that are reported.
        teacher_px: Sides of the teacher's image in pixels.
        model: The sources' name in the report.
        settings: Of the training.
        cache: A folder in which features are kept; None keeps those of the training images in memory.

    Returns:
        A row per side and source: errors in metres or degrees, and the interval of the first of them. Images without a
        value in their centre square are left out, which the recipe and a warning say.

    Raises:
        BrixelError: No image of a split has a value, a side is not four whole patches, or memory or disk is too small.
        ImageError: An image cannot be used.
    """
    (train, val), left_out = leave_out_empty(kind, (train, val))
    rows: list[dict[str, Any]] = []
    main = next(iter(_COLUMNS[kind]))
    for side in teacher_px:
        base: Tensor | None = None
        for source in sources:
            probe, found = probe_depth_normals(kind, source, train, val, side, settings=settings, cache=cache)
            values = by_metric(found)
            row = source.row(model, side) | {key: float(by_image.mean()) for key, by_image in values.items()}
            row["learning_rate"], row["interval"] = probe.learning_rate, interval(values[main])
            if source.name == BASE:
                base = values[main]
            elif base is not None:
                row["change"] = interval(values[main] - base)
            rows.append(row)
    form = ".3f" if kind == "depth" else ".2f"
    columns = {
        **SOURCE_COLUMNS,
        **_COLUMNS[kind],
        "interval": (f"{_COLUMNS[kind][main][0]}, 95 %", form),
        "change": ("over bilinear, 95 % (below 0 is better)", f"+{form}"),
    }
    recipe = (
        f"{val.name}: {len(train.samples)} images to fit, {len(val.samples)} to report, centre squares; {left_out}"
        f"{settings.describe('images')}; {describe_machine(torch.device(sources[0].device))}."
    )
    return Report(kind, _TITLES[kind], columns, rows, recipe)


def leave_out_empty(kind: str, splits: Sequence[LabelledDataset]) -> tuple[list[LabelledDataset], str]:
    """The splits without images that have no value in their centre square, and how many these are, for a recipe.

    Raises BrixelError where no image of a split is left.
    """
    kept, empty = [], []
    for data in splits:
        indices = progress_bar(range(len(data.samples)), f"{kind}, {data.name}")
        known = [bool(_known(kind, centre_square(data.target(index))[None]).any()) for index in indices]
        without = [sample.target for sample, has_value in zip(data.samples, known, strict=True) if not has_value]
        if len(without) == len(known):
            first = f", the first {without[0]}" if without else ""
            raise BrixelError(
                f"none of {len(known)} images of {data.name} has {kind} in its centre square{first}; expected images "
                "with values both to fit and to report"
            )
        samples = [sample for sample, has_value in zip(data.samples, known, strict=True) if has_value]
        kept.append(replace(data, samples=samples))
        empty += without
    if not empty:
        return kept, ""
    message = f"{len(empty)} of {sum(len(data.samples) for data in splits)} images without a value left out"
    _LOG.warning("%s: %s, the first %s", kind, message, empty[0])
    return kept, f"{message}; "


def _targets(kind: str, data: LabelledDataset, grid_hw: Sequence[int]) -> Tensor:
    """The measurements at the cells' centres, (N, C, h, w)."""
    squares = (centre_square(data.target(index))[None] for index in range(len(data.samples)))
    targets = torch.cat([F.interpolate(square, size=tuple(grid_hw), mode="nearest-exact") for square in squares])
    if not _known(kind, targets).any():
        cells = " x ".join(map(str, grid_hw))
        raise BrixelError(f"no image of {data.name} has {kind} at the centre of any of its {cells} cells")
    return targets


def _known(kind: str, targets: Tensor) -> Tensor:
    """Where there is a value, (B, C, H, W) -> (B, H, W)."""
    return targets[:, 0] > 0 if kind == "depth" else targets.square().sum(1) > 1e-6


def _loss(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean where there is a value: of the absolute difference of logarithms of depths, or of 1 - cosine."""
    known = _known(kind, targets)
    if kind == "depth":
        difference = (outputs - targets.clamp(min=1e-6).log()).abs()[:, 0]
    else:
        difference = 1 - F.cosine_similarity(outputs, targets, dim=1)
    return (difference * known).sum() / known.sum().clamp(min=1)
