"""What the tests of extraction share: a model of 28 px and a folder of images."""

import shutil

import pytest
from PIL import Image

from brixel import BrixelFeatures


@pytest.fixture(scope="session")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, adapter="fresh", device="cpu", short_side_px=28)


@pytest.fixture
def album(tmp_path, image_path):
    """a.png, b.JPG, sub/a.png; a text file and a hidden image that do not count."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png", ".hidden.png"):
        shutil.copy(image_path, folder / name)
    Image.open(image_path).rotate(90, expand=True).save(folder / "b.JPG")
    (folder / "notes.txt").write_text("not an image")
    return folder
