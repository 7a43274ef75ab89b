"""How near the student's maps are to the teacher's on held-out crops, with plain interpolation beside it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.train.cache import TeacherCache

BASELINES = ("bilinear", "bicubic")


def nearness(maps: Tensor, teacher: Tensor) -> dict[str, float]:
    """Mean absolute difference and mean cosine similarity, cell by cell, of maps (B, D, H, W)."""
    maps, teacher = maps.float(), teacher.float()
    cosine = F.cosine_similarity(maps, teacher, dim=1).mean()
    return {"l1": float((maps - teacher).abs().mean()), "cosine": float(cosine)}


def validate(predict: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """Mean ``l1`` and ``cosine`` of ``predict(pixels)`` to the teacher, pixels (1, 3, S, S), over all crops."""
    results: list[dict[str, float]] = []
    with torch.no_grad():
        for index in range(len(crops)):
            pixels, teacher = crops[index]
            results.append(nearness(predict(pixels[None].to(device)).cpu(), teacher[None]))
    return {name: sum(each[name] for each in results) / len(results) for name in results[0]}


def interpolated(backbone: Callable[[Tensor], Tensor], mode: str, grid_hw: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The backbone's own map, brought to the teacher's grid by plain interpolation: what a student must beat."""

    def predict(pixels: Tensor) -> Tensor:
        return F.interpolate(backbone(pixels), size=tuple(grid_hw), mode=mode, align_corners=False)

    return predict
