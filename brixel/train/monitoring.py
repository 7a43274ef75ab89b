"""A run's progress as images: a curve of its metrics, a panel of the student's maps beside the teacher's."""

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

_PANEL_ROWS = 3


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
