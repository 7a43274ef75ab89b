"""Loading a saved probe of either kind."""

import os
from pathlib import Path

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.probe.probe_folder import kind_of_probe
from brixel.probe.regression import RegressionProbe
from brixel.probe.segmentation import SegmentationProbe
from brixel.utils.fields import check_field, path_like


def load_probe(
    folder: str | os.PathLike[str],
    *,
    model: BrixelFeatures | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> SegmentationProbe | RegressionProbe:
    """Read a probe of either kind; see :meth:`SegmentationProbe.load` for the arguments and errors."""
    path: Path = check_field("folder", folder, path_like())
    found = SegmentationProbe if kind_of_probe(path) == SegmentationProbe.KIND else RegressionProbe
    return found.load(path, model=model, device=device, dtype=dtype)
