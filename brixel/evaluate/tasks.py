"""What can be asked of a model, each as one value with its settings, for the command line and for suites."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.datasets.depth_normals import MeasuredImages, read_measured
from brixel.evaluate.datasets.labelled import LabelledImages, read_labelled
from brixel.evaluate.feature_sources import INTERPOLATED, SOURCES, STUDENT, TEACHER, sources_of
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.matching import matching
from brixel.evaluate.probes.depth_normals import CONVOLUTIONAL, shape
from brixel.evaluate.probes.segmentation import LINEAR, segmentation
from brixel.evaluate.probes.training import ProbeSettings
from brixel.evaluate.report import Report
from brixel.images.crops import check_teacher_px
from brixel.images.find_images import find_images

PROBED = ("bilinear", STUDENT, TEACHER)
DEFAULT_SOURCES = {
    **{"fidelity": (*INTERPOLATED, STUDENT), "matching": PROBED},
    **{"segmentation": PROBED, "depth": PROBED, "normals": PROBED},
}
KINDS = tuple(DEFAULT_SOURCES)
PROBES = ("segmentation", "depth", "normals")
BOUNDARY_PX = 8


@dataclass(frozen=True)
class Task:
    """One question. ``teacher_px``: sides of the teacher's image, four times the student's.

    ``images``: images and folders, for fidelity and matching. For probes: ``data``, ``layout``, ``train``, ``val``;
    ``steps``, None for the usual number; ``limit``, only so many images of each split; ``cache``, where features are
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
        need, given = ("data", self.data) if self.kind in PROBES else ("images", self.images)
        if not given:
            raise BrixelError(f"task {self.kind!r} needs {need!r}, and none is given")
        if not self.teacher_px:
            raise BrixelError(f"task {self.kind!r} needs 'teacher_px', such as [1024]")
        if not self.sources:
            object.__setattr__(self, "sources", DEFAULT_SOURCES[self.kind])

    def check(self) -> None:
        """Raise BrixelError where images or data are missing, or a source is not known; nothing is computed."""
        if unknown := [name for name in self.sources if name not in SOURCES]:
            raise BrixelError(f"unknown source {unknown[0]!r}; {did_you_mean(unknown[0], SOURCES)}")
        if self.kind == "segmentation":
            _labelled(self)
        elif self.kind in PROBES:
            _measured(self)
        else:
            find_images(self.images)

    def check_sides(self, model: BrixelFeatures) -> None:
        """Raise BrixelError where a side is no whole patches of the model."""
        for side in self.teacher_px:
            check_teacher_px(side, model.patch_px)

    def run(self, model: BrixelFeatures, name: str = "") -> Report:
        """Ask a model; ``name``: what it is called in the report, its backbone's title where empty."""
        self.check_sides(model)
        return _RUN[self.kind](self, model, name or model.config.backbone.title)


def _fidelity(task: Task, model: BrixelFeatures, name: str) -> Report:
    images = [path for path, _ in find_images(task.images)]
    return _of_images(task, fidelity(model, images, task.teacher_px, task.sources, name=name))


def _matching(task: Task, model: BrixelFeatures, name: str) -> Report:
    images = [path for path, _ in find_images(task.images)]
    return _of_images(task, matching(sources_of(model, task.sources), images, task.teacher_px, model=name))


def _of_images(task: Task, report: Report) -> Report:
    """The report, whose recipe begins with where the images are."""
    return dataclasses.replace(report, recipe=f"{', '.join(path.as_posix() for path in task.images)}: {report.recipe}")


def _segmentation(task: Task, model: BrixelFeatures, name: str) -> Report:
    train, val = _labelled(task)
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
    train, val = _measured(task)
    settings = _steps(CONVOLUTIONAL, task.steps)
    sources = sources_of(model, task.sources)
    return shape(task.kind, sources, train, val, task.teacher_px, model=name, settings=settings, cache=task.cache)


def _labelled(task: Task) -> tuple[LabelledImages, LabelledImages]:
    """To fit and to report."""
    assert task.data is not None
    train, val = (read_labelled(task.layout, task.data, each).first(task.limit) for each in (task.train, task.val))
    return train, dataclasses.replace(val, name=_data_name(task, val.name))


def _measured(task: Task) -> tuple[MeasuredImages, MeasuredImages]:
    """To fit and to report."""
    assert task.data is not None
    train, val = (
        read_measured(task.kind, task.layout, task.data, each).first(task.limit) for each in (task.train, task.val)
    )
    return train, dataclasses.replace(val, name=_data_name(task, val.name))


def _data_name(task: Task, name: str) -> str:
    """What tells this data from other: a data set's own name, or the folder as given; splits that are not the usual."""
    assert task.data is not None
    known = task.data.as_posix() if task.layout == "plain" else name
    return known if (task.train, task.val) == ("train", "val") else f"{known} ({task.train}, {task.val})"


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
