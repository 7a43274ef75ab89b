"""What can be asked of a model, each as one value with its settings, for the command line and for suites."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from brixel.crops import check_teacher_px
from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.datasets import read_labelled
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.matching import matching
from brixel.evaluate.measured import read_measured
from brixel.evaluate.probe import ProbeSettings
from brixel.evaluate.report import Report
from brixel.evaluate.segmentation import LINEAR, segmentation
from brixel.evaluate.shape import CONVOLUTIONAL, shape
from brixel.evaluate.sources import INTERPOLATED, STUDENT, TEACHER, sources_of
from brixel.features import BrixelFeatures
from brixel.pictures import find_pictures

PROBED = ("bilinear", STUDENT, TEACHER)
DEFAULT_SOURCES = {
    **{"fidelity": (*INTERPOLATED, STUDENT), "matching": PROBED},
    **{"segmentation": PROBED, "depth": PROBED, "normals": PROBED},
}
KINDS = tuple(DEFAULT_SOURCES)
BOUNDARY_PX = 8


@dataclass(frozen=True)
class Task:
    """One question. ``teacher_px``: sides of the teacher's picture, four times the student's.

    ``images``: pictures and folders, for fidelity and matching. For probes: ``data``, ``layout``, ``train``, ``val``;
    ``steps``, None for the usual number; ``limit``, only so many pictures of each split; ``cache``, where features are
    kept; ``boundary_px``, for segmentation. ``sources``: names of `sources.SOURCES`; empty for the usual ones.
    """

    kind: str
    teacher_px: tuple[int, ...]
    images: tuple[Path, ...] = ()
    data: Path | None = None
    layout: str = "plain"
    train: str = "train"
    val: str = "val"
    sources: tuple[str, ...] = ()
    boundary_px: int = BOUNDARY_PX
    steps: int | None = None
    limit: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BrixelError(f"unknown task {self.kind!r}; {did_you_mean(self.kind, KINDS)}")
        need, given = ("images", self.images) if self.kind in ("fidelity", "matching") else ("data", self.data)
        if not given:
            raise BrixelError(f"task {self.kind!r} needs {need!r}, and none is given")
        if not self.teacher_px:
            raise BrixelError(f"task {self.kind!r} needs 'teacher_px', such as [1024]")
        if not self.sources:
            object.__setattr__(self, "sources", DEFAULT_SOURCES[self.kind])

    def run(self, model: BrixelFeatures, name: str = "") -> Report:
        """Ask a model; ``name``: what it is called in the report, its backbone's title where empty."""
        for side in self.teacher_px:
            check_teacher_px(side, model.patch_px)
        return _RUN[self.kind](self, model, name or model.config.backbone.title)


def _fidelity(task: Task, model: BrixelFeatures, name: str) -> Report:
    pictures = [path for path, _ in find_pictures(task.images)]
    return fidelity(model, pictures, task.teacher_px, task.sources, name=name)


def _matching(task: Task, model: BrixelFeatures, name: str) -> Report:
    pictures = [path for path, _ in find_pictures(task.images)]
    return matching(sources_of(model, task.sources), pictures, task.teacher_px, model=name)


def _segmentation(task: Task, model: BrixelFeatures, name: str) -> Report:
    assert task.data is not None
    train, val = (read_labelled(task.layout, task.data, each).first(task.limit) for each in (task.train, task.val))
    return segmentation(
        sources_of(model, task.sources),
        train,
        val,
        task.teacher_px,
        model=name,
        settings=_steps(LINEAR, task.steps),
        within_px=task.boundary_px,
        cache=task.cache,
    )


def _shape(task: Task, model: BrixelFeatures, name: str) -> Report:
    assert task.data is not None
    train, val = (
        read_measured(task.kind, task.layout, task.data, each).first(task.limit) for each in (task.train, task.val)
    )
    settings = _steps(CONVOLUTIONAL, task.steps)
    sources = sources_of(model, task.sources)
    return shape(task.kind, sources, train, val, task.teacher_px, model=name, settings=settings, cache=task.cache)


def _steps(settings: ProbeSettings, steps: int | None) -> ProbeSettings:
    return settings if steps is None else dataclasses.replace(settings, steps=steps)


_RUN: dict[str, Callable[[Task, BrixelFeatures, str], Report]] = {
    "fidelity": _fidelity,
    "matching": _matching,
    "segmentation": _segmentation,
    "depth": _shape,
    "normals": _shape,
}
FIELDS = tuple(field.name for field in dataclasses.fields(Task))
