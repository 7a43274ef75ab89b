"""What a map costs over how fine it is: a diagram for each architecture, both axes logarithmic."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from brixel.panel import stacked

SIZE_PX = (300, 420)  # of one diagram, height and width
_MARGIN_PX = 56
_COLOURS = ("#888888", "#c23b22", "#1f6fb4", "#2e8b57")
_PER_ROW = 2

Spots = list[tuple[float, float]]


def cost_plot(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The operations, and where they were measured the peak memory, of the rows of a cost report.

    A diagram's x is the number of cells along a side of the map that comes out.
    """
    diagrams: list[Image.Image] = []
    for key, unit in (("gflop", "GFLOP"), ("peak_mib", "peak memory, MiB")):
        for name in dict.fromkeys(row["architecture"] for row in rows if row.get(key)):
            lines: dict[str, Spots] = {}
            for row in rows:
                if row["architecture"] == name and row.get(key):
                    spot = (float(row["output_cells"].partition(" ")[0]), float(row[key]))
                    spots = lines.setdefault(row["variant"], [])
                    if spot not in spots:  # a row for each size of batch
                        spots.append(spot)
            diagrams.append(_diagram(f"{name}: {unit}, over cells along a side", lines))
    return stacked([diagrams[first : first + _PER_ROW] for first in range(0, len(diagrams), _PER_ROW)])


def _diagram(title: str, lines: Mapping[str, Spots]) -> Image.Image:
    height, width = SIZE_PX
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    xs, ys = ([spot[axis] for spots in lines.values() for spot in spots] for axis in (0, 1))
    across, up = _decades(min(xs), max(xs), 2), _decades(min(ys), max(ys), 10)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _MARGIN_PX + _share(x, across) * (width - 1.5 * _MARGIN_PX),
            height - 28 - _share(y, up) * (height - 60),
        )

    for x in across:
        draw.line([place(x, up[0]), place(x, up[-1])], fill="#e5e5e5")
        draw.text((place(x, up[0])[0] - 8, height - 24), f"{x:g}", fill="black", font=font)
    for y in up:
        draw.line([place(across[0], y), place(across[-1], y)], fill="#e5e5e5")
        draw.text((4, place(across[0], y)[1] - 7), f"{y:g}", fill="black", font=font)
    for number, (name, spots) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        marks = [place(*spot) for spot in sorted(spots)]
        draw.line(marks, fill=colour, width=2)
        for x, y in marks:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((_MARGIN_PX + 8, 36 + 15 * number), name, fill=colour, font=font)
    draw.text((_MARGIN_PX, 8), title, fill="black", font=font)
    return picture


def _decades(low: float, high: float, base: int) -> list[float]:
    """Powers of ``base`` from at most ``low`` to at least ``high``, two or more."""
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(first + 1, math.ceil(math.log(high, base) - 1e-9))
    return [float(base) ** power for power in range(first, last + 1)]


def _share(value: float, marks: Sequence[float]) -> float:
    """How far a value is between the first mark and the last, on a logarithmic axis."""
    return math.log(value / marks[0]) / math.log(marks[-1] / marks[0])
