import shutil

import pytest
from helpers import ROOT
from PIL import Image


def test_show_with_a_model(run, model_folder, image_path, tmp_path, capsys):
    output = tmp_path / "panel.png"
    assert run("show", image_path, image_path, "--model", model_folder, "--device", "cpu", "-o", output) == 0
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as panel:
        assert panel.height > 2 * 384


def test_show_with_a_backbone_alone_takes_the_universal_upsampler(run, backbone_folder, image_path, tmp_path, capsys):
    output = tmp_path / "panel.png"
    flags = ("--backbone", backbone_folder, "--short-side-px", 28)
    assert run("show", image_path, *flags, "-o", output) == 0
    assert run("show", image_path, *flags, "--scale", 8, "--teacher", "-o", tmp_path / "eight.png") == 0
    assert output.read_bytes() != (tmp_path / "eight.png").read_bytes()


def test_show_says_that_a_trained_adapter_of_the_first_generation_has_one_scale(run, image_path, tmp_path, capsys):
    model = shutil.copytree(ROOT / "tests" / "samples" / "v0_1" / "model", tmp_path / "model")
    backbone = ROOT / "tests" / "samples" / "v0_1" / "backbone"
    flags = ("--model", model, "--backbone", backbone, "--scale", 8)
    assert run("show", image_path, *flags, "-o", tmp_path / "panel.png") == 2
    assert "scale is 8; this model's adapter was trained for 4 cells per patch alone" in capsys.readouterr().err


def test_show_never_writes_over_its_image(run, model_folder, image_path, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_bytes(image_path.read_bytes())
    assert run("show", mine, "--model", model_folder, "-o", tmp_path / "x" / ".." / "mine.png") == 2
    assert run("show", mine, "--model", model_folder, "-o", mine) == 2
    assert "is itself an image to be shown" in capsys.readouterr().err
    assert mine.read_bytes() == image_path.read_bytes()


def test_show_takes_folders(run, model_folder, image_path, tmp_path, caplog):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(10):
        shutil.copy(image_path, folder / "sub" / f"{number}.png")
    (folder / "notes.txt").touch()
    output = tmp_path / "panel.png"
    assert run("show", folder, "--model", model_folder, "-o", output) == 0
    with Image.open(output) as panel:
        assert 8 * 384 < panel.height < 9 * 450
    assert f"{folder}: the first 8 of 10 images are shown" in caplog.messages
    assert run("show", tmp_path, "--model", model_folder, "-o", output) == 2  # it would be one of its images


@pytest.mark.slow
def test_panels_replace_panels_alone(run, model_folder, image_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (("show", image_path), ("evaluate", "panel", image_path, "--teacher-px", 224)):
        arguments = (*command, "--model", model_folder)
        for name in ("panel.png", "panel.jpg", "panel.webp"):
            shutil.copy(image_path, name)
            assert run(*arguments, "-o", name) == 2
            assert f"{name} exists, and brixel has not drawn it" in capsys.readouterr().err
            assert (tmp_path / name).read_bytes() == image_path.read_bytes()
        assert run(*arguments, "--overwrite") == 0
        assert run(*arguments) == 0  # over its own
        (tmp_path / "panel.png").unlink()
        (tmp_path / "panel.png").mkdir()
        assert run(*arguments) == 2
        assert "panel.png is a folder" in capsys.readouterr().err
        (tmp_path / "panel.png").rmdir()
