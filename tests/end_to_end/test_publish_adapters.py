"""examples/publish_adapters.py: trains, evaluates and pushes, goes on after a failure, and repeats nothing."""

import runpy
import sys

import numpy as np
import pytest
from helpers import ROOT, files_of
from PIL import Image

from brixel import list_models

SCRIPT = ROOT / "examples" / "publish_adapters.py"


@pytest.fixture
def script(hub, backbone_folder, tmp_path, monkeypatch):
    """Run the script in ``tmp_path`` with photographs, and a Hub with one backbone on which "us" may write."""
    numbers = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(2):
        colours = numbers.integers(0, 256, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / "photos" / f"{index}.png")
    hub.add("facebook/tiny", files_of(backbone_folder))
    hub.writers["us"] = ("may-write",)
    monkeypatch.setenv("HF_TOKEN", "may-write")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own upload
def test_adapters_are_trained_evaluated_and_pushed_once(script, hub, capsys, tmp_path):
    words = ["--images", "photos", "--val", "photos", "--steps", "2", "--push", "us"]
    with pytest.raises(SystemExit, match="1 of 2 failed: us/nothing"):
        script("us/nothing", "facebook/tiny", *words)
    assert {"config.json", "adapter.safetensors", "README.md"} <= set(hub.repos["us/brixel-tiny"].files)
    assert "universal" in (tmp_path / "adapters" / "tiny" / "fidelity.md").read_text()
    commits = list(hub.commits)
    capsys.readouterr()
    script("facebook/tiny", *words)
    assert hub.commits == commits
    assert capsys.readouterr().out.splitlines()[-1].startswith("facebook/tiny: us/brixel-tiny@")


@pytest.mark.slow
def test_the_table_has_every_backbone_once(script, monkeypatch, capsys):
    names = ("dinov3-vits16", "dinov3-vitb16")
    known = [backbone for backbone in list_models() if backbone.name in names]
    monkeypatch.setattr("brixel.list_models", lambda: known)
    script("--table")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(names)
    assert [row in (ROOT / "docs" / "model-zoo.md").read_text("utf-8").splitlines() for row in rows] == [True, True]


def test_what_is_missing_is_said(script, capsys):
    for words in ([], ["facebook/tiny"], ["facebook/tiny", "--val", "photos"]):
        with pytest.raises(SystemExit):
            script(*words)
        assert "give at least one NAME, --val FOLDER" in capsys.readouterr().err
