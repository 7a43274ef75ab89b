"""The programs that made the bundled weights run from images to a model, with few crops and steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file

from brixel import BrixelFeatures
from brixel.model.universal import UniversalUpsampler


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three photographs, and a cut-out with its mask."""
    folder, numbers = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("photos", "cutouts/images", "cutouts/masks"):
        (folder / name).mkdir(parents=True)
    for index in range(3):
        noise = Image.fromarray(numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        noise.resize((320, 280), Image.Resampling.BICUBIC).save(folder / "photos" / f"{index}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[10:50, 20:60] = 3
    Image.fromarray(mask).save(folder / "cutouts" / "masks" / "a.png")
    Image.new("RGB", (64, 64), "red").save(folder / "cutouts" / "images" / "a.png")
    return folder


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def maps(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("maps")
    settings = ("--photos", images / "photos", "--cutouts", images / "cutouts", "--val", images / "photos")
    run("universal/make_maps.py", "--backbone", "brixel-tiny:256=3,384=2", *settings, "--out", out)
    return out


@pytest.mark.slow
def test_the_universal_upsampler_is_trained_and_goes_on(maps, tmp_path):
    settings = ("--maps", maps, "--out", tmp_path, "--every", 2)
    first = run("universal/train.py", *settings, "--steps", 2)
    assert '"step": 2' in first
    assert '"brixel-tiny-256/4"' in first
    universal = UniversalUpsampler()
    universal.load_state_dict(load_file(tmp_path / "universal.safetensors"))
    assert universal.change.weight.abs().max() > 0
    again = run("universal/train.py", *settings, "--steps", 4)
    assert '"step": 4' in again
    assert '"step": 2' not in again


@pytest.mark.slow
def test_other_upsamplers_are_compared(maps, tmp_path):
    table = run("baselines/compare.py", "--maps", maps, "--backbone", "brixel-tiny", "--steps", 2, "--out", tmp_path)
    for row in ("bilinear", "joint bilateral", "cross-attention", "universal"):
        assert f"| {row}" in table
    assert "64 px | 96 px" in table


@pytest.mark.slow
def test_a_model_of_the_second_generation_is_made(maps, images, tmp_path):
    folders = ("--images", images / "photos", "--val", images / "photos", "--maps", maps, "--out", tmp_path)
    sizes = ("--sizes", 64, 96, "--steps", 2, "--batch-size", 2, "--fit", 4)
    run("small/make.py", "--backbone", "brixel-tiny", *folders, *sizes, "--name", "brixel-tiny")
    model = BrixelFeatures.from_pretrained(tmp_path / "model", device="cpu")
    assert (model.config.adapter.grids, model.config.adapter.short_side_px) == ((4, 6), 224)
    assert model.config.backbone.int8
    assert model.config.backbone.sources == ("brixel-tiny",)
