"""How near maps are to the teacher's on held-out crops."""

from collections.abc import Callable

import torch
from torch import Tensor

from brixel.evaluate.fidelity import BASELINES, interpolated, l1_and_cosine, mean_of
from brixel.train.teacher_cache import TeacherCache


def validate(predict: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """Mean ``l1`` and ``cosine`` of ``predict(pixels)`` to the teacher, pixels (1, 3, S, S), over all crops."""
    results: list[dict[str, float]] = []
    with torch.no_grad():
        for index in range(len(crops)):
            pixels, teacher = crops[index]
            results.append(l1_and_cosine(predict(pixels[None].to(device)).cpu(), teacher[None]))
    return mean_of(results)


def baselines(backbone: Callable[[Tensor], Tensor], crops: TeacherCache, device: torch.device) -> dict[str, float]:
    """What :func:`validate` finds of the backbone's maps, plainly interpolated: "bilinear_l1" and so on."""
    figures: dict[str, float] = {}
    for mode in BASELINES:
        plain = validate(interpolated(backbone, mode, crops[0][1].shape[1:]), crops, device)
        figures |= {f"{mode}_{name}": value for name, value in plain.items()}
    return figures
