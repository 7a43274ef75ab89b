import shutil

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
