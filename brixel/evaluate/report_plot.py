"""The first figures of a report over the size of the image that a source sees: a diagram for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from brixel.evaluate.diagram import COLOURS, Spot, diagram, in_rows, places, steps
from brixel.evaluate.feature_sources import TEACHER
from brixel.evaluate.report import Report
from brixel.images.crops import DOWNSAMPLING

_FIGURES = {  # key of a row, key of its interval, what it is
    "fidelity": (("cosine", "cosine_interval", "cosine"), ("cosine_edges", "cosine_edges_interval", "cosine at edges")),
    "segmentation": (("miou", "miou_interval", "mIoU"), ("boundary_iou", "boundary_interval", "boundary IoU")),
    "matching": (("pck_0.05", "pck_0.05_interval", "share found within 5 %"),),
    "depth": (("rmse", "interval", "RMSE in m, less is better"),),
    "normals": (("mean_deg", "interval", "mean angle in degrees, less is better"),),
}
_COLOURS = {"bilinear": COLOURS[0], "student": COLOURS[1], "teacher": COLOURS[2]}
_APART = 0.12  # of the step between two sizes: how far sources stand from each other


def report_plot(report: Report) -> Image.Image:
    """A diagram for each figure and model; whiskers are the 95 % intervals.

    The teacher stands at the size of the student whose map is as fine as its own.
    """
    models = dict.fromkeys(row["model"] for row in report.rows)
    return in_rows(
        [
            _drawn(f"{model}: {title}", [row for row in report.rows if row["model"] == model], key, whisker)
            for key, whisker, title in _FIGURES[report.task]
            for model in models
        ]
    )


def _drawn(title: str, rows: Sequence[Mapping[str, Any]], key: str, whisker: str) -> Image.Image:
    sizes = sorted({_seen_px(row) for row in rows})
    sources = list(dict.fromkeys(row["source"] for row in rows))
    lines: dict[str, list[Spot]] = {}
    for row in rows:
        aside = _APART * (sources.index(row["source"]) - (len(sources) - 1) / 2)
        low_high = row.get(whisker)
        ends = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        lines.setdefault(_title(row["source"]), []).append(
            Spot(sizes.index(_seen_px(row)) + aside, float(row[key]), ends)
        )
    reached = [each for spots in lines.values() for spot in spots for each in (spot.y, *(spot.whisker or ()))]
    others = (colour for colour in COLOURS if colour not in _COLOURS.values())
    colours = {_title(name): _COLOURS.get(name) or next(others, COLOURS[0]) for name in sources}
    return diagram(title, lines, places([f"{size} px" for size in sizes]), steps(reached), colours)


def _seen_px(row: Mapping[str, Any]) -> int:
    """The side of the student's image in the row's group."""
    return int(row["image_px"]) // (DOWNSAMPLING if row["source"] == TEACHER else 1)


def _title(source: str) -> str:
    return f"{source}, of the image x {DOWNSAMPLING}" if source == TEACHER else source
