"""The tasks of evaluation, each as one value with its settings, for the command line and for suites."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.evaluate.datasets.davis import VideoDataset, read_davis
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.datasets.labelled import LabelledDataset, read_labelled
from brixel.evaluate.feature_sources import BASE, INTERPOLATED, SOURCES, STUDENT, TEACHER, FeatureSource, sources_of
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.matching import matching
from brixel.evaluate.probes.depth_normals import CONVOLUTIONAL, depth_normals
from brixel.evaluate.probes.segmentation import LINEAR, segmentation
from brixel.evaluate.report import Report
from brixel.evaluate.video import video
from brixel.images.crops import check_teacher_px
from brixel.images.find_images import find_images
from brixel.utils.fields import check_names
from brixel.utils.torch_defaults import plain_defaults

COMPARED = (BASE, STUDENT, TEACHER)
PROBES = ("segmentation", "depth", "normals")
VIDEO = "video"
OF_DATA = (*PROBES, VIDEO)
"""The tasks on a data set; the others are on images."""
DEFAULT_SOURCES = {"fidelity": (*INTERPOLATED, STUDENT), **dict.fromkeys(("matching", *OF_DATA), COMPARED)}
KINDS = tuple(DEFAULT_SOURCES)
BOUNDARY_PX = 8


@dataclass(frozen=True)
class Task:
    """A task with its settings. ``teacher_px``: sides of the teacher's image in pixels, four times the student's.

    ``images``: images and folders, for fidelity and matching. For probes: ``data``, ``layout`` and the splits ``train``
    and ``val``; ``steps`` of the training, None for the default; ``limit``, only so many images of each split;
    ``cache``, the folder in which features are kept; ``boundary_px``, for segmentation. For fidelity: ``reduce``,
    reductions of the student's maps, and ``reduce_images``, what their bases are fitted to. For videos:
    ``data`` in the layout of DAVIS 2017, its split ``val``, and ``limit``, only so many videos. ``sources``: names from
    ``SOURCES``; empty for the defaults of the kind.
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
    reduce: tuple[str, ...] = ()
    reduce_images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_names([self.kind], KINDS, "unknown task")
        needed, given = ("data", self.data) if self.kind in OF_DATA else ("images", self.images)
        if not given:
            raise BrixelError(f"task {self.kind!r} needs {needed!r}, and none is given")
        if not self.teacher_px:
            raise BrixelError(f"task {self.kind!r} needs 'teacher_px', such as [1024]")
        if not self.sources:
            object.__setattr__(self, "sources", DEFAULT_SOURCES[self.kind])

    def check(self) -> None:
        """Raise BrixelError where images or data are missing, or a source is unknown; nothing is computed."""
        check_names(self.sources, SOURCES, "unknown source")
        if self.kind in PROBES:
            self._splits()
        elif self.kind == VIDEO:
            self._videos()
        else:
            find_images(self.images)

    def check_sides(self, model: BrixelFeatures) -> None:
        """Raise BrixelError for a side that the model cannot split into whole patches."""
        for side in self.teacher_px:
            check_teacher_px(side, model.patch_px)

    @plain_defaults(dtype=True)
    def run(self, model: BrixelFeatures, name: str = "") -> Report:
        """Evaluate a model; ``name`` is its name in the report, by default its backbone's."""
        self.check_sides(model)
        name = name or model.config.backbone.title
        if self.kind in PROBES:
            return self._run_probe(sources_of(model, self.sources), name)
        if self.kind == VIDEO:
            return video(sources_of(model, self.sources), self._videos(), self.teacher_px, model=name)
        images = [path for path, _ in find_images(self.images)]
        if self.kind == "fidelity":
            report = fidelity(
                model,
                images,
                self.teacher_px,
                self.sources,
                name=name,
                reduce=self.reduce,
                reduce_images=self._reduce_images(),
            )
        else:
            report = matching(sources_of(model, self.sources), images, self.teacher_px, model=name)
        paths = ", ".join(path.as_posix() for path in self.images)
        return dataclasses.replace(report, recipe=f"{paths}: {report.recipe}")

    def _reduce_images(self) -> list[Path]:
        return [path for path, _ in find_images(self.reduce_images)] if self.reduce_images else []

    def _run_probe(self, sources: Sequence[FeatureSource], name: str) -> Report:
        train, val = self._splits()
        settings = LINEAR if self.kind == "segmentation" else CONVOLUTIONAL
        if self.steps is not None:
            settings = dataclasses.replace(settings, steps=self.steps)
        common: dict[str, Any] = {"model": name, "settings": settings, "cache": self.cache}
        if self.kind == "segmentation":
            return segmentation(sources, train, val, self.teacher_px, within_px=self.boundary_px, **common)
        return depth_normals(self.kind, sources, train, val, self.teacher_px, **common)

    def _videos(self) -> VideoDataset:
        """The videos; whatever is wrong with the first annotation of one shows before hours of work."""
        assert self.data is not None
        data = read_davis(self.data, self.val).first(self.limit)
        for sequence in data.sequences:
            sequence.objects()
        return dataclasses.replace(data, name=f"{data.name} ({self.val})")

    def _splits(self) -> tuple[LabelledDataset, LabelledDataset]:
        """The splits for training and validation; the name of the latter is that for the report."""
        assert self.data is not None
        read = read_labelled if self.kind == "segmentation" else functools.partial(read_measured, self.kind)
        train, val = (read(self.layout, self.data, split).first(self.limit) for split in (self.train, self.val))
        for data in (train, val):  # whatever is wrong with all files of a data set shows before hours of work
            data.target(0)
        name = self.data.as_posix() if self.layout == "plain" else val.name
        unusual = "" if (self.train, self.val) == ("train", "val") else f" ({self.train}, {self.val})"
        return train, dataclasses.replace(val, name=f"{name}{unusual}")


FIELDS = tuple(field.name for field in dataclasses.fields(Task))
