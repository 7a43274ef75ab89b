"""To watch a run: metrics as JSON lines, a curve, a panel of pictures with the student's map beside the teacher's."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from brixel.atomic import atomic_path
from brixel.panel import enlarge, labelled, save, stacked
from brixel.pca import PcaBasis

CURVE_PX = (480, 800)
_MARGIN_PX = 48
_TILE_PX = 256


class Metrics:
    """One JSON object a line; lines of steps that a taken-up run has still to do are dropped on opening."""

    def __init__(self, path: Path, done_steps: int) -> None:
        self.path = path
        kept = [record for record in self.records() if record["step"] <= done_steps]
        text = "".join(f"{json.dumps(record)}\n" for record in kept)
        with atomic_path(path) as temporary:  # a run may be killed here, too
            temporary.write_text(text, encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, which has at least a ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")

    def records(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curve(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The loss over the steps, and 1 - cosine to the teacher on held-out crops, with that of bilinear upsampling."""
    height, width = CURVE_PX
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    series = {
        "loss": ("#1f6fb4", [(record["step"], record["loss"]) for record in records if "loss" in record]),
        "1 - cosine, validation": ("#c23b22", [(r["step"], 1 - r["cosine"]) for r in records if "cosine" in r]),
        "1 - cosine, bilinear": ("#888888", [(r["step"], 1 - r["bilinear_cosine"]) for r in records if "cosine" in r]),
    }
    series = {
        name: (colour, [(step, value) for step, value in line if math.isfinite(value)])
        for name, (colour, line) in series.items()
    }
    points = [point for _, line in series.values() for point in line]
    if not points:
        return
    last, top = max(step for step, _ in points) or 1, max(value for _, value in points) or 1.0
    font = ImageFont.load_default(13)
    for part in range(5):
        y = height - _MARGIN_PX - part / 4 * (height - 2 * _MARGIN_PX)
        draw.line((_MARGIN_PX, y, width - _MARGIN_PX / 2, y), fill="#dddddd")
        draw.text((4, y - 7), f"{part / 4 * top:.3g}", fill="black", font=font)
    for row, (name, (colour, line)) in enumerate(series.items()):
        spots = [
            (
                _MARGIN_PX + step / last * (width - 1.5 * _MARGIN_PX),
                height - _MARGIN_PX - value / top * (height - 2 * _MARGIN_PX),
            )
            for step, value in line
        ]
        draw.line(spots, fill=colour, width=2)
        draw.text((_MARGIN_PX + 12, 8 + 16 * row), name, fill=colour, font=font)
    draw.text((width - 130, height - 30), f"step {last}", fill="black", font=font)
    save(picture, path)


def draw_panel(path: Path, pictures: Sequence[np.ndarray[Any, Any]], maps: Sequence[Mapping[str, Tensor]]) -> None:
    """A row per picture (uint8, H x W x 3): itself, then its maps (D, H, W) in one PCA basis, by name."""
    rows = []
    for picture, by_name in zip(pictures, maps, strict=True):
        basis = PcaBasis.fit(list(by_name.values()))
        tiles = {"student's picture": picture, **{name: basis.project(each) for name, each in by_name.items()}}
        rows.append([labelled(enlarge(tile, max(1, _TILE_PX // tile.shape[0])), name) for name, tile in tiles.items()])
    save(stacked(rows), path)
