"""Segmentation from a few clicks: a probe is fitted to n clicks a class on an image, and tested on its other pixels.

Clicks are drawn from the pixels of each class, the same for all sources: the first 3 of 10 are the 3. Images are cut to
their centre squares.

Shapes: H x H pixels of a square mask, T the crop's side in pixels, D channels, h x w cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.labelled import LabelledDataset, centre_square
from brixel.evaluate.feature_cache import Features, features_of
from brixel.evaluate.feature_sources import BASE, FeatureSource, check_source_names
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.crops import DOWNSAMPLING
from brixel.probe.metrics import IGNORE, confusion, intersection_union, mean_iou
from brixel.probe.segmentation import SegmentationProbe
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar

COUNTS = (3, 10, 30)
COLOUR, COLOUR_POSITION = "colour", "colour, position"
_COLOUR_PX = 4  # side of the squares of the crop over which colours are averaged
_COLOUR_REGULARISATION = 0.001  # near the best of 0.0001 to 0.1 for both, on training images
_LEAST_PIXELS = 4  # of a class in an image, as a multiple of the clicks on it


def colour_sources() -> list[FeatureSource]:
    """The baselines: colours with their squares and products, without and with the same of the position."""
    return [_colour_source(COLOUR, position=False), _colour_source(COLOUR_POSITION, position=True)]


def _colour_source(name: str, *, position: bool) -> FeatureSource:
    def maps(pixels: Tensor) -> Tensor:
        found = F.avg_pool2d(pixels, _COLOUR_PX)  # B 3 h w
        if position:
            lines = [torch.linspace(-1, 1, side) for side in found.shape[2:]]
            places = torch.stack(torch.meshgrid(*lines, indexing="ij")).expand(len(found), -1, -1, -1)
            found = torch.cat([found, places], 1)
        first, second = torch.triu_indices(found.shape[1], found.shape[1])
        return torch.cat([found, found[:, first] * found[:, second]], 1)

    return FeatureSource(name, maps, _COLOUR_PX, scale=DOWNSAMPLING)


def clicks(
    sources: Sequence[FeatureSource],
    data: LabelledDataset,
    teacher_px: Sequence[int],
    *,
    model: str,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
    cache: Path | None = None,
) -> Report:
    """Compare sources, and colours, by segmentation from a few clicks.

    Args:
        sources: What is compared; see :func:`sources_of`. The colour baselines are added.
        data: Images with masks. A class counts in an image where it has four times as many pixels as the most clicks.
        teacher_px: Sides of the teacher's image in pixels.
        model: The sources' name in the report.
        counts: Numbers of clicks a class.
        seed: Of the clicks.
        cache: A folder in which features are kept; None keeps them in memory.

    Returns:
        A row per side, number of clicks and source: the mean over images of the mean IoU over the classes of an image,
        on the pixels that were not clicked.

    Raises:
        BrixelError: No image has two classes, a side is not four whole patches, or memory or disk is too small.
        ImageError: An image cannot be used.
    """
    compared = [*colour_sources(), *sources]
    check_source_names(compared)
    drawn = {index: found for index in range(len(data.samples)) if (found := _clicks_on(data, index, counts, seed))}
    if not drawn:
        raise BrixelError(f"no image of {data.name} has two classes of {_LEAST_PIXELS * max(counts)} pixels or more")
    rows: list[dict[str, Any]] = []
    for side in teacher_px:
        by_source = {}
        for source in compared:
            features = features_of(source, [data.samples[index].image for index in drawn], side, cache)
            by_source[source.name] = _by_image(features, data, drawn, counts)  # images, counts
        for at, count in enumerate(counts):
            rows += [_row(source, model, side, count, {name: found[:, at] for name, found in by_source.items()})
                     for source in compared]  # fmt: skip
    columns = {
        **SOURCE_COLUMNS,
        **{"clicks": ("clicks a class", "d"), "miou": ("mIoU", ".4f"), "miou_interval": ("95 %", ".3f")},
        **{"over_colour": ("over the better colour baseline, 95 %", "+.3f"), "better": ("better in", "of")},
        "over_bilinear": ("over bilinear, 95 %", "+.3f"),
    }
    recipe = (
        f"{data.name}: {len(drawn)} of {len(data.samples)} images have two classes of {_LEAST_PIXELS * max(counts)} "
        f"pixels or more; centre squares; clicks drawn with seed {seed} from the pixels of each class; "
        f"{describe_machine(torch.device(sources[0].device))}."
    )
    notes = (
        "A probe is fitted to each image alone, by its clicks; mIoU over the classes and the other pixels of the "
        "image, then the mean over images. Intervals: bootstrap over the images, of differences on the same images.",
        "Colour: averages over squares of 4 px of the crop, their squares and products, and in the second baseline "
        f"those of the position too, in the same probe; regularisation {_COLOUR_REGULARISATION:g}, near the best on "
        "training images, in place of 0.1.",
    )
    return Report("clicks", "Segmentation from a few clicks", columns, rows, recipe, notes)


def _clicks_on(data: LabelledDataset, index: int, counts: Sequence[int], seed: int) -> dict[int, Tensor]:
    """Clicked pixels by class, (count, 2), as many as the largest count; empty where an image has fewer than two."""
    labels = centre_square(data.target(index))
    generator = torch.Generator().manual_seed(seed * 2**20 + index)
    found = {}
    for label in labels.unique().tolist():
        pixels = (labels == label).nonzero()
        if label != IGNORE and len(pixels) >= _LEAST_PIXELS * max(counts):
            found[label] = pixels[torch.randperm(len(pixels), generator=generator)[: max(counts)]]
    return found if len(found) > 1 else {}


def _by_image(
    features: Features, data: LabelledDataset, drawn: dict[int, dict[int, Tensor]], counts: Sequence[int]
) -> Tensor:
    """The mean IoU by image and count."""
    found = torch.zeros(len(drawn), len(counts), dtype=torch.float64)
    for number, (index, pixels) in enumerate(progress_bar(list(drawn.items()), f"images, {features.source.name}")):
        labels, cells = centre_square(data.target(index)), features[number]
        size = len(labels)
        feature_map = FeatureMap(cells, (size, size), (size / cells.shape[1], size / cells.shape[2]))
        places = torch.full((int(labels.max()) + 1,), IGNORE)
        places[list(pixels)] = torch.arange(len(pixels))
        truth = torch.where(labels >= 0, places[labels.clamp(min=0)], IGNORE)
        for at, count in enumerate(counts):
            clicked = {place: own[:count] for place, own in enumerate(pixels.values())}
            points = [(*pixel, place) for place, own in clicked.items() for pixel in (own + 0.5).tolist()]
            probe = _probe(features.source.name).fit([feature_map], clicks=[points])
            others = truth.clone()
            for own in clicked.values():
                others[own[:, 0], own[:, 1]] = IGNORE
            counted = confusion(torch.from_numpy(probe.predict(feature_map)), others, len(pixels))
            found[number, at] = mean_iou(intersection_union(counted))
    return found


def _probe(source: str) -> SegmentationProbe:
    if source in (COLOUR, COLOUR_POSITION):
        return SegmentationProbe(regularisation=_COLOUR_REGULARISATION)
    return SegmentationProbe()


def _row(source: FeatureSource, model: str, side: int, count: int, by_source: dict[str, Tensor]) -> dict[str, Any]:
    own = by_source[source.name]
    row = {**source.row(model, side), "clicks": count, "miou": float(own.mean()), "miou_interval": interval(own)}
    if source.name not in (COLOUR, COLOUR_POSITION):
        colour = max((by_source[COLOUR], by_source[COLOUR_POSITION]), key=lambda found: float(found.mean()))
        row |= {"over_colour": interval(own - colour), "better": (int((own > colour).sum()), len(own))}
        if BASE in by_source and source.name != BASE:
            row["over_bilinear"] = interval(own - by_source[BASE])
    return row
