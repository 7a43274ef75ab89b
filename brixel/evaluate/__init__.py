"""Evaluation: how good dense features are, and what they cost.

>>> from brixel import BrixelFeatures
>>> from brixel.evaluate import read_labelled, segmentation, sources_of
>>> sources = sources_of(BrixelFeatures.from_pretrained(), ["bilinear", "student", "teacher"])
>>> train, val = (read_labelled("plain", "data", split) for split in ("train", "val"))
>>> report = segmentation(sources, train, val, [512], model="brixel-tiny")

`docs/evaluation.md` defines the metrics.
"""

from brixel.evaluate.cost.scaling import cost
from brixel.evaluate.cost.throughput import throughput
from brixel.evaluate.datasets.davis import read_davis
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.datasets.labelled import LabelledDataset, read_labelled
from brixel.evaluate.feature_sources import FeatureSource, sources_of
from brixel.evaluate.fidelity import fidelity
from brixel.evaluate.matching import matching
from brixel.evaluate.panels import panel_of
from brixel.evaluate.probes.depth_normals import depth_normals
from brixel.evaluate.probes.segmentation import segmentation
from brixel.evaluate.probes.training import ProbeSettings
from brixel.evaluate.report import Report
from brixel.evaluate.suite import run_suite
from brixel.evaluate.suite_file import read_suite
from brixel.evaluate.video import video

__all__ = [
    "FeatureSource",
    "LabelledDataset",
    "ProbeSettings",
    "Report",
    "cost",
    "depth_normals",
    "fidelity",
    "matching",
    "panel_of",
    "read_davis",
    "read_labelled",
    "read_measured",
    "read_suite",
    "run_suite",
    "segmentation",
    "sources_of",
    "throughput",
    "video",
]


def __dir__() -> list[str]:
    return sorted(__all__)
