import shutil

import pytest
from helpers import ROOT
from PIL import Image
from videos import grey_levels, write

from brixel.video import frames


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_show_draws_a_video_in_the_colours_of_one_basis(run, model_folder, tmp_path, capsys):
    clip = write(tmp_path / "clip.mp4", [*grey_levels(2), *grey_levels(2)], times=[0, 40, 500, 1000])
    output = tmp_path / "out.mp4"
    assert run("show", clip, "--model", model_folder, "--teacher", "-o", output) == 0
    assert capsys.readouterr().out.strip() == str(output)
    drawn = list(frames(output))
    assert [frame.time_s for frame in drawn] == [0, 0.04, 0.5, 1.0]
    assert drawn[0].image_hw[1] > 3 * drawn[0].image_hw[0]  # four tiles
    maps = [frame.rgb[30:-20, 600:1500].astype(int) for frame in drawn]  # without the image and its time
    assert abs(maps[0] - maps[2]).mean() < 1  # the same frame has the same colours
    assert abs(maps[1] - maps[3]).mean() < 1
    assert run("show", clip, "--model", model_folder, "--fps", 1, "-o", output) == 0  # over its own
    assert [frame.time_s for frame in frames(output)] == [0, 1.0]


@pytest.mark.slow
def test_show_draws_some_frames_of_a_video_as_a_panel(run, model_folder, image_path, tmp_path):
    clip = write(tmp_path / "clip.mp4", grey_levels(9))
    assert run("show", clip, image_path, "--model", model_folder, "-o", tmp_path / "panel.png") == 0
    with Image.open(tmp_path / "panel.png") as panel:
        assert 5 * 384 < panel.height < 5 * 460


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("IMAGE", "-o", "a.mp4"), "a.mp4 is the name of a video, which shows one video, and there are 1 images and 0"),
        (("CLIP", "CLIP", "-o", "a.mp4"), "there are 0 images and 2 videos; give one video"),
        (("CLIP", "-o", "CLIP"), "is itself the video to be shown"),
        (("CLIP", "-o", "a.avi"), "expected a name that ends in .png"),
        (("IMAGE", "--fps", "2"), "--fps and --every choose frames of a video, and none is among the paths"),
        (("CLIP", "--fps", "2", "--every", "2"), "fps is 2 and every is 2; give one of them"),
        (("TEXT", "-o", "a.mp4"), "is not a video that is read"),
        (("CUT", "-o", "a.mp4"), "is damaged or cut off at frame"),
    ],
)
def test_show_says_what_is_wrong_with_a_video(
    run, model_folder, image_path, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write("clip.mp4", grey_levels(3))
    write("cut.mp4", grey_levels(9), movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:-200])
    (tmp_path / "text.mp4").write_text("some text " * 99)
    names = {"IMAGE": str(image_path), "CLIP": "clip.mp4", "TEXT": "text.mp4", "CUT": "cut.mp4"}
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run("show", *(names.get(each, each) for each in arguments), "--model", model_folder) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
