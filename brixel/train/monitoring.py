"""A run's progress as images: a curve of its metrics, a panel of the student's maps beside the teacher's."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.panel import build_panel, image_tile, map_tiles, save_panel, tile_size
from brixel.train.teacher_cache import TeacherCache

CURVE_PX = (320, 800)  # of one diagram
_MARGIN_PX = 48
_PANEL_ROWS = 3


def draw_curve(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Two diagrams over the steps: the loss; 1 - cosine to the teacher on held-out crops, with that of bilinear."""
    checks = [record for record in records if "cosine" in record]
    diagrams = (
        {"loss": ("#1f6fb4", [(record["step"], record["loss"]) for record in records if "loss" in record])},
        {
            "1 - cosine, validation": ("#c23b22", [(each["step"], 1 - each["cosine"]) for each in checks]),
            "1 - cosine, bilinear": ("#888888", [(each["step"], 1 - each["bilinear_cosine"]) for each in checks]),
        },
    )
    drawn = [_finite(lines) for lines in diagrams]
    drawn = [lines for lines in drawn if any(spots for _, spots in lines.values())]
    if not drawn:
        return
    last = max(step for lines in drawn for _, spots in lines.values() for step, _ in spots) or 1
    height, width = CURVE_PX
    image = Image.new("RGB", (width, height * len(drawn)), "white")
    for number, lines in enumerate(drawn):
        image.paste(_diagram(lines, last), (0, number * height))
    save_panel(image, path)


_Lines = dict[str, tuple[str, list[tuple[int, float]]]]  # colour, and (step, value), by name


def _finite(lines: _Lines) -> _Lines:
    return {
        name: (colour, [(step, value) for step, value in spots if math.isfinite(value)])
        for name, (colour, spots) in lines.items()
    }


def _diagram(lines: _Lines, last: int) -> Image.Image:
    """Lines over steps 0 to ``last``; the axis reaches from the lowest value to the highest."""
    height, width = CURVE_PX
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    values = [value for _, spots in lines.values() for _, value in spots]
    low, span = min(values), max(values) - min(values)
    if not span:
        low, span = low - 0.5, 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = _MARGIN_PX + step / last * (width - 1.5 * _MARGIN_PX)
        return x, height - _MARGIN_PX - (value - low) / span * (height - 2 * _MARGIN_PX)

    font = ImageFont.load_default(13)
    for part in range(5):
        value = low + part / 4 * span
        draw.line([place(0, value), place(last, value)], fill="#dddddd")
        draw.text((4, place(0, value)[1] - 7), f"{value:.3g}", fill="black", font=font)
    for row, (name, (colour, spots)) in enumerate(lines.items()):
        marks = [place(*spot) for spot in spots]
        draw.line(marks, fill=colour, width=2)
        for x, y in marks if len(marks) < 40 else []:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        draw.text((_MARGIN_PX + 12, 8 + 16 * row), name, fill=colour, font=font)
    draw.text((width - 130, height - 30), f"step {last}", fill="black", font=font)
    return image


@torch.no_grad()
def draw_crops(path: Path, model: BrixelFeatures, crops: TeacherCache, device: torch.device) -> None:
    """Draw a panel of the first crops: image, the backbone's map, the student's and the teacher's."""
    vit = model.config.backbone.vit
    mean, std = (torch.tensor(values)[:, None, None] for values in (vit.mean, vit.std))
    rows = []
    for index in range(min(_PANEL_ROWS, len(crops))):
        pixels, teacher = crops[index]
        batch = pixels[None].to(device)
        features = {"backbone": model.backbone_features(batch)[0].cpu(), "student": model(batch)[0].cpu()}
        features["teacher"] = teacher
        maps = {name: _feature_map(cells, pixels) for name, cells in features.items()}
        size_hw = tile_size(maps["teacher"])
        rgb = (pixels * std + mean).clamp(0, 1).numpy()
        rows.append([image_tile(rgb, size_hw, "student's image"), *map_tiles(maps, size_hw)])
    save_panel(build_panel(rows), path)


def _feature_map(features: Tensor, pixels: Tensor) -> FeatureMap:
    image_hw, grid_hw = (pixels.shape[1], pixels.shape[2]), features.shape[1:]
    return FeatureMap(features, image_hw, (image_hw[0] / grid_hw[0], image_hw[1] / grid_hw[1]))
