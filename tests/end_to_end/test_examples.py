"""The examples run as written, on a tiny backbone, and stay short."""

import importlib.util
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image

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
def test_without_a_folder_they_use_the_bundled_model(run, image_path, tmp_path):
    assert "FeatureMap((384, 64, 96)" in run("quickstart.py", image_path)
    run("similarity.py", image_path, 30, 40)
    assert (tmp_path / "heat.png").exists()


def test_the_drawn_scene(tmp_path):
    command = [sys.executable, EXAMPLES / "draw_scene.py", "scene.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    with Image.open(tmp_path / "scene.jpg") as image:
        assert image.size == (960, 640)


@pytest.mark.parametrize("name", ["quickstart.py", "similarity.py"])
def test_examples_stay_under_forty_lines(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


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
