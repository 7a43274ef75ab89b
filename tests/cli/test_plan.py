import dataclasses
import json

import pytest

from brixel import BrixelFeatures
from brixel.utils.memory import format_bytes


@pytest.fixture(scope="module")
def whole(saved):
    """A plan of Python's: an image of 112 x 112 pixels, computed whole."""
    return BrixelFeatures.from_pretrained(saved, device="cpu").plan(
        (112, 112), short_side_px="native", memory_limit="4GiB"
    )


def test_plan_prints_the_fields(run, saved, whole, monkeypatch, capsys):
    asked = []

    def plan(_, image_hw, **arguments):
        asked.append({"image_hw": image_hw, **arguments})
        return dataclasses.replace(whole, tiles=4, tile_px=(56, 70), overlap_px=14, limit_bytes=60 * 2**20)

    monkeypatch.setattr(BrixelFeatures, "plan", plan)
    flags = ("--memory-limit", "60MiB", "--tiles", "never", "--batch-size", 2, "--to-file")
    assert run("plan", "112x168", "--model", saved, *flags) == 0
    limits = {"memory_limit": 60 * 2**20, "tiles": "never", "batch": 2, "to_file": True, "short_side_px": None}
    limits["scale"] = None
    assert asked == [{"image_hw": (112, 168), **limits}]
    printed = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in printed.splitlines()[:-1])
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["tile"], rows["overlap"], rows["tiles"]) == ("56 x 70 px", "14 px", "4")
    assert (rows["padded"], rows["peak"], rows["limit"]) == ("112 x 112 px", format_bytes(whole.peak_bytes), "60 MiB")
    assert printed.endswith("an approximation: tiles do not attend to one another\n")


def test_plan_without_tiles_says_nothing_of_them(run, saved, capsys):
    assert run("plan", "112x112", "--model", saved, "--memory-limit", "4GiB", "--device", "cpu") == 0
    assert "tile" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_limit_that_nothing_fits(run, saved, capsys):
    assert run("plan", "112x112", "--model", saved, "--memory-limit", "1MiB", "--device", "cpu") == 2
    assert "the limit is 1 MiB" in capsys.readouterr().err


def test_a_size_is_required(run, capsys):
    assert run("plan") == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


def test_plan_as_json_is_that_of_python(run, saved, whole, capsys):
    arguments = ("--model", saved, "--device", "cpu", "--memory-limit", "4GiB", "--json")
    assert run("plan", "112x112", "--short-side-px", "native", *arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(dataclasses.asdict(whole)))
    assert captured.err == ""


@pytest.mark.slow
def test_plan_takes_the_short_side(run, saved, capsys):
    arguments = ("--model", saved, "--memory-limit", "4GiB", "--device", "cpu", "--json")
    assert run("plan", "3000x4000", "--short-side-px", 56, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["padded_hw"] == [56, 84]
    assert run("plan", "3000x4000", *arguments) == 0  # as `brixel extract` resizes it by default
    assert json.loads(capsys.readouterr().out)["padded_hw"] == [28, 42]
    assert run("plan", "60x90", "--short-side-px", "native", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["padded_hw"] == [70, 98]
