"""Labels carried through videos by features, measured as the semi-supervised task of DAVIS 2017.

J is the intersection over union of an object's pixels, F the F-measure of its outline, both by Perazzi et al., "A
Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016). They are averaged over the
frames of an object without the first and the last one, then over the objects of all videos, as the official toolkit
for DAVIS 2017 does (Pont-Tuset et al., https://arxiv.org/abs/1704.00675).
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.davis import VideoDataset, VideoSequence
from brixel.evaluate.feature_sources import BASE, FeatureSource, check_source_names
from brixel.evaluate.metrics import boundary_f, region_j
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.crops import DOWNSAMPLING, check_teacher_px, resized
from brixel.images.load import load_image
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar
from brixel.video.propagation import LabelTracker, PropagationSettings

RECALL_ABOVE = 0.5


@dataclass(frozen=True)
class TrackedObject:
    """An object of a video: J and F of its frames without the first and the last one, each (frames,)."""

    video: str
    number: int
    j: Tensor
    f: Tensor


def video(
    sources: Sequence[FeatureSource],
    data: VideoDataset,
    teacher_px: Sequence[int],
    *,
    model: str,
    settings: PropagationSettings | None = None,
) -> Report:
    """Carry the objects of the first frame through each video, and measure J and F.

    Frames are resized so that their short side has ``teacher_px`` pixels for the teacher and a quarter for the others,
    and their long side whole patches; the masks keep their size.

    Args:
        sources: What is compared; see :func:`sources_of`.
        data: The videos, of :func:`read_davis`.
        teacher_px: Short sides of the teacher's image in pixels.
        model: The sources' name in the report.
        settings: How labels are propagated; None for the defaults of :func:`brixel.video.propagate`.

    Returns:
        A row per side and source.

    Raises:
        BrixelError: A file of the data cannot be used, or a side is not four whole patches.
        ImageError: A frame cannot be used.
    """
    check_source_names(sources)
    settings = PropagationSettings() if settings is None else settings
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for side in teacher_px:
        found: dict[str, list[TrackedObject]] = {source.name: [] for source in sources}
        seconds: dict[str, list[float]] = {source.name: [] for source in sources}
        for sequence in progress_bar(data.sequences, f"videos, {side} px"):
            for source in sources:
                tracked, times = _track(source, sequence, side, settings)
                found[source.name] += tracked
                seconds[source.name] += times
        rows += [_row(model, side, source, found, seconds[source.name]) for source in sources]
        details[str(side)] = {name: _by_object(objects) for name, objects in found.items()}
    columns = {
        **SOURCE_COLUMNS,
        **{"jf": ("J&F", ".1%"), "jf_interval": ("95 %", ".1%"), "jf_gain": ("over bilinear, 95 %", "+.1%")},
        **{
            "j": ("J", ".1%"),
            "j_recall": ("J above 0.5", ".1%"),
            "f": ("F", ".1%"),
            "f_recall": ("F above 0.5", ".1%"),
        },
        "ms": ("ms per frame", ".0f"),
    }
    frames = sum(len(sequence.samples) for sequence in data.sequences)
    recipe = (
        f"{data.name}: {len(data.sequences)} videos, {frames} frames, {len(found[sources[0].name])} objects; "
        f"{settings.context} last frames and the first, best {settings.top_k} cells within {settings.radius:.0%} of "
        f"the short side, temperature {settings.temperature:g}; {describe_machine(torch.device(sources[0].device))}."
    )
    notes = (
        "J: intersection over union; F: F-measure of the outline, within 0.8 % of the diagonal; both without the first "
        "and the last frame, averaged by object.",
        "Intervals: bootstrap over the objects. ms: median of features and propagation together.",
    )
    return Report("video", "Objects carried through videos", columns, rows, recipe, notes, details)


def _track(
    source: FeatureSource, sequence: VideoSequence, side: int, settings: PropagationSettings
) -> tuple[list[TrackedObject], list[float]]:
    """The objects of a video as a source finds them, and the seconds that each frame took."""
    objects, count = sequence.objects(), len(sequence.samples)
    first = sequence.mask(0)
    measures: dict[int, list[tuple[float, float]]] = {number: [] for number in objects}
    seconds = []
    tracker: LabelTracker | None = None
    for index, pixels in enumerate(_frames(sequence, source, side)):
        began = time.perf_counter()
        feature_map = _feature_map(source.features(pixels[None])[0], first)
        if tracker is None:
            tracker = LabelTracker(first, feature_map, settings)
            continue
        found = tracker.next(feature_map)
        seconds.append(time.perf_counter() - began)
        if index == count - 1:
            break
        truth = sequence.mask(index)
        if truth.shape != first.shape:
            raise BrixelError(f"{sequence.samples[index].target} has another size than the first mask of its video")
        for number in objects:
            ours, theirs = found == number, truth == number
            measures[number].append((region_j(ours, theirs), boundary_f(ours, theirs)))
    tracked = []
    for number, values in measures.items():
        j, f = torch.tensor(values, dtype=torch.float64).unbind(1)
        tracked.append(TrackedObject(sequence.name, number, j, f))
    return tracked, seconds


def _frames(sequence: VideoSequence, source: FeatureSource, side: int) -> Iterator[Tensor]:
    """The frames at the teacher's size: (3, H, W), float32 in [0, 1]."""
    check_teacher_px(side, source.patch_px)
    unit = DOWNSAMPLING * source.patch_px
    for sample in sequence.samples:
        rgb = load_image(sample.image)
        short = min(rgb.shape[1:])
        out_hw = (_whole_patches(rgb.shape[1], side, short, unit), _whole_patches(rgb.shape[2], side, short, unit))
        rgb = rgb.float().div(255) if rgb.dtype == torch.uint8 else rgb
        yield resized(rgb, out_hw)


def _whole_patches(pixels: int, side: int, short: int, unit: int) -> int:
    """The side in pixels that becomes ``side`` where it is the short one, and the nearest multiple of ``unit``."""
    return side if pixels == short else max(1, round(pixels * side / short / unit)) * unit


def _feature_map(features: Tensor, mask: Tensor) -> FeatureMap:
    """A map (D, h, w) with the geometry of the mask."""
    (height, width), (rows, columns) = mask.shape, features.shape[1:]
    return FeatureMap(features, (height, width), (height / rows, width / columns))


def _row(
    model: str,
    side: int,
    source: FeatureSource,
    found: Mapping[str, Sequence[TrackedObject]],
    seconds: Sequence[float],
) -> dict[str, Any]:
    objects = found[source.name]
    both = _jf(objects)
    row = source.row(model, side)
    row |= {"jf": float(both.mean()), "jf_interval": interval(both), "ms": 1e3 * statistics.median(seconds)}
    for key in ("j", "f"):
        by_object = [getattr(each, key) for each in objects]
        row[key] = float(torch.stack([values.mean() for values in by_object]).mean())
        above = [(values > RECALL_ABOVE).double().mean() for values in by_object]
        row[f"{key}_recall"] = float(torch.stack(above).mean())
    if BASE in found and source.name != BASE:
        row["jf_gain"] = interval(both - _jf(found[BASE]))
    return row


def _jf(objects: Sequence[TrackedObject]) -> Tensor:
    """The mean of J and F of each object, (objects,)."""
    return torch.stack([(each.j.mean() + each.f.mean()) / 2 for each in objects])


def _by_object(objects: Sequence[TrackedObject]) -> list[dict[str, Any]]:
    return [
        {"video": each.video, "object": each.number, "j": float(each.j.mean()), "f": float(each.f.mean())}
        for each in objects
    ]
