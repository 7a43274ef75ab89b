"""The examples run as they are written, on a tiny backbone, and stay short."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


def test_quickstart(backbone_folder, picture, tmp_path):
    printed = run("quickstart.py", picture, backbone_folder, cwd=tmp_path)
    assert "FeatureMap((64, 64, 96)" in printed
    assert (tmp_path / "features.safetensors").stat().st_size > 64 * 64 * 96 * 4
    with Image.open(tmp_path / "features.png") as made:
        assert made.size == (90, 60)


def test_similarity_without_a_window(backbone_folder, picture, tmp_path):
    run("similarity.py", picture, 30, 40, backbone_folder, cwd=tmp_path)
    with Image.open(tmp_path / "heat.png") as made:
        assert made.size == (90, 60)


def test_without_a_folder_they_take_the_bundled_model(picture, tmp_path):
    assert "FeatureMap((192, 64, 96)" in run("quickstart.py", picture, cwd=tmp_path)
    run("similarity.py", picture, 30, 40, cwd=tmp_path)
    assert (tmp_path / "heat.png").exists()


def test_the_drawn_scene(tmp_path):
    run("draw_scene.py", "scene.jpg", cwd=tmp_path)
    with Image.open(tmp_path / "scene.jpg") as made:
        assert made.size == (960, 640)


@pytest.mark.parametrize("name", ["quickstart.py", "similarity.py"])
def test_examples_stay_under_forty_lines(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


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
