"""A run's progress: its metrics as JSON lines and as a curve, and panels of the student's and the teacher's maps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.plots import save_plot, training_figure
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.panel import build_panel, image_tile, map_tiles, save_panel, tile_size
from brixel.train.teacher_cache import TeacherCache
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import check_table, number, whole_number
from brixel.utils.structured_files import checking_content, read_json_lines

_PANEL_ROWS = 3
_NOT_MEASURED = dict.fromkeys(("loss", "cosine", "bilinear_cosine", "centred_cosine", "bilinear_centred_cosine"), 0.0)
_RECORD_RULES = {"step": whole_number(0, 2**40), **dict.fromkeys(_NOT_MEASURED, number(finite=False))}
"""Of what is read back from a line of metrics; it may hold more."""


class Metrics:
    """A file with one JSON object per line. Opening it drops the lines of steps after ``done_steps``."""

    def __init__(self, path: Path, done_steps: int) -> None:
        self.path = path
        records = [record for record in self.records() if record["step"] <= done_steps]
        write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, which must have a ``step``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")

    def records(self) -> list[dict[str, Any]]:
        """All records, without a last line that was cut off."""
        if not self.path.exists():
            return []
        with checking_content(self.path, "the metrics of a run", "delete it to go on without those so far"):
            records = list(read_json_lines(self.path, finite=False))
            for number, record in enumerate(records, 1):
                read = {name: value for name, value in record.items() if name in _RECORD_RULES}
                check_table(f"line {number}", read, _RECORD_RULES, _NOT_MEASURED)
        return records


def draw_curve(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Plot the metrics of a run; no file where there is nothing to show, or no matplotlib."""
    save_plot(lambda: training_figure(records), path)


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
