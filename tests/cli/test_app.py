"""The command line as a whole: its overview, errors, interruptions, exit status."""

import runpy
import sys

import pytest

import brixel
from brixel import __version__


def test_alone_it_prints_an_overview(run, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    for command in ("show", "extract", "info", "models", "plan", "convert", "train", "evaluate"):
        assert f"\n    {command} " in printed
    assert "example: brixel show photo.jpg" in printed


def test_unforeseen_errors_are_one_line_too(run, image_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(brixel.BrixelFeatures, "from_pretrained", fail)
    assert run("show", image_path, "--model", "x") == 2
    assert capsys.readouterr().err == "brixel: error: RuntimeError: CUDA out of memory. Tried to allocate\n"


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"brixel {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "IMAGE", "--architecture", "dinov2-vits14"), "--architecture goes with --backbone"),
        (("show", "IMAGE", "--model", "nowhere"), "no model at 'nowhere'"),
        (("show", "missing.png", "--model", "MODEL"), "error: missing.png: no such image, check the path"),
        (("show", "http://example.org/a.png", "--model", "MODEL"), "a URL must be downloaded first"),
        (("show", "IMAGE", "--model", "MODEL", "--device", "mps"), "mps"),
        (
            ("extract", "IMAGE", "--model", "MODEL", "-o", "MODEL/config.json"),
            "config.json is a file; expected a folder",
        ),
        (("evaluate", "cost", "-o", "no/such/report.md"), "no folder no/such"),
        (("evaluate", "memory", "--architectures", "dinov2-vits14"), "such as 252"),
        (("show", "IMAGE", "--model", "MODEL", "-o", "no/such/panel.png"), "no folder no/such"),
        (("show", "IMAGE", "--model", "MODEL", "-o", "panel.xyz"), "panel.xyz: expected a name that ends in .png"),
        (("show", "IMAGE", "--model", "MODEL", "--device", "abacus"), "unknown device 'abacus'"),
        (("show", "IMAGE", "--model", "MODEL", "--dtype", "fp8"), "unknown dtype 'fp8'"),
        (("show", "IMAGE", "--model", "MODEL", "--architecture", "dinov2-vits14"), "--architecture goes with"),
        (("show", "IMAGE", "--backbone", "BACKBONE", "--architecture", "dinov2-vits"), "mean 'dinov2-vits14'"),
        (("extract", "missing", "--model", "MODEL", "-o", "out"), "no image or folder at missing"),
        (("extract", "IMAGE", "--model", "MODEL", "-o", "IMAGE"), "waves.png"),
        (("convert", "missing.pth", "--backbone", "BACKBONE", "-o", "out"), "no adapter at 'missing.pth'"),
        (("convert", "IMAGE", "--backbone", "BACKBONE", "-o", "out"), "is a PNG image; expected weights"),
        (("convert", "IMAGE", "-o", "out"), "no backbone and no release: say which file this is, --release one of"),
        (("convert", "IMAGE", "--architecture", "dinov2-vits14", "-o", "out"), "--architecture goes with --backbone"),
        (("extract", "IMAGE", "--model", "MODEL", "-o", "out", "--verify"), "out holds no manifest"),
        (("info", "BACKBONE"), "for a backbone use `brixel show --backbone`"),
        (("info", "IMAGE"), "waves.png"),
        (("evaluate", "cost", "--architectures", "dinov3-vits"), "unknown backbone architecture 'dinov3-vits'"),
    ],
)
def test_errors_are_one_line(
    run, model_folder, backbone_folder, image_path, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    paths = {"IMAGE": image_path, "MODEL": model_folder, "BACKBONE": backbone_folder}
    for name, path in paths.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert run(*arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("brixel: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--short-side-px", "0"), ("--short-side-px", "big"), ("--batch-size", "-1")])
def test_wrong_options_are_refused_before_anything_is_loaded(run, wrong, monkeypatch, capsys):
    monkeypatch.setattr(brixel.BrixelFeatures, "from_pretrained", None)
    assert run("extract", "x.png", "-o", "out", *wrong) == 2
    assert wrong[0] in capsys.readouterr().err


def test_debug_shows_the_traceback(run, image_path):
    with pytest.raises(brixel.BrixelError, match="no model"):
        run("show", image_path, "--model", "nowhere", "--debug")


def test_interruption_is_quiet(run, image_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(brixel.BrixelFeatures, "from_pretrained", interrupt)
    assert run("show", image_path, "--model", "x") == 130
    assert "interrupted" in capsys.readouterr().err


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["brixel", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("brixel", run_name="__main__")
    printed = capsys.readouterr().out
    for command in ("show", "extract", "info", "convert", "evaluate"):
        assert command in printed
