"""Probes that one can keep: linear readouts of dense features, for classes and for values of pixels.

>>> from brixel.probe import SegmentationProbe
>>> probe = SegmentationProbe().fit(["a.jpg"], clicks=[[(120, 88, 1), (30, 200, 0)]])
>>> probe.predict("b.jpg").shape  # a class for every pixel
>>> probe.save("probe")

`docs/probes.md` is the guide.
"""

from brixel.errors import NotFittedError
from brixel.probe.load import load_probe
from brixel.probe.regression import RegressionProbe
from brixel.probe.segmentation import SegmentationProbe

__all__ = ["NotFittedError", "RegressionProbe", "SegmentationProbe", "load_probe"]


def __dir__() -> list[str]:
    return sorted(__all__)
