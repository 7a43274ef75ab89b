"""Semantic segmentation by one 1x1 convolution on frozen features.

Trained on cells, 256 of each image; the target of a cell is the shares of classes among 16 of its pixels. Evaluated on
pixels: logits are upsampled bilinearly to the mask's size. Images are cut to their centre squares.

Shapes: N images, K classes, D channels, h x w cells, H x H pixels of a square mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.labelled import LabelledDataset, centre_square
from brixel.evaluate.feature_cache import Features, features_of
from brixel.evaluate.feature_sources import BASE, TEACHER, FeatureSource, check_source_names, cost_of
from brixel.evaluate.metrics import boundary_intersection_union, iou_terms
from brixel.evaluate.probes.training import Cells, Probe, ProbeSettings, items_of, train_probe
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.probe.cells import cell_shares, cross_entropy
from brixel.probe.metrics import confusion, intersection_union, mean_iou, pixel_accuracy
from brixel.probe.readouts import linear_readout
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar

CELLS = 256  # of each image, the same positions in all
LINEAR = ProbeSettings()


@dataclass(frozen=True)
class SegmentationResult:
    """One source at one size. ``areas``, ``strips``: (N, 2, K), intersection and union in pixels, by image."""

    areas: Tensor
    strips: Tensor
    accuracy: float
    learning_rate: float
    scores: dict[float, float]


def segment(
    source: FeatureSource,
    train: LabelledDataset,
    val: LabelledDataset,
    teacher_px: int,
    *,
    settings: ProbeSettings = LINEAR,
    within_px: int = 8,
    cache: Path | None = None,
) -> SegmentationResult:
    """Train a linear probe on ``train`` and evaluate it on ``val``; see :func:`segmentation`."""
    if list(train.classes) != list(val.classes):
        raise BrixelError(
            f"{train.name} has {len(train.classes)} classes to fit and {len(val.classes)} to report, or others; "
            "expected the same: a classes.json in the folder of the splits names them"
        )
    classes = len(train.classes)
    images = [sample.image for data in (train, val) for sample in data.samples]
    fitted, evaluated = features_of(source, images, teacher_px, cache, keep=0).split(len(train.samples))
    examples = Cells(fitted, CELLS, settings.seed)
    shares_of_cells = _targets(train, examples)

    def loss(logits: Tensor, cells: Sequence[int]) -> Tensor:
        shares = shares_of_cells[torch.as_tensor(cells)].float().T[None, :, :, None]  # 1 K B 1
        return cross_entropy(logits, shares) / shares.sum().clamp(min=1e-6)

    def score(readout: nn.Module, images: Sequence[int]) -> float:
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        for cells in items_of(examples, images).split(settings.batch_size):
            found = readout(examples.inputs(cells.tolist())).argmax(1).flatten()  # B
            counts.index_add_(0, found, shares_of_cells[cells].double())
        return float(mean_iou(intersection_union(counts.T)))

    probe = train_probe(lambda width: linear_readout(width, classes), examples, loss, score, settings)
    return _evaluate(probe, evaluated, val, within_px)


def _targets(data: LabelledDataset, examples: Cells) -> Tensor:
    """Shares of classes in the examples, (images*n, K), float16, which holds sixteenths exactly."""
    shares = torch.empty(examples.images, examples.per_image, len(data.classes), dtype=torch.float16)
    for index in range(examples.images):
        labels = centre_square(data.target(index))
        shares[index] = cell_shares(labels, len(data.classes), examples.grid_hw)[:, examples.chosen].T
    return shares.flatten(0, 1)


def _evaluate(probe: Probe, features: Features, val: LabelledDataset, within_px: int) -> SegmentationResult:
    classes = len(val.classes)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    areas, strips = [], []
    for index in progress_bar(range(len(val.samples)), f"images, {features.source.name}"):
        labels = centre_square(val.target(index))
        with torch.no_grad():
            logits = probe.readout(features[index][None]).contiguous(memory_format=torch.channels_last)  # 1 K h w
            logits = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)
            predicted = logits[0].permute(1, 2, 0).argmax(-1)  # H H; classes last in memory: several times as fast
        counts = confusion(predicted, labels, classes)
        total += counts
        areas.append(intersection_union(counts))
        strips.append(boundary_intersection_union(predicted, labels, classes, within_px))
    accuracy = pixel_accuracy(total)
    return SegmentationResult(torch.stack(areas), torch.stack(strips), accuracy, probe.learning_rate, probe.scores)


def segmentation(
    sources: Sequence[FeatureSource],
    train: LabelledDataset,
    val: LabelledDataset,
    teacher_px: Sequence[int],
    *,
    model: str,
    settings: ProbeSettings = LINEAR,
    within_px: int = 8,
    cache: Path | None = None,
) -> Report:
    """Compare sources by semantic segmentation with a linear probe.

    Args:
        sources: What is compared; see :func:`sources_of`.
        train: Images that train the probe and choose its learning rate.
        val: Images that are reported.
        teacher_px: Sides of the teacher's image in pixels.
        model: The sources' name in the report.
        settings: Of the training.
        within_px: Width of the strips along outlines for the boundary IoU, in pixels of the mask.
        cache: A folder in which features are kept; None keeps what is needed in memory.

    Returns:
        A row per side and source: mean IoU, boundary IoU and their intervals; the operations and time of an image.

    Raises:
        BrixelError: The splits have other classes, a side is not four whole patches, or memory or disk is too small.
        ImageError: An image cannot be used.
    """
    check_source_names(sources)
    rows: list[dict[str, Any]] = []
    for side in teacher_px:
        results = {
            source.name: segment(source, train, val, side, settings=settings, within_px=within_px, cache=cache)
            for source in sources
        }
        for source in sources:
            row = source.row(model, side)
            rows.append({**row, **_row(source.name, results, val.classes), **cost_of(source, side)})
    columns = {
        **SOURCE_COLUMNS,
        **{"miou": ("mIoU", ".4f"), "miou_interval": ("95 %", ".3f"), "miou_gain": ("over bilinear, 95 %", "+.3f")},
        **{"boundary_iou": ("boundary IoU", ".4f"), "boundary_gain": ("over bilinear, 95 %", "+.3f")},
        **{"miou_gap": ("gap closed, mIoU", ".0%"), "boundary_gap": ("boundary", ".0%")},
        **{"accuracy": ("pixel accuracy", ".4f"), "gflop": ("GFLOP", ".1f"), "ms": ("ms", ".0f")},
    }
    recipe = (
        f"{val.name}: {len(train.samples)} images to fit, {len(val.samples)} to report, {len(val.classes)} classes, "
        f"centre squares; boundaries within {within_px} px of the mask; {settings.describe('cells')}; "
        f"{describe_machine(torch.device(sources[0].device))}."
    )
    notes = (
        "Gap closed: of the distance from bilinear to the teacher, where its interval does not contain 0.",
        "Intervals: bootstrap over the images; of gains, the difference on the same images.",
    )
    return Report("segmentation", "Segmentation by a linear probe", columns, rows, recipe, notes)


def _row(name: str, results: dict[str, SegmentationResult], classes: Sequence[str]) -> dict[str, Any]:
    own = results[name]
    row: dict[str, Any] = {"accuracy": own.accuracy, "learning_rate": own.learning_rate}
    row["scores_held_out"] = {f"{rate:g}": score for rate, score in own.scores.items()}
    for key, value_key, field in (("miou", "miou", "areas"), ("boundary", "boundary_iou", "strips")):
        areas: dict[str, Tensor] = {source: getattr(result, field) for source, result in results.items()}
        means = {source: float(mean_iou(of_source.sum(0))) for source, of_source in areas.items()}
        row[value_key], row[f"{key}_interval"] = means[name], interval(iou_terms(areas[name]))
        if BASE not in areas or name == BASE:
            continue
        row[f"{key}_gain"] = _gain(areas[name], areas[BASE])
        if name != TEACHER and TEACHER in areas and _gain(areas[TEACHER], areas[BASE])[0] > 0:  # else maybe no gap
            row[f"{key}_gap"] = (means[name] - means[BASE]) / (means[TEACHER] - means[BASE])
    pairs = zip(classes, *own.areas.sum(0).double(), strict=True)
    row["iou_by_class"] = {title: float(both / either) if either else None for title, both, either in pairs}
    return row


def _gain(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The interval of the difference in mean IoU, of areas (N, 2, K) on the same images."""
    return interval(iou_terms(ours) - iou_terms(theirs))
