"""Diagrams drawn with Pillow alone: lines of spots over two axes, each of which is linear or logarithmic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from brixel.feature_maps.panel import build_panel

SIZE_PX = (300, 420)  # of one diagram, height and width
COLOURS = ("#888888", "#c23b22", "#1f6fb4", "#2e8b57", "#b8860b", "#7d3c98")
_MARGIN_PX = 56
_PER_ROW = 2
_TICKS = 5  # about so many on a linear axis


@dataclass(frozen=True)
class Axis:
    """Where ticks are, from the first end to the last, and what stands beside them."""

    ticks: Sequence[float]
    labels: Sequence[str]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far a value is between the first tick and the last."""
        low, high, at = (
            math.log(each) if self.logarithmic else each for each in (self.ticks[0], self.ticks[-1], value)
        )
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Spot:
    """A point of a line, and how far its whisker reaches, where it has one."""

    x: float
    y: float
    whisker: tuple[float, float] | None = None


def decades(values: Sequence[float], base: int) -> Axis:
    """A logarithmic axis in powers of ``base``, two or more, around all values."""
    first = math.floor(math.log(min(values), base) + 1e-9)
    last = max(first + 1, math.ceil(math.log(max(values), base) - 1e-9))
    ticks = [float(base) ** power for power in range(first, last + 1)]
    return Axis(ticks, [f"{each:g}" for each in ticks], logarithmic=True)


def steps(values: Sequence[float]) -> Axis:
    """A linear axis in steps of 1, 2 or 5 times a power of ten, around all values."""
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(ticks, [f"{round(each, 10):g}" for each in ticks])


def places(labels: Sequence[str]) -> Axis:
    """An axis of things that are no numbers: the first is at 0, the next at 1, with half a step at both ends."""
    inner = list(range(len(labels)))
    return Axis([-0.5, *inner, len(labels) - 0.5], ["", *labels, ""])


def diagram(
    title: str, lines: Mapping[str, Sequence[Spot]], across: Axis, up: Axis, colours: Mapping[str, str]
) -> Image.Image:
    """One diagram: the lines by name, each in its colour."""
    height, width = SIZE_PX
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    legend_px = 16 * len(lines) + 4

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _MARGIN_PX + across.share(x) * (width - 1.5 * _MARGIN_PX),
            height - 28 - up.share(y) * (height - 60 - legend_px),
        )

    for x, label in zip(across.ticks, across.labels, strict=True):
        if label:
            draw.line([place(x, up.ticks[0]), place(x, up.ticks[-1])], fill="#e5e5e5")
            draw.text((place(x, up.ticks[0])[0], height - 24), label, fill="black", font=font, anchor="ma")
    for y, label in zip(up.ticks, up.labels, strict=True):
        draw.line([place(across.ticks[0], y), place(across.ticks[-1], y)], fill="#e5e5e5")
        draw.text((_MARGIN_PX - 6, place(across.ticks[0], y)[1]), label, fill="black", font=font, anchor="rm")
    for number, (name, spots) in enumerate(lines.items()):
        colour = colours[name]
        marks = [place(spot.x, spot.y) for spot in sorted(spots, key=lambda spot: spot.x)]
        draw.line(marks, fill=colour, width=2)
        for spot in spots:
            _mark(draw, colour, place(spot.x, spot.y), [place(spot.x, end) for end in spot.whisker or ()])
        draw.text((_MARGIN_PX + 8, 28 + 16 * number), name, fill=colour, font=font)
    draw.text((_MARGIN_PX, 8), title, fill="black", font=font)
    return image


def in_rows(diagrams: Sequence[Image.Image]) -> Image.Image:
    """Diagrams as one image, two in a row."""
    return build_panel([list(diagrams[first : first + _PER_ROW]) for first in range(0, len(diagrams), _PER_ROW)])


def _mark(
    draw: ImageDraw.ImageDraw, colour: str, at: tuple[float, float], whisker: Sequence[tuple[float, float]]
) -> None:
    if whisker:
        draw.line(list(whisker), fill=colour, width=1)
        for x, y in whisker:
            draw.line([(x - 4, y), (x + 4, y)], fill=colour, width=1)
    x, y = at
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
