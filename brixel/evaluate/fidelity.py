"""How near maps are to the teacher's: the student's, and those of plain interpolation, which it must beat.

The teacher is the backbone itself on an image of four times the side. Images are cut to centre squares, and every
figure is taken of one image and then averaged. `docs/evaluation.md` says what each means.
Shapes: B batch, D width, H x W cells; T and S = T / 4 the teacher's and the student's side in pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import INTERPOLATED, STUDENT, TEACHER, FeatureSource, features_by_name, sources_of
from brixel.evaluate.report import Report
from brixel.images.crops import DOWNSAMPLING, check_teacher_px
from brixel.model.losses import edge_loss, principal_directions, spectral_loss
from brixel.utils.devices import describe_machine

BASELINES = ("bilinear", "bicubic")
BASE = "bilinear"  # of whose error the share is told that another removes
EDGE_SHARE = 0.1  # of an image's cells, those with the teacher's strongest gradients, are its edges
_DIRECTIONS = 8  # along which edges are looked at: the teacher's first principal ones, image by image


def nearness(maps: Tensor, teacher: Tensor) -> dict[str, float]:
    """Mean absolute difference and mean cosine similarity, cell by cell, of maps (B, D, H, W)."""
    maps, teacher = maps.float(), teacher.float()
    cosine = F.cosine_similarity(maps, teacher, dim=1).mean()
    return {"l1": float((maps - teacher).abs().mean()), "cosine": float(cosine)}


def interpolated(backbone: Callable[[Tensor], Tensor], mode: str, grid_hw: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The backbone's own map, brought to the teacher's grid by plain interpolation: what a student must beat."""

    def predict(pixels: Tensor) -> Tensor:
        return F.interpolate(backbone(pixels), size=tuple(grid_hw), mode=mode, align_corners=False)

    return predict


def mean_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every figure."""
    return {name: sum(each[name] for each in records) / len(records) for name in records[0]}


def figures(maps: Tensor, teacher: Tensor) -> dict[str, float]:
    """All figures of one image's map beside the teacher's, (1, D, H, W) each, at least 3 x 3 cells."""
    maps, teacher = maps.float(), teacher.float()
    directions = principal_directions(teacher, min(_DIRECTIONS, teacher.shape[1]))
    cosine = F.cosine_similarity(maps, teacher, dim=1)[0]
    return {
        **nearness(maps, teacher),
        "cosine_edges": float(cosine[1:-1, 1:-1][teacher_edges(teacher, directions)].mean()),
        "edge": float(edge_loss(maps, teacher, directions=directions)),
        "spectral": float(spectral_loss(maps, teacher)),
    }


def teacher_edges(teacher: Tensor, directions: Tensor) -> Tensor:
    """The tenth of inner cells with the largest Sobel gradients: (1, D, H, W) -> (H - 2, W - 2), True at edges."""
    planes = (directions @ teacher.flatten(2)).unflatten(2, teacher.shape[2:])[0, :, None]  # N 1 H W
    ramp, blur = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
    kernels = torch.stack([torch.outer(blur, ramp), torch.outer(ramp, blur)])[:, None]  # 2 1 3 3
    strength = F.conv2d(planes, kernels.to(planes)).square().sum((0, 1))  # H-2 W-2
    strongest = strength.flatten().topk(max(1, round(EDGE_SHARE * strength.numel()))).indices
    return torch.zeros_like(strength, dtype=torch.bool).flatten().index_fill(0, strongest, True).view_as(strength)


def fidelity(
    model: BrixelFeatures,
    images: Sequence[Path],
    teacher_px: Iterable[int],
    names: Sequence[str] = (*INTERPOLATED, STUDENT),
    *,
    name: str = "",
) -> Report:
    """Compare a model's sources with its teacher on centre crops, for each side T; ``name``: for the table.

    Raises BrixelError where there is no image or a side is not four whole patches, ImageError for an image that
    cannot be used.
    """
    teacher = sources_of(model, [TEACHER])[0]
    return compare(sources_of(model, names), teacher, images, teacher_px, model=name or model.config.backbone.title)


def compare(
    sources: Sequence[FeatureSource],
    teacher: FeatureSource,
    images: Sequence[Path],
    teacher_px: Iterable[int],
    *,
    model: str,
) -> Report:
    """As :func:`fidelity`, of any sources; their maps must have the teacher's shape."""
    sides = tuple(teacher_px)
    if not images:
        raise BrixelError("no images to compare on; expected at least one")
    for side in sides:
        check_teacher_px(side, teacher.patch_px)
    rows, details = [], {}
    for side in sides:
        found = _at_size(sources, teacher, images, side)
        rows += [_row(model, side, source, found) for source in sources]
        details[str(side)] = {name: {key: each.tolist() for key, each in by.items()} for name, by in found.items()}
    columns = {
        **{"model": ("model", ""), "image_px": ("student's image, px", "d"), "teacher_px": ("teacher's", "d")},
        **{"source": ("method", ""), "l1": ("L1", ".4f"), "cosine": ("cosine", ".4f")},
        **{"removed": ("of bilinear's 1 - cosine removed", ".1%"), "removed_interval": ("95 %", ".1%")},
        **{"cosine_edges": ("cosine at edges", ".4f"), "edge": ("edge error", ".3g")},
        "spectral": ("spectral error", ".3f"),
    }
    recipe = f"{len(images)} images, centre crops; {describe_machine(torch.device(teacher.device))}."
    names = [str(image.name) for image in images]
    return Report("fidelity", "How near to the teacher", columns, rows, recipe, (), {"images": names, **details})


def _at_size(
    sources: Sequence[FeatureSource], teacher: FeatureSource, images: Sequence[Path], side: int
) -> dict[str, dict[str, Tensor]]:
    """Every figure of every source by image, (N,), float64."""
    records: dict[str, list[dict[str, float]]] = {source.name: [] for source in sources}
    for image in tqdm(images, f"images, {side} px", disable=None):
        crop = centre_crop(image, side)[None]
        target = teacher.features(crop)
        for name, maps in features_by_name(sources, crop).items():
            if maps.shape != target.shape:
                shapes = f"{tuple(maps.shape)}, the teacher {tuple(target.shape)}"
                raise BrixelError(f"source {name!r} gave {shapes}; maps of one shape can be compared")
            records[name].append(figures(maps, target))
    return {
        name: {key: torch.tensor([each[key] for each in by], dtype=torch.float64) for key in by[0]}
        for name, by in records.items()
    }


def _row(model: str, side: int, source: FeatureSource, found: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    own, base = found[source.name], found.get(BASE)
    row: dict[str, Any] = {"model": model, "image_px": side // DOWNSAMPLING, "teacher_px": side}
    row["source"] = source.name
    for key, values in own.items():
        row[key], row[f"{key}_interval"] = float(values.mean()), interval(values)
    if base is not None and source.name != BASE:
        both = torch.stack([1 - own["cosine"], (1 - base["cosine"]).clamp(min=1e-9)], 1)  # N 2
        row["removed"] = float(1 - both[:, 0].sum() / both[:, 1].sum())
        row["removed_interval"] = interval(both, lambda sums: 1 - sums[:, 0] / sums[:, 1])
    return row
