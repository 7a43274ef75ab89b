"""The command line as a whole: its overview, errors, interruptions, exit status."""

import runpy
import shlex
import subprocess
import sys

import pytest

import brixel
from brixel import FeatureMap, __version__
from brixel.extraction.map_folder import verify
from brixel.utils.progress import progress_bar


def test_alone_it_prints_an_overview(run, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    for command in ("show", "view", "extract", "info", "models", "plan", "convert", "train", "evaluate"):
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
        (("show", "missing.png", "--model", "MODEL"), "error: missing.png: no such file, check the path"),
        (("show", "http://example.org/a.png", "--model", "MODEL"), "a URL must be downloaded first"),
        (("show", "IMAGE", "--model", "MODEL", "--device", "mps"), "mps"),
        (
            ("extract", "IMAGE", "--model", "MODEL", "-o", "MODEL/config.json"),
            "config.json is a file; expected a folder",
        ),
        (("evaluate", "cost", "-o", "no/such/report.md"), "no folder no/such"),
        (("evaluate", "cost", "-o", "folder.md"), "folder.md is a folder; expected the name of a file"),
        (
            ("train", "--backbone", "BACKBONE", "--images", "MODEL", "-o", "IMAGE"),
            "waves.png is a file; expected a folder",
        ),
        (("train", "--backbone", "BACKBONE", "--images", "MODEL", "-o", "IMAGE/run"), "waves.png is a file; expected"),
        (("convert", "IMAGE", "--backbone", "BACKBONE", "-o", "IMAGE"), "waves.png is a file; expected a folder"),
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
    (tmp_path / "folder.md").mkdir()
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


def shell(line: str, *arguments) -> "subprocess.CompletedProcess[str]":
    """A line of the shell, in which `brixel` runs the command line of this checkout."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; from brixel.cli.app import main; sys.exit(main())"
    line = line.replace("brixel ", f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} ", 1)
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_commands_work_without_streams(run, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run("models") == 0
    assert run("show", "missing.png") == 2
    assert run("extract") == 2
    for stream in (sys.stdout, sys.stderr):  # what took their place
        stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["0<&- >&- 2>&-", "0<&-", ">&-", "2>&-", "2>&- | head -0"])
def test_commands_work_where_streams_are_closed(image_path, tmp_path, streams):
    command = "brixel extract $1 --model brixel-tiny --device cpu --short-side-px 28 -o $2"
    ended = shell(f"{command} {streams}; exit ${{PIPESTATUS[0]}}", image_path, tmp_path / "out")
    assert "Error" not in ended.stderr
    assert ended.returncode in ((0, 141) if "head" in streams else (0,)), ended.stderr
    assert FeatureMap.load(tmp_path / "out" / "waves.png.safetensors").image_hw == (60, 90)
    assert verify(tmp_path / "out") == []  # nothing was printed into a file that got the number of a closed stream


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "statuses"), [("brixel show missing.png 2>&-", (2,)), ("brixel models 2>&1 | head -1", (0, 141))]
)
def test_the_status_says_what_closed_streams_cannot(line, statuses):
    ended = shell(f"{line}; exit ${{PIPESTATUS[0]}}")
    assert ended.returncode in statuses
    assert "Traceback" not in ended.stderr


def test_progress_is_silent_without_a_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(range(3), "images") as bar:
        assert list(bar) == [0, 1, 2]
