"""How near maps are to the teacher's: the student's, and those of plain interpolation, which it must beat.

The teacher is the backbone itself on a picture of four times the side. Pictures are cut to centre squares.
Shapes: B batch, D width, H x W cells; T and S = T / 4 the teacher's and the student's side in pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.crops import DOWNSAMPLING, CropSettings, check_teacher_px, normalised, student_view, teacher_crop
from brixel.devices import machine
from brixel.errors import BrixelError
from brixel.features import BrixelFeatures
from brixel.images import load_image
from brixel.modes import evaluating

BASELINES = ("bilinear", "bicubic")
STUDENT = "student"


@dataclass(frozen=True)
class Fidelity:
    """Means over all pictures: ``figures[T][method]`` holds "l1" and "cosine"; and how they were made."""

    figures: dict[int, dict[str, dict[str, float]]]
    recipe: str


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


def fidelity(model: BrixelFeatures, pictures: Sequence[Path], teacher_px: Iterable[int]) -> Fidelity:
    """Compare student and interpolation with the teacher on centre crops, for each side T of ``teacher_px``.

    Raises BrixelError where there is no picture or a side is not four whole patches, ImageError for a picture that
    cannot be used.
    """
    sides = tuple(teacher_px)
    if not pictures:
        raise BrixelError("no pictures to compare on; expected at least one")
    for side in sides:
        check_teacher_px(side, model.patch_px)
    with evaluating(model), torch.no_grad():
        figures = {side: _at_size(model, pictures, side) for side in sides}
    recipe = f"{len(pictures)} pictures, centre crops; {model.config.backbone.title}; {machine(model.device)}."
    return Fidelity(figures, recipe)


def _at_size(model: BrixelFeatures, pictures: Sequence[Path], side: int) -> dict[str, dict[str, float]]:
    grid_hw = (side // model.patch_px, side // model.patch_px)
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        mode: interpolated(model.backbone_features, mode, grid_hw) for mode in BASELINES
    }
    methods[STUDENT] = model
    records: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for picture in pictures:
        small, teacher = _pair(model, picture, side)
        for name, method in methods.items():
            records[name].append(nearness(method(small), teacher))
    return {name: mean_of(each) for name, each in records.items()}


def _pair(model: BrixelFeatures, picture: Path, side: int) -> tuple[Tensor, Tensor]:
    """The student's pixels (1, 3, S, S) and the teacher's map (1, D, 4h, 4w) of a picture's centre."""
    vit = model.config.backbone.vit
    crop = teacher_crop(load_image(picture), CropSettings(side, random=False), torch.Generator())
    small, large = (
        normalised(each, vit.mean, vit.std)[None].to(model.device, model.dtype) for each in (student_view(crop), crop)
    )
    return small, model.backbone_features(large)


def report(result: Fidelity, command: str) -> str:
    """The figures as Markdown, with the share of bilinear's 1 - cosine that each method removes."""
    lines = [
        "# How near to the teacher",
        "",
        "| student's picture | teacher's | method | L1 | cosine | of bilinear's 1 - cosine removed |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for side, methods in result.figures.items():
        plain = 1 - methods["bilinear"]["cosine"]
        for name, figure in methods.items():
            removed = 1 - (1 - figure["cosine"]) / plain if plain > 0 else 0.0
            lines.append(
                f"| {side // DOWNSAMPLING} px | {side} px | {name} "
                f"| {figure['l1']:.4f} | {figure['cosine']:.4f} | {removed:.1%} |"
            )
    return "\n".join([*lines, "", result.recipe, "Made by:", "", f"    {command}"])
