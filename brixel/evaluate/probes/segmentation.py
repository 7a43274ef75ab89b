"""Semantic segmentation by one 1x1 convolution on frozen features: how much of what is where do features tell.

Trained on cells, 256 of each image: each has the shares of classes among its pixels (16 of them) as its target.
Judged on pixels: the logits are upsampled bilinearly to the mask's own size. Images are cut to their centre squares.

Shapes: N images, K classes, D channels, h x w cells, H x H pixels of a square mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from brixel.errors import BrixelError
from brixel.evaluate import metrics
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.labelled import LabelledImages, centre_square
from brixel.evaluate.feature_cache import Features, features_of
from brixel.evaluate.feature_sources import TEACHER, FeatureSource, check_names, cost_of
from brixel.evaluate.probes.training import Cells, ProbeSettings, items_of, linear_readout, train_probe
from brixel.evaluate.report import Report
from brixel.images.crops import DOWNSAMPLING
from brixel.utils.devices import describe_machine

CELLS = 256  # of each image, drawn once, the same places in all
POINTS = 4  # labels are looked up at so many points along each side of a cell
LINEAR = ProbeSettings()
BASE = "bilinear"  # what others are compared with


@dataclass(frozen=True)
class Segmented:
    """One source's result at one size. ``areas``, ``strips``: (N, 2, K), pixels in both and in either, by image."""

    areas: Tensor
    strips: Tensor
    accuracy: float
    learning_rate: float
    scores: dict[float, float]


def segment(
    source: FeatureSource,
    train: LabelledImages,
    val: LabelledImages,
    teacher_px: int,
    *,
    settings: ProbeSettings = LINEAR,
    within_px: int = 8,
    cache: Path | None = None,
) -> Segmented:
    """Train a linear probe on ``train`` and judge it on ``val``; ``within_px``: how wide the strips at outlines are."""
    if list(train.classes) != list(val.classes):
        raise BrixelError(
            f"{train.name} has {len(train.classes)} classes to fit and {len(val.classes)} to report, or others; "
            "expected the same: a classes.json beside the splits says which there are"
        )
    classes = len(train.classes)
    images = [each.image for data in (train, val) for each in data.samples]
    fitted, judged = features_of(source, images, teacher_px, cache, keep=0).split(len(train.samples))
    examples = Cells(fitted, CELLS, settings.seed)
    known = _known(train, examples)

    def loss(logits: Tensor, cells: Sequence[int]) -> Tensor:
        shares = known[torch.as_tensor(cells)].float().T[None, :, :, None]  # 1 K B 1
        return -(shares * logits.log_softmax(1)).sum() / shares.sum().clamp(min=1e-6)

    def score(readout: nn.Module, images: Sequence[int]) -> float:
        counts = torch.zeros(classes, classes, dtype=torch.float64)
        for cells in items_of(examples, images).split(settings.batch_size):
            found = readout(examples.inputs(cells.tolist())).argmax(1).flatten()  # B
            counts.index_add_(0, found, known[cells].double())
        return float(metrics.mean_iou(metrics.intersection_union(counts.T)))

    probe = train_probe(lambda width: linear_readout(width, classes), examples, loss, score, settings)
    return _judge(probe.readout, judged, val, within_px, probe.learning_rate, probe.scores)


def _known(data: LabelledImages, examples: Cells) -> Tensor:
    """Shares of classes in the examples, (images*n, K), float16, which holds sixteenths exactly."""
    shares = torch.empty(examples.images, examples.per_image, len(data.classes), dtype=torch.float16)
    for number in range(examples.images):
        labels = square_labels(data, number)
        shares[number] = cell_shares(labels, len(data.classes), examples.grid_hw)[:, examples.chosen].T
    return shares.flatten(0, 1)


def square_labels(data: LabelledImages, number: int) -> Tensor:
    """Labels of an image's centre square, (H, H)."""
    return centre_square(data.labels(number))


def _judge(
    readout: nn.Module,
    features: Features,
    val: LabelledImages,
    within_px: int,
    learning_rate: float,
    scores: dict[float, float],
) -> Segmented:
    classes = len(val.classes)
    total = torch.zeros(classes, classes, dtype=torch.int64)
    areas, strips = [], []
    for number in tqdm(range(len(val.samples)), f"images, {features.source.name}", disable=None):
        labels = square_labels(val, number)
        predicted = _predict(readout, features, number, labels)
        counts = metrics.confusion(predicted, labels, classes)
        total += counts
        areas.append(metrics.intersection_union(counts))
        strips.append(metrics.boundary_intersection_union(predicted, labels, classes, within_px))
    return Segmented(
        torch.stack(areas), torch.stack(strips), metrics.pixel_accuracy(total), learning_rate, scores
    )  # fmt: skip


def _predict(readout: nn.Module, features: Features, number: int, labels: Tensor) -> Tensor:
    """The class of every pixel of an image's mask, (H, H)."""
    with torch.no_grad():
        logits = readout(features[number][None]).contiguous(memory_format=torch.channels_last)  # 1 K h w
        logits = F.interpolate(logits, size=labels.shape, mode="bilinear", align_corners=False)
        return logits[0].permute(1, 2, 0).argmax(-1)  # classes last, also in memory: several times as fast


def cell_shares(labels: Tensor, classes: int, grid_hw: Sequence[int]) -> Tensor:
    """Share of each class among a cell's points, (H, H) -> (K, h*w); points without label are of none."""
    size = tuple(POINTS * cells for cells in grid_hw)
    points = F.interpolate(labels.float()[None, None], size=size, mode="nearest-exact").long()
    planes = torch.zeros(1, classes + 1, *size).scatter_(1, points % (classes + 1), 1.0)  # -1 goes to the last plane
    return F.avg_pool2d(planes[:, :classes], POINTS)[0].flatten(1)


def segmentation(
    sources: Sequence[FeatureSource],
    train: LabelledImages,
    val: LabelledImages,
    teacher_px: Sequence[int],
    *,
    model: str,
    settings: ProbeSettings = LINEAR,
    within_px: int = 8,
    cache: Path | None = None,
) -> Report:
    """Probe several sources at several sizes, and what each costs; ``model``: what they are of, for the table."""
    check_names(sources)
    rows: list[dict[str, Any]] = []
    for side in teacher_px:
        results = {
            source.name: segment(source, train, val, side, settings=settings, within_px=within_px, cache=cache)
            for source in sources
        }
        for source in sources:
            facts = {"model": model, "image_px": side * source.scale // DOWNSAMPLING, "source": source.name}
            rows.append({**facts, **_row(source.name, results, val.classes), **cost_of(source, side)})
    columns = {
        **{"model": ("model", ""), "image_px": ("image, px", "d"), "source": ("source", "")},
        **{"miou": ("mIoU", ".4f"), "miou_interval": ("95 %", ".3f"), "miou_gain": ("over bilinear, 95 %", "+.3f")},
        **{"boundary_iou": ("boundary IoU", ".4f"), "boundary_gain": ("over bilinear, 95 %", "+.3f")},
        **{"miou_gap": ("gap closed, mIoU", ".0%"), "boundary_gap": ("boundary", ".0%")},
        **{"accuracy": ("pixel accuracy", ".4f"), "gflop": ("GFLOP", ".1f"), "ms": ("ms", ".0f")},
    }
    recipe = (
        f"{val.name}: {len(train.samples)} images to fit, {len(val.samples)} to report, {len(val.classes)} classes, "
        f"centre squares; boundaries within {within_px} px of the mask; {settings.steps} steps of "
        f"{settings.batch_size} cells, seed {settings.seed}, learning rate of {_text(settings.learning_rates)} "
        f"chosen on {settings.held_out:.0%} of the images to fit; {describe_machine(torch.device(sources[0].device))}."
    )
    notes = (
        "Gap closed: of the distance from bilinear to the teacher, where its interval does not hold 0.",
        "Intervals: bootstrap over the images; of gains, the difference on the same images.",
    )
    return Report("segmentation", "Segmentation by a linear probe", columns, rows, recipe, notes)


def _row(name: str, results: dict[str, Segmented], classes: Sequence[str]) -> dict[str, Any]:
    own, base, teacher = results[name], results.get(BASE), results.get(TEACHER)
    row: dict[str, Any] = {"accuracy": own.accuracy, "learning_rate": own.learning_rate}
    row["scores_held_out"] = {f"{rate:g}": score for rate, score in own.scores.items()}
    for key, pick in (("miou", "areas"), ("boundary", "strips")):
        ours: Tensor = getattr(own, pick)
        value = float(metrics.mean_iou(ours.sum(0)))
        row["boundary_iou" if key == "boundary" else key] = value
        row[f"{key}_interval"] = interval(metrics.iou_terms(ours))
        if base is None or name == BASE:
            continue
        theirs: Tensor = getattr(base, pick)
        row[f"{key}_gain"] = _gain(ours, theirs)
        if name != TEACHER and teacher is not None:
            best: Tensor = getattr(teacher, pick)
            if _gain(best, theirs)[0] > 0:  # else there may be no distance
                low, high = (float(metrics.mean_iou(counts.sum(0))) for counts in (theirs, best))
                row[f"{key}_gap"] = (value - low) / (high - low)
    both, either = own.areas.sum(0).double()
    row["iou_by_class"] = {each: float(a / b) if b else None for each, a, b in zip(classes, both, either, strict=True)}
    return row


def _gain(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The interval of the difference in mean IoU, of counts (N, 2, K) on the same images."""
    return interval(metrics.iou_terms(ours) - metrics.iou_terms(theirs))


def _text(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
