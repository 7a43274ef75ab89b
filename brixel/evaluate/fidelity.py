"""How close maps are to the teacher's: the student's, and those of plain interpolation, which it must beat.

The teacher is the backbone on an image of four times the side. Images are cut to centre squares; metrics are computed
per image and then averaged. `docs/evaluation.md` defines them.

Centred metrics need the teacher's mean feature over all images before the first map is compared. So the teacher runs
over the images first, and the sums of its features are kept. Its maps are kept too, in float32, so that the raw metrics
do not change, up to `_KEPT_BYTES` of memory; the others are computed a second time when they are compared.
Shapes: B batch, D width, H x W cells, N images; T and S = T / 4 the teacher's and the student's side in pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import by_metric, interval
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import (
    BASE,
    INTERPOLATED,
    STUDENT,
    TEACHER,
    FeatureSource,
    features_by_name,
    sources_of,
)
from brixel.evaluate.reduction import REDUCTION_COLUMNS, REDUCTION_NOTES, RankingKept, reduced_sources
from brixel.evaluate.report import Report
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.images.crops import DOWNSAMPLING, check_teacher_px
from brixel.model.losses import edge_loss, principal_directions, spectral_loss
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar

BASELINES = ("bilinear", "bicubic")
EDGE_SHARE = 0.1  # of an image's cells: those with the teacher's strongest gradients
_DIRECTIONS = 8  # the teacher's first principal directions, along which edges are found, per image
_KEPT_BYTES = 2**30  # of the teacher's maps at one size; beyond that, they are computed twice
_TIE = 1e-6  # cosines that differ by no more are equal: a fresh student and bilinear differ by float32's rounding
_REMOVED = {  # cosine: key of the share of bilinear's 1 - cosine that is removed
    "cosine": "removed",
    "centred_cosine": "centred_removed",
    "cosine_edges": "edges_removed",
    "centred_cosine_edges": "centred_edges_removed",
}
_BETTER = {"cosine": "better", "centred_cosine": "centred_better"}  # cosine: key of the number of images
_R2_TERMS = ("squared_error", "variance")


def l1_and_cosine(maps: Tensor, teacher: Tensor) -> dict[str, float]:
    """Mean absolute difference ``l1`` and mean cosine similarity over the cells of maps (B, D, H, W)."""
    maps, teacher = maps.float(), teacher.float()
    cosine = F.cosine_similarity(maps, teacher, dim=1).mean()
    return {"l1": float((maps - teacher).abs().mean()), "cosine": float(cosine)}


def interpolated(backbone: Callable[[Tensor], Tensor], mode: str, grid_hw: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A function from pixels to the backbone's own map, interpolated to the teacher's grid: the baseline."""
    return lambda pixels: F.interpolate(backbone(pixels), size=tuple(grid_hw), mode=mode, align_corners=False)


def mean_feature(teacher_maps: Iterable[Tensor]) -> Tensor:
    """The mean over all cells of maps (1, D, H, W) of one size: (D,), float32, summed in float64."""
    means = [maps.mean((0, 2, 3), dtype=torch.float64) for maps in teacher_maps]
    return torch.stack(means).mean(0).float()


def centred_metrics(maps: Tensor, teacher: Tensor, mean: Tensor, edges: Tensor) -> dict[str, float]:
    """Metrics of one image's map that do not reward a step towards the mean feature.

    Args:
        maps: The map, (1, D, H, W).
        teacher: The teacher's, (1, D, H, W).
        mean: Of :func:`mean_feature`, (D,).
        edges: Of :func:`teacher_edges`, (H - 2, W - 2).

    Returns:
        Cosines after ``mean`` is subtracted from both maps, over all cells and at edges, and the terms of :func:`r2`:
        the mean squared distance of cells to the teacher's, and of the teacher's cells to ``mean``.
    """
    maps, teacher = maps.float(), teacher.float()
    mean = mean.to(teacher)[:, None, None]
    cosine = F.cosine_similarity(maps - mean, teacher - mean, dim=1)[0]
    return {
        "centred_cosine": float(cosine.mean()),
        "centred_cosine_edges": float(cosine[1:-1, 1:-1][edges].mean()),
        "squared_error": float((maps - teacher).square().sum(1).mean()),
        "variance": float((teacher - mean).square().sum(1).mean()),
    }


def r2(images: Mapping[str, Tensor]) -> tuple[float, tuple[float, float]]:
    """Share of variance explained, of the metrics of images, (N,) each, and its 95 % interval."""
    return _share_gone(images["squared_error"], images["variance"].clamp(min=torch.finfo(torch.float64).tiny))


def better_count(own: Tensor, base: Tensor) -> int:
    """In how many images a cosine (N,) is higher than the base's; equal ones do not count."""
    return int((own > base + _TIE).sum())


def fidelity_metrics(
    maps: Tensor, teacher: Tensor, mean: Tensor, directions: Tensor, edges: Tensor
) -> dict[str, float]:
    """All metrics of one image's map, (1, D, H, W) of at least 3 x 3 cells, against the teacher's.

    ``mean``: the teacher's mean feature (D,) over all images. ``directions`` and ``edges`` are of the teacher's map:
    see :func:`edge_directions` and :func:`teacher_edges`.
    """
    maps, teacher = maps.float(), teacher.float()
    cosine = F.cosine_similarity(maps, teacher, dim=1)[0]
    return {
        **l1_and_cosine(maps, teacher),
        "cosine_edges": float(cosine[1:-1, 1:-1][edges].mean()),
        "edge": float(edge_loss(maps, teacher, directions=directions)),
        "spectral": float(spectral_loss(maps, teacher)),
        **centred_metrics(maps, teacher, mean, edges),
    }


def edge_directions(teacher: Tensor, *, across_processes: bool = True) -> Tensor:
    """The principal directions of the teacher's map (1, D, H, W) along which edges are found: (8 or D, D)."""
    return principal_directions(teacher, min(_DIRECTIONS, teacher.shape[1]), across_processes=across_processes)


def edges_of_one(teacher: Tensor) -> Tensor:
    """:func:`teacher_edges` of one image's map in this process alone, whatever other processes do."""
    teacher = teacher.float()
    return teacher_edges(teacher, edge_directions(teacher, across_processes=False))


def teacher_edges(teacher: Tensor, directions: Tensor) -> Tensor:
    """The tenth of inner cells with the largest Sobel gradients: (1, D, H, W) -> (H - 2, W - 2), True at edges."""
    projected = torch.einsum("nd,dhw->nhw", directions, teacher[0])[:, None]  # N 1 H W
    ramp, blur = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
    kernels = torch.stack([torch.outer(blur, ramp), torch.outer(ramp, blur)])[:, None]  # 2 1 3 3
    strength = F.conv2d(projected, kernels.to(projected)).square().sum((0, 1))  # H-2 W-2
    strongest = strength.flatten().topk(max(1, round(EDGE_SHARE * strength.numel()))).indices
    return torch.zeros_like(strength, dtype=torch.bool).flatten().index_fill(0, strongest, True).view_as(strength)


def fidelity(
    model: BrixelFeatures,
    images: Sequence[Path],
    teacher_px: Iterable[int],
    names: Sequence[str] = (*INTERPOLATED, STUDENT),
    *,
    name: str = "",
    reduce: Sequence[Reduce | str] = (),
    reduce_images: Sequence[Path] = (),
) -> Report:
    """Compare a model's maps with its teacher's on centre crops.

    Args:
        model: The model.
        images: Paths of images.
        teacher_px: Sides of the teacher's image in pixels, T.
        names: Of the sources to compare; see :func:`sources_of`.
        name: The model's name in the report; by default its backbone's.
        reduce: Reductions such as "pca:32,int8". The student's maps are also compared after each of them, restored,
            with the bytes of an image and the share of the ranking of similarities that is kept (`docs/reduction.md`).
        reduce_images: Images that their bases are fitted to.

    Returns:
        A row per side and source; the metrics of every image in ``details``.

    Raises:
        BrixelError: There is no image, or a side is not four whole patches.
        ImageError: An image cannot be used.
    """
    teacher = sources_of(model, [TEACHER])[0]
    reductions = [Reduce.of(each) for each in reduce]
    if reductions and STUDENT not in names:
        names = (*names, STUDENT)
    sources, title = sources_of(model, names), name or model.config.backbone.title
    if not reductions:
        return compare(sources, teacher, images, teacher_px, model=title)
    student = next(source for source in sources if source.name == STUDENT)

    def at_side(side: int) -> Sequence[FeatureSource]:
        return [*sources, *reduced_sources(student, reductions, reduce_images, side)]

    return _compare(at_side, teacher, images, teacher_px, title)


def compare(
    sources: Sequence[FeatureSource],
    teacher: FeatureSource,
    images: Sequence[Path],
    teacher_px: Iterable[int],
    *,
    model: str,
) -> Report:
    """As :func:`fidelity`, for any sources whose maps have the teacher's shape; ``model`` is their name."""
    return _compare(lambda side: sources, teacher, images, teacher_px, model)


def _compare(
    sources_at: Callable[[int], Sequence[FeatureSource]],
    teacher: FeatureSource,
    images: Sequence[Path],
    teacher_px: Iterable[int],
    model: str,
) -> Report:
    """As :func:`compare`, for sources that may depend on the side of the teacher's image."""
    sides = tuple(teacher_px)
    if not images:
        raise BrixelError("no images to compare on; expected at least one")
    for side in sides:
        check_teacher_px(side, teacher.patch_px)
    rows, details = [], {}
    for side in sides:
        sources = sources_at(side)
        found = _at_size(sources, teacher, images, side)
        rows += [_row(model, side, source, found) for source in sources]
        details[str(side)] = {name: {key: row.tolist() for key, row in by.items()} for name, by in found.items()}
    columns = {
        **{"model": ("model", ""), "image_px": ("student's image, px", "d"), "teacher_px": ("teacher's", "d")},
        **{"source": ("method", ""), "l1": ("L1", ".4f"), "cosine": ("cosine", ".4f")},
        **{"removed": ("of bilinear's 1 - cosine removed", ".1%"), "removed_interval": ("95 %", ".1%")},
        **{"better": ("better than bilinear in", "of")},
        **{"centred_cosine": ("centred cosine", ".4f"), "centred_removed": ("centred, removed", ".1%")},
        **{"centred_removed_interval": ("95 %", ".1%"), "centred_better": ("centred, better in", "of")},
        **{"r2": ("R2", ".3f"), "r2_interval": ("95 %", ".3f")},
        **{"cosine_edges": ("cosine at edges", ".4f"), "edges_removed": ("at edges, removed", ".1%")},
        **{"edges_removed_interval": ("95 %", ".1%"), "centred_cosine_edges": ("centred cosine at edges", ".4f")},
        **{"edge": ("edge error", ".3g"), "spectral": ("spectral error", ".3f")},
    }
    is_reduced = any("kib" in row for row in rows)
    columns |= REDUCTION_COLUMNS if is_reduced else {}
    recipe = f"{len(images)} images, centre crops; {describe_machine(torch.device(teacher.device))}."
    names = [str(image.name) for image in images]
    return Report(
        "fidelity",
        "Fidelity to the teacher",
        columns,
        rows,
        recipe,
        REDUCTION_NOTES if is_reduced else (),
        {"images": names, **details},
    )


def _at_size(
    sources: Sequence[FeatureSource], teacher: FeatureSource, images: Sequence[Path], side: int
) -> dict[str, dict[str, Tensor]]:
    """Every metric of every source by image, (N,), float64."""
    kept: list[Tensor] = []
    mean = mean_feature(_teacher_maps(teacher, images, side, kept))
    records: dict[str, list[dict[str, float]]] = {source.name: [] for source in sources}
    ranking = RankingKept(sources)
    for number, image in enumerate(progress_bar(images, f"images, {side} px")):
        crop = centre_crop(image, side)[None]
        target = kept[number] if number < len(kept) else teacher.features(crop)
        found = features_by_name(sources, crop)
        for name, maps in found.items():
            if maps.shape != target.shape:
                shapes = f"{tuple(maps.shape)}, the teacher {tuple(target.shape)}"
                raise BrixelError(f"source {name!r} gave {shapes}; only maps of the same shape can be compared")
        directions = edge_directions(target)
        edges = teacher_edges(target, directions)
        for name, maps in found.items():
            records[name].append(fidelity_metrics(maps, target, mean, directions, edges))
        ranking.add(found)
    of_reduced = ranking.metrics()
    return {name: {**by_metric(by), **of_reduced.get(name, {})} for name, by in records.items()}


def _teacher_maps(teacher: FeatureSource, images: Sequence[Path], side: int, kept: list[Tensor]) -> Iterator[Tensor]:
    """The teacher's map of every image; the first ones, up to `_KEPT_BYTES`, are appended to ``kept``."""
    for image in progress_bar(images, f"teacher, {side} px"):
        maps = teacher.features(centre_crop(image, side)[None])
        if (len(kept) + 1) * maps.nbytes <= _KEPT_BYTES:
            kept.append(maps)
        yield maps


def _row(model: str, side: int, source: FeatureSource, found: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    own, base = found[source.name], found.get(BASE)
    row = {"model": model, "image_px": side // DOWNSAMPLING, "teacher_px": side, "source": source.name}
    for key, values in own.items():
        if key not in _R2_TERMS:
            row[key], row[f"{key}_interval"] = float(values.mean()), interval(values)
    row["r2"], row["r2_interval"] = r2(own)
    if base is not None and source.name != BASE:
        for cosine, key in _REMOVED.items():
            row[key], row[f"{key}_interval"] = _share_gone(1 - own[cosine], (1 - base[cosine]).clamp(min=1e-9))
        for cosine, key in _BETTER.items():
            row[key] = [better_count(own[cosine], base[cosine]), len(own[cosine])]
    return row


def _share_gone(left: Tensor, whole: Tensor) -> tuple[float, tuple[float, float]]:
    """1 - sum of ``left`` / sum of ``whole`` over images, (N,) each, and its 95 % interval."""
    both = torch.stack([left, whole], 1)  # N 2
    value = float(1 - both[:, 0].sum() / both[:, 1].sum())
    return value, interval(both, lambda sums: 1 - sums[:, 0] / sums[:, 1])
