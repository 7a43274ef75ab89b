"""The names that other people's code imports stay where they are."""

import subprocess
import sys

PROGRAM = """
import brixel
from brixel import (
    BrixelError, BrixelFeatures, CheckpointError, DownloadError, FeatureMap, ImageError, KnownBackbone, MapFolder,
    MemoryLimitError, PcaBasis, UploadError, ViTConfig, __version__, list_models,
)
from brixel.train import LossWeights, TrainConfig, distill, edge_loss, l1_loss, spectral_loss, total_loss
from brixel.extraction import MapFolder, extract_files
shown = [name for name in dir(brixel) if not name.startswith("__")]
assert shown == sorted(shown), shown
expected = {
    "BrixelError", "BrixelFeatures", "CheckpointError", "DownloadError", "FeatureMap", "ImageError", "KnownBackbone",
    "MapFolder", "MemoryLimitError", "PcaBasis", "UploadError", "ViTConfig", "list_models",
}
assert set(shown) == expected, set(shown) ^ expected
"""


def test_names_of_version_0_1_are_imported_from_where_they_were():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
