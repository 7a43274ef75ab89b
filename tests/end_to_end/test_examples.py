"""The examples run as written, on a tiny backbone, and stay short."""

import importlib.util
import runpy
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from helpers import ROOT
from PIL import Image

from brixel import BrixelFeatures
from brixel.evaluate import read_davis

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script in ``tmp_path``, with these arguments; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_quickstart(run, backbone_folder, image_path, tmp_path):
    printed = run("quickstart.py", image_path, backbone_folder)
    assert "FeatureMap((64, 64, 96)" in printed
    assert (tmp_path / "features.safetensors").stat().st_size > 64 * 64 * 96 * 4
    with Image.open(tmp_path / "features.png") as image:
        assert image.size == (90, 60)


def test_similarity_without_a_window(run, backbone_folder, image_path, tmp_path):
    run("similarity.py", image_path, 30, 40, backbone_folder)
    with Image.open(tmp_path / "heat.png") as image:
        assert image.size == (90, 60)


@pytest.mark.slow
def test_raster(run, backbone_folder, tmp_path):
    BrixelFeatures.from_backbone(backbone_folder, device="cpu").save_pretrained(tmp_path / "model")
    printed = run("raster.py", tmp_path / "model")
    assert "scene_features.tif: 64 features, 200x200 cells of 3.5 px; 9 windows of 280x280 px" in printed
    with rasterio.open(tmp_path / "like_the_river.tif") as similarity, rasterio.open(tmp_path / "scene.tif") as scene:
        assert similarity.shape == (200, 200)
        assert similarity.bounds == scene.bounds
        assert np.isnan(similarity.read(1)[:20, :20]).all()


@pytest.mark.slow
def test_without_a_folder_they_use_the_bundled_model(run, image_path, tmp_path):
    assert "FeatureMap((384, 64, 96)" in run("quickstart.py", image_path)
    run("similarity.py", image_path, 30, 40)
    assert (tmp_path / "heat.png").exists()


@pytest.mark.slow
def test_the_drawn_scene(tmp_path):
    command = [sys.executable, EXAMPLES / "draw_scene.py", "scene.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    with Image.open(tmp_path / "scene.jpg") as image:
        assert image.size == (960, 640)


@pytest.mark.parametrize("name", ["quickstart.py", "similarity.py"])
def test_examples_stay_under_forty_lines(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


def test_the_raster_stays_under_sixty_lines():
    assert len((EXAMPLES / "raster.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
def test_segmentation_with_few_masks(run, tmp_path):
    printed = run("segment_with_few_masks.py")
    masks, clicks = (float(line.split("mean IoU ")[1][:5]) for line in printed.splitlines())
    assert masks > 0.6
    assert clicks > 0.5
    with Image.open(tmp_path / "mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (224, 224))
    assert (tmp_path / "overlay.png").exists()
    assert len((EXAMPLES / "segment_with_few_masks.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
def test_the_linear_probe_stays_under_sixty_lines_and_runs_on_own_masks(tmp_path, capsys):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for name, number in (("a", 0), ("b", 1)):
            Image.new("RGB", (64, 64), (200 * number, 90, 40)).save(
                tmp_path / "data" / split / "images" / f"{name}.png"
            )
            Image.new("L", (64, 64), number).save(tmp_path / "data" / split / "masks" / f"{name}.png")
    spec = importlib.util.spec_from_file_location("linear_probe", EXAMPLES / "linear_probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(tmp_path / "data"), "--teacher-px", "64", "--steps", "9", "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr().out
    assert "| brixel-tiny | 16 | student | 1.0000 |" in printed
    assert "| brixel-tiny | 64 | colours | 1.0000 |" in printed
    assert len((EXAMPLES / "linear_probe.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.fixture
def drawn_masks(tmp_path):
    """Pictures of two sizes with a disk on noise, and the disks' masks."""
    numbers = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "drawn" / folder).mkdir(parents=True)
    for index, (height, width) in enumerate([(60, 90), (90, 60), (60, 90)]):
        y, x = np.mgrid[:height, :width]
        disk = (y - numbers.uniform(20, 40)) ** 2 + (x - numbers.uniform(20, 40)) ** 2 < 15**2
        colours = np.where(disk[..., None], (220, 40, 40), numbers.integers(0, 120, (height, width, 3)))
        Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "drawn" / "images" / f"{index}.png")
        Image.fromarray(disk.astype(np.uint8)).save(tmp_path / "drawn" / "masks" / f"{index}.png")
    return tmp_path / "drawn"


@pytest.mark.slow
def test_a_decoder_learns(run, drawn_masks, tmp_path):
    printed = run("train_decoder.py", drawn_masks, "--model", "brixel-tiny", "--epochs", 10)
    losses = [float(line.split()[-1]) for line in printed.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert set(torch.load(tmp_path / "decoder.pt")) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_the_main_object_is_cut_out(run, drawn_masks, tmp_path):
    run("foreground.py", drawn_masks / "images" / "0.png")
    with Image.open(tmp_path / "foreground.png") as image:
        assert image.size == (270, 60)
        cut = (np.asarray(image)[:, 90:180] != 255).any(-1)
    with Image.open(drawn_masks / "masks" / "0.png") as mask:
        disk = np.asarray(mask) > 0
    assert (cut & disk).sum() / (cut | disk).sum() > 0.7


@pytest.mark.slow
def test_objects_are_tracked_through_a_drawn_video(run, tmp_path):
    printed = run("track.py", "brixel-tiny").splitlines()
    scores = {line.partition(":")[0]: float(line.split()[2]) for line in printed}
    assert scores.keys() == {"disk", "square"}
    assert scores["disk"] > 0.9
    assert {"drawn.mp4", "tracked.mp4"} == {path.name for path in tmp_path.iterdir()}
    assert len((EXAMPLES / "track.py").read_text(encoding="utf-8").splitlines()) < 60


def test_drawn_videos_have_the_layout_of_davis(run, tmp_path):
    run("draw_videos.py", tmp_path / "drawn", 1, 4)
    [sequence] = read_davis(tmp_path / "drawn").sequences
    assert (len(sequence.samples), sequence.objects()) == (24, [1, 2, 3, 4])
