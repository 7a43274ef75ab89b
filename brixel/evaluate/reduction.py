"""What a reduction costs: the student's maps reduced and restored, and how much of the ranking of similarities is kept.

Shapes: D channels, h x w cells, Q queries, M candidates, N images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import by_metric
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import STUDENT, FeatureSource
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.reduction.reduce import Reduce, fit_all
from brixel.feature_maps.storage import stored_tensors
from brixel.model.upsampler import UPSCALE
from brixel.utils.progress import progress_bar

_QUERIES, _CANDIDATES = 32, 256  # cells of an image, drawn with a fixed seed
_NEAREST = (1, 10)  # neighbours that are compared
REDUCTION_COLUMNS = {
    **{"kib": ("KiB per image", ".1f"), "ranking": ("ranking kept, within", ".4f")},
    **{f"top{k}": (f"top {k} kept, within", ".1%") for k in _NEAREST},
    "ranking_across": ("ranking kept, across", ".4f"),
    **{f"top{k}_across": (f"top {k} kept, across", ".1%") for k in _NEAREST},
}
"""Of a report, beside the columns of fidelity; each is a metric of an image."""
REDUCTION_NOTES = (
    f"Ranking kept: rank correlation (Spearman) of the cosines of {_QUERIES} cells to all others, whole and reduced: "
    f"within an image, and across images to {_CANDIDATES} cells of each of the others. Top k kept: the share of the k "
    "most similar cells that are the same.",
    "Pixels of a stride are those of the student's image. KiB are those of the features as a file holds them.",
)


@dataclass(frozen=True)
class ReducedSource(FeatureSource):
    """A student whose maps are reduced, then restored to the grid and the channels that they had."""

    reduce: Reduce | None = None

    def reduced(self, raw: Tensor) -> FeatureMap:
        """The reduced map of one image's (D, h, w)."""
        assert self.reduce is not None
        reduced = self.reduce(as_map(raw, self.patch_px))
        assert isinstance(reduced, FeatureMap)
        return reduced

    def finish(self, raw: Tensor) -> Tensor:
        """Maps (B, D, h, w) reduced and restored."""
        return torch.stack([_on_grid(self.reduced(one).restored(), one.shape[1:]) for one in raw])


def as_map(raw: Tensor, patch_px: int) -> FeatureMap:
    """The map (D, h, w) of a student's square image, in its pixels."""
    stride = patch_px / UPSCALE
    return FeatureMap(raw, (round(raw.shape[1] * stride), round(raw.shape[2] * stride)), (stride, stride))


def _on_grid(restored: FeatureMap, grid_hw: Sequence[int]) -> Tensor:
    same = restored.grid_hw == tuple(grid_hw)
    features = restored.features if same else restored.resize((grid_hw[0], grid_hw[1])).features
    return features.float()


def reduced_sources(
    student: FeatureSource, reductions: Sequence[Reduce], fit_images: Sequence[Path], teacher_px: int
) -> list[FeatureSource]:
    """A source for each reduction of a student's maps, named by its steps; bases are fitted to other images.

    Raises:
        BrixelError: A basis is missing and there are no images to fit it to, or a reduction leaves no map.
    """
    if tables := [reduce.spec for reduce in reductions if not reduce.makes_maps]:
        raise BrixelError(f"{tables[0]} leaves points or regions, which have no map to compare with the teacher's")
    if waiting := [reduce.spec for reduce in reductions if not reduce.is_fitted]:
        if not fit_images:
            raise BrixelError(
                f"{waiting[0]} needs a basis: give reduce_images=, other images than those that are compared, or a "
                "fitted reduction"
            )
        reductions = fit_all(reductions, _maps(student, fit_images, teacher_px))
    shared = {name: getattr(student, name) for name in FeatureSource.__dataclass_fields__ if name != "name"}
    return [ReducedSource(f"{student.name} {reduce.spec}", **shared, reduce=reduce) for reduce in reductions]


def _maps(student: FeatureSource, images: Sequence[Path], teacher_px: int) -> Iterator[FeatureMap]:
    for image in progress_bar(images, f"basis, {teacher_px} px"):
        yield as_map(student.raw(centre_crop(image, teacher_px)[None])[0], student.patch_px)


class RankingKept:
    """How much of the ranking of similarities reduced maps keep, and their size, image by image."""

    def __init__(self, sources: Sequence[FeatureSource]) -> None:
        self._sources = [source for source in sources if isinstance(source, ReducedSource)]
        names = (STUDENT, *(source.name for source in self._sources))
        self._records: dict[str, list[dict[str, float]]] = {source.name: [] for source in self._sources}
        self._cells: dict[str, list[Tensor]] = {source.name: [] for source in sources if source.name in names}
        self._sizes: list[dict[str, float]] = []

    def add(self, maps: Mapping[str, Tensor]) -> None:
        """Take the maps (1, D, h, w) of an image, of the student and every reduced source."""
        if not self._sources:
            return
        raw = maps[STUDENT][0]
        number = len(self._sizes)
        self._sizes.append({"kib": raw.nbytes / 1024})
        generator = torch.Generator("cpu").manual_seed(number)
        order = torch.randperm(raw[0].numel(), generator=generator, device="cpu")
        queries = order[:_QUERIES]
        units = {name: _unit(maps[name][0]) for name in self._cells}
        for name, cells in units.items():
            self._cells[name].append(cells[order[:_CANDIDATES]])
        whole = units[STUDENT]
        others = torch.arange(len(whole)) != queries[:, None]  # Q M, without the query itself
        for source in self._sources:
            kept = _kept(
                *((cells[queries] @ cells.T)[others].view(len(queries), -1) for cells in (whole, units[source.name]))
            )
            reduced = source.reduced(raw)
            stored = stored_tensors(reduced.features, reduced.scales)
            size_bytes = sum(tensor.nbytes for tensor in stored.values())
            self._records[source.name].append({"kib": size_bytes / 1024, **kept})

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """Every metric of every source by image, (N,)."""
        if not self._sources:
            return {}
        count = len(self._sizes)
        for source in self._sources if count > 1 else ():
            for number in range(count):
                pair = (self._cells[name] for name in (STUDENT, source.name))
                kept = _kept(*(_to_others(cells, number) for cells in pair))
                self._records[source.name][number] |= {f"{key}_across": value for key, value in kept.items()}
        return {
            STUDENT: by_metric(self._sizes),
            **{name: by_metric(records) for name, records in self._records.items()},
        }


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.flatten(1).T.double(), dim=1)


def _to_others(cells: Sequence[Tensor], number: int) -> Tensor:
    """Cosines of an image's queries to the candidates of all other images: (Q, M)."""
    others = torch.cat([found for index, found in enumerate(cells) if index != number])
    return cells[number][:_QUERIES] @ others.T


def _kept(whole: Tensor, reduced: Tensor) -> dict[str, float]:
    """What two matrices of similarities (Q, M) have in common, as means over the queries."""
    nearest = {f"top{k}": float(neighbours_kept(whole, reduced, k).mean()) for k in _NEAREST if k <= whole.shape[1]}
    return {"ranking": float(rank_correlation(whole, reduced).mean()), **nearest}


def rank_correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Spearman's rank correlation of the rows of two matrices (Q, M): (Q,), float64; ties are broken by position."""
    ranks = [values.argsort(dim=1, stable=True).argsort(1).double() for values in (ours, theirs)]
    first, second = (F.normalize(rank - rank.mean(1, keepdim=True), dim=1) for rank in ranks)
    return (first * second).sum(1)


def neighbours_kept(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """The share of the ``count`` largest values of each row that are among those of the other matrix: (Q,)."""
    first, second = (
        torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(count, 1).indices, True)
        for values in (ours, theirs)
    )
    return (first & second).double().sum(1) / count
