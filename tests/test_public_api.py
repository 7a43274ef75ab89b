"""The names that other people's code imports stay where they are."""

import importlib

import pytest

NAMES = {
    "brixel": (
        *("BrixelError", "BrixelFeatures", "CheckpointError", "DownloadError", "FeatureMap", "ImageError"),
        *("KnownBackbone", "MapFolder", "MemoryLimitError", "PcaBasis", "UploadError", "ViTConfig", "__version__"),
        "list_models",
    ),
    "brixel.train": (
        *("LossWeights", "TrainConfig", "distill", "edge_loss", "l1_loss", "spectral_loss", "total_loss"),
    ),
    "brixel.extraction": ("MapFolder", "Report", "extract_files"),
}
"""Those of version 0.1."""


@pytest.mark.parametrize("module", NAMES)
def test_names_of_version_0_1_are_imported_from_where_they_were(module):
    for name in NAMES[module]:
        assert hasattr(importlib.import_module(module), name), name


def test_dir_shows_the_public_names_and_no_modules():
    for module in (
        "brixel",
        "brixel.train",
        "brixel.probe",
        "brixel.evaluate",
        "brixel.extraction",
        "brixel.backbones",
    ):
        found = importlib.import_module(module)
        assert dir(found) == sorted(found.__all__), module
    assert set(dir(importlib.import_module("brixel"))) == {*NAMES["brixel"], "Matches", "upsample"}
