"""Plots of reports, costs and training runs, drawn by matplotlib (extra `plots`) without its global state.

Without matplotlib, work goes on without plots: see :func:`save_plot`.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brixel.errors import BrixelError
from brixel.evaluate.feature_sources import STUDENT, TEACHER
from brixel.evaluate.report import Report
from brixel.images.crops import DOWNSAMPLING
from brixel.utils.atomic_files import atomic_path
from brixel.utils.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, RED, BLUE, *OTHERS = ("#888888", "#c23b22", "#1f6fb4", "#2e8b57", "#b8860b", "#7d3c98")
_LOG = logging.getLogger("brixel")
_METRICS = {  # by task: key of a row, key of its interval, label
    "fidelity": (
        ("cosine", "cosine_interval", "cosine"),
        ("centred_cosine", "centred_cosine_interval", "centred cosine"),
        ("cosine_edges", "cosine_edges_interval", "cosine at edges"),
        ("r2", "r2_interval", "R2"),
    ),
    "segmentation": (("miou", "miou_interval", "mIoU"), ("boundary_iou", "boundary_interval", "boundary IoU")),
    "matching": (("pck_0.05", "pck_0.05_interval", "share of points within 5 %"),),
    "video": (("jf", "jf_interval", "J&F"),),
    "depth": (("rmse", "interval", "RMSE in m, lower is better"),),
    "normals": (("mean_deg", "interval", "mean angle in degrees, lower is better"),),
}
_OFFSET = 0.12  # between two sources at one size, as a share of the distance between sizes


def save_plot(draw: Callable[[], "Figure | None"], path: Path) -> bool:
    """Write a figure, whole or not at all, and return whether it was written.

    ``draw`` may give None where there is nothing to show. Without matplotlib nothing is written, and a warning names
    the extra that installs it, once per process.
    """
    figure = draw() if plots_available() else None
    if figure is None:
        return False
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    return True


def plots_available() -> bool:
    """Whether matplotlib can be imported; if not, a warning says so, once per process."""
    try:
        import_extra("matplotlib.figure", extra="plots", purpose="plots")
    except (BrixelError, ImportError) as error:
        _warn_once(f"{error}; going on without plots")
        return False
    return True


@functools.cache
def _warn_once(message: str) -> None:
    _LOG.warning("%s", message)


def report_figure(report: Report) -> "Figure | None":
    """The main metrics over the size of the image, a diagram per metric and model, with 95 % intervals as error bars.

    The teacher is drawn at the size of the student whose map is as fine as its own. Rows without a metric, of earlier
    versions, are left out; None where nothing is left.
    """
    diagrams: dict[tuple[tuple[str, str, str], str], list[Mapping[str, Any]]] = {}
    for metric in _METRICS[report.task]:
        for row in report.rows:
            if isinstance(row.get(metric[0]), int | float):
                diagrams.setdefault((metric, row["model"]), []).append(row)
    if not diagrams:
        return None
    figure, axes = _figure(len(diagrams))
    for axis, (((key, interval_key, label), model), rows) in zip(axes, diagrams.items(), strict=True):
        axis.set_title(f"{model}: {label}")
        _draw_sources(axis, rows, key, interval_key)
    return figure


def _draw_sources(axis: "Axes", rows: Sequence[Mapping[str, Any]], key: str, interval_key: str) -> None:
    """A line with error bars for each source, over the sizes of the student's image as categories."""
    sizes = sorted({_student_px(row) for row in rows})
    sources = list(dict.fromkeys(row["source"] for row in rows))
    colours, others = {"bilinear": GREY, STUDENT: RED, TEACHER: BLUE}, iter(OTHERS)
    for number, source in enumerate(sources):
        own = sorted((row for row in rows if row["source"] == source), key=_student_px)
        x = [sizes.index(_student_px(row)) + _OFFSET * (number - (len(sources) - 1) / 2) for row in own]
        colour = colours.get(source) or next(others, GREY)
        label = f"{source}, on the image x {DOWNSAMPLING}" if source == TEACHER else source
        axis.plot(x, [float(row[key]) for row in own], "o-", color=colour, label=label)
        bars = [(at, *row[interval_key]) for at, row in zip(x, own, strict=True) if row.get(interval_key)]
        if bars:
            middles, halves = zip(*(((low + high) / 2, (high - low) / 2) for _, low, high in bars), strict=True)
            axis.errorbar([at for at, *_ in bars], middles, halves, fmt="none", ecolor=colour, capsize=4)
    axis.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axis.set_xlim(-0.5, len(sizes) - 0.5)
    axis.legend()


def _student_px(row: Mapping[str, Any]) -> int:
    """The side in pixels of the image that the student of the row's group sees."""
    return int(row["image_px"]) // (DOWNSAMPLING if row["source"] == TEACHER else 1)


def cost_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Operations, and peak memory where it was measured, of the rows of a cost report, a diagram per architecture.

    Over the cells along a side of the map; both axes are logarithmic.
    """
    quantities = (("gflop", "GFLOP"), ("peak_mib", "peak memory, MiB"))
    diagrams = dict.fromkeys((*pair, row["architecture"]) for pair in quantities for row in rows if row.get(pair[0]))
    ticker = import_extra("matplotlib.ticker", extra="plots", purpose="plots")
    figure, axes = _figure(len(diagrams))
    for axis, (key, label, name) in zip(axes, diagrams, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["architecture"] == name and row.get(key):  # rows of several batch sizes are one point
                lines.setdefault(row["variant"], {})[int(row["output_cells"].partition(" ")[0])] = float(row[key])
        for (variant, points), colour in zip(lines.items(), (GREY, RED, BLUE), strict=False):
            axis.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, label=variant)
        axis.set(title=f"{name}: {label}", xscale="log", yscale="log", xlabel="cells along a side of the map")
        cells = sorted({cell for points in lines.values() for cell in points})
        axis.set_xticks(cells, list(map(str, cells)))
        axis.set_xticks([], minor=True)
        axis.yaxis.set(major_formatter=ticker.LogFormatter(), minor_formatter=ticker.LogFormatter())
        axis.legend()
    return figure


def training_figure(records: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """The loss, and 1 - cosine to the teacher on held-out crops with that of bilinear, over the steps of a run.

    The same of centred cosine is a diagram of its own. Values that are not finite are left out; None where nothing is
    left.
    """
    lines = {"loss": [(record["step"], record["loss"]) for record in records if "loss" in record]}
    for key, label in (("cosine", "cosine"), ("centred_cosine", "centred cosine")):
        for name, title in ((key, "validation"), (f"bilinear_{key}", "bilinear")):
            points = [(record["step"], 1 - record[name]) for record in records if name in record]
            lines[f"1 - {label}, {title}"] = points
    lines = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    names = list(lines)
    diagrams = [group for group in (names[:1], names[1:3], names[3:]) if any(lines[name] for name in group)]
    if not diagrams:
        return None
    colours = dict(zip(lines, (BLUE, RED, GREY, RED, GREY), strict=True))
    figure, axes = _figure(len(diagrams), columns=1, size_in=(8, 3.2))
    last = max(step for points in lines.values() for step, _ in points) or 1
    for axis, names in zip(axes, diagrams, strict=True):
        for name in names:
            style = "o-" if len(lines[name]) < 40 else "-"
            axis.plot(*np.reshape(lines[name], (-1, 2)).T, style, color=colours[name], markersize=4, label=name)
        axis.set(xlim=(0, last), xlabel="step")
        axis.legend()
    return figure


def _figure(
    count: int, *, columns: int = 2, size_in: tuple[float, float] = (5.6, 4.0)
) -> tuple["Figure", Sequence["Axes"]]:
    """A figure of ``count`` empty diagrams with a grid, each ``size_in`` inches wide and high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure_class = import_extra("matplotlib.figure", extra="plots", purpose="plots").Figure
    figure = figure_class(figsize=(size_in[0] * columns, size_in[1] * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
