"""The command line as a user meets it: what is printed, what is written, the exit status."""

import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import brixel
from brixel import BrixelFeatures, FeatureMap, MapFolder, __version__
from brixel.cli.app import main


@pytest.fixture(scope="module")
def saved(backbone_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28).save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(saved, tmp_path):
    """A copy, as some tests change it."""
    return shutil.copytree(saved, tmp_path / "model")


def run(*arguments):
    return main([str(each) for each in arguments])


def test_show_with_a_model(model_folder, image_path, tmp_path, capsys):
    assert (
        run("show", image_path, image_path, "--model", model_folder, "--device", "cpu", "-o", tmp_path / "panel.png")
        == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.height > 2 * 384


def test_show_with_a_backbone_alone_says_that_the_adapter_is_fresh(backbone_folder, image_path, tmp_path, capsys):
    output = tmp_path / "panel.png"
    assert run("show", image_path, "--backbone", backbone_folder, "--short-side", 28, "-o", output) == 0
    assert "a fresh adapter" in capsys.readouterr().err
    assert output.exists()


def test_extract_reports_unreadable_files_and_exits_with_one(model_folder, image_path, tmp_path, capsys, caplog):
    (tmp_path / "in").mkdir()
    Image.open(image_path).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_text("no image")
    arguments = ("extract", tmp_path / "in", "--model", model_folder, "-o", tmp_path / "out")
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "1 written, 0 already there, 1 failed" in captured.out
    (skipped,) = [record.message for record in caplog.records if record.message.startswith("skipped: ")]
    assert "bad.png" in skipped
    assert FeatureMap.load(tmp_path / "out" / "good.png.safetensors").image_hw == (60, 90)
    (tmp_path / "in" / "bad.png").unlink()
    assert run(*arguments) == 0
    assert "0 written, 1 already there, 0 failed" in capsys.readouterr().out
    assert run(*arguments, "--overwrite") == 0
    assert "1 written" in capsys.readouterr().out


def test_extract_into_shards_goes_on_and_is_verified(model_folder, image_path, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(image_path).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    arguments = ("extract", tmp_path / "in", "--model", model_folder, "-o", out, "--shard-gib", "0.001")
    assert run(*arguments, "--save-dtype", "float16", "--batch-size", 2, "--workers", 0) == 0
    assert run(*arguments, "--save-dtype", "float16") == 0
    assert "0 written, 2 already there" in capsys.readouterr().out
    assert MapFolder(out)["b.png"].features.dtype == torch.float16
    assert run("extract", "--verify", "-o", out) == 0
    assert capsys.readouterr().out == "every file is what the manifest says\n"
    (shard,) = out.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("extract", "--verify", "-o", out) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("1 files are not what the manifest says: delete them")
    assert "maps-0-00000.safetensors: changed or damaged" in captured.err
    assert run("extract", "-o", out) == 2
    assert "no PATH: give images and folders of them" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--shard-gib", "0"), ("--shard-gib", "much"), ("--workers", "-1")])
def test_extract_refuses_numbers_that_are_none(image_path, tmp_path, option, value, capsys):
    with pytest.raises(SystemExit):
        run("extract", image_path, "-o", tmp_path, option, value)
    assert "expected" in capsys.readouterr().err


def test_extract_as_npy_in_another_dtype_and_size(model_folder, image_path, tmp_path):
    options = ("--format", "npy", "--dtype", "bfloat16", "--short-side", "native", "--batch-size", 2)
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "out", *options) == 0
    assert np.load(tmp_path / "out" / "waves.png.npy").shape == (64, 18, 26)


def test_info_tells_what_a_model_is_made_of(model_folder, capsys):
    assert run("info", model_folder) == 0
    told = capsys.readouterr().out
    for fact in ("ViT of width 64, depth 4, patch 14", "0, 1, 2, 3", "28 px", "3.5 px", "(0.485, 0.456, 0.406)"):
        assert fact in told


def test_info_needs_no_weights(model_folder, backbone_folder, tmp_path, capsys):
    content = json.loads((model_folder / "config.json").read_text())
    content["backbone"]["sources"] = ["/nowhere/backbone"]
    (model_folder / "config.json").write_text(json.dumps(content))
    (model_folder / "adapter.safetensors").unlink()
    assert run("info", model_folder) == 0
    told = capsys.readouterr().out
    assert "missing: they were at /nowhere/backbone" in told
    assert "adapter and head 0.3" in told


def test_show_never_writes_over_its_image(model_folder, image_path, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_bytes(image_path.read_bytes())
    assert run("show", mine, "--model", model_folder, "-o", tmp_path / "x" / ".." / "mine.png") == 2
    assert run("show", mine, "--model", model_folder, "-o", mine) == 2
    assert "is itself an image to be shown" in capsys.readouterr().err
    assert mine.read_bytes() == image_path.read_bytes()


@pytest.mark.slow
def test_a_reader_that_closes_early_is_no_error(model_folder):
    command = f"{sys.executable} -m brixel info {model_folder}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=120
    )
    assert done.returncode in (0, 141)
    assert done.stderr == b""


def test_unforeseen_errors_are_one_line_too(image_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(brixel.BrixelFeatures, "from_pretrained", fail)
    assert run("show", image_path, "--model", "x") == 2
    assert capsys.readouterr().err == "brixel: error: RuntimeError: CUDA out of memory. Tried to allocate\n"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out.strip() == f"brixel {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "PICTURE", "--architecture", "dinov2-vits14"), "--architecture goes with --backbone"),
        (("show", "PICTURE", "--model", "nowhere"), "no model at 'nowhere'"),
        (("show", "missing.png", "--model", "MODEL"), "missing.png"),
        (("show", "http://example.org/a.png", "--model", "MODEL"), "a URL must be downloaded first"),
        (("show", "PICTURE", "--model", "MODEL", "--device", "mps"), "mps"),
        (
            ("extract", "PICTURE", "--model", "MODEL", "-o", "MODEL/config.json"),
            "config.json is a file; expected a folder",
        ),
        (("evaluate", "cost", "-o", "no/such/report.md"), "no folder no/such"),
        (("evaluate", "memory", "--architectures", "dinov2-vits14"), "such as 252"),
        (("show", "PICTURE", "--model", "MODEL", "-o", "no/such/panel.png"), "no folder no/such"),
        (("show", "PICTURE", "--model", "MODEL", "-o", "panel.xyz"), "panel.xyz: expected a name that ends in .png"),
        (("show", "PICTURE", "--model", "MODEL", "--device", "abacus"), "unknown device 'abacus'"),
        (("show", "PICTURE", "--model", "MODEL", "--dtype", "fp8"), "unknown dtype 'fp8'"),
        (("show", "PICTURE", "--model", "MODEL", "--architecture", "dinov2-vits14"), "--architecture goes with"),
        (("show", "PICTURE", "--backbone", "BACKBONE", "--architecture", "dinov2-vits"), "mean 'dinov2-vits14'"),
        (("extract", "missing", "--model", "MODEL", "-o", "out"), "no image or folder at missing"),
        (("extract", "PICTURE", "--model", "MODEL", "-o", "PICTURE"), "waves.png"),
        (("convert", "missing.pth", "--backbone", "BACKBONE", "-o", "out"), "no adapter at 'missing.pth'"),
        (("convert", "PICTURE", "--backbone", "BACKBONE", "-o", "out"), "expected a weight file"),
        (("info", "BACKBONE"), "for a backbone use from_backbone"),
        (("evaluate", "cost", "--architectures", "dinov3-vits"), "unknown backbone architecture 'dinov3-vits'"),
    ],
)
def test_errors_are_one_line(
    model_folder, backbone_folder, image_path, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    places = {"PICTURE": image_path, "MODEL": model_folder, "BACKBONE": backbone_folder}
    for name, place in places.items():
        arguments = [each.replace(name, str(place)) for each in arguments]
    assert run(*arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("brixel: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--short-side", "0"), ("--short-side", "big"), ("--batch-size", "-1")])
def test_wrong_options_are_refused_before_anything_is_loaded(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("extract", "x.png", "-o", "out", *wrong)
    assert wrong[0] in capsys.readouterr().err


def test_debug_shows_the_traceback(image_path):
    with pytest.raises(brixel.BrixelError, match="no model"):
        run("show", image_path, "--model", "nowhere", "--debug")


def test_interruption_is_quiet(image_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(brixel.BrixelFeatures, "from_pretrained", interrupt)
    assert run("show", image_path, "--model", "x") == 130
    assert "interrupted" in capsys.readouterr().err


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["brixel", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("brixel", run_name="__main__")
    told = capsys.readouterr().out
    for command in ("show", "extract", "info", "convert", "evaluate"):
        assert command in told
