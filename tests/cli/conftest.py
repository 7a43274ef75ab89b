"""What the tests of several commands need."""

import shutil

import pytest

from brixel import BrixelFeatures
from brixel.cli.app import main


@pytest.fixture(scope="session")
def saved(backbone_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def model_folder(saved, tmp_path):
    """A copy, as some tests change it."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def run():
    """Run a command; its exit status, also where it exits."""

    def command(*arguments):
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code

    return command
