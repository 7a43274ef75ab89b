"""What comes from outside is printed on one line, and cannot steer a terminal, wherever it is printed."""

import json
import logging
import os
import traceback

import pytest
from PIL import Image

import brixel
from brixel import BrixelError, ImageError, MemoryLimitError
from brixel.checkpoints.model_card import model_card
from brixel.cli.options import print_json, print_table
from brixel.errors import one_line, printable
from brixel.images.load import load_image
from brixel.utils.markdown import markdown_table

ODD = "a\nbrixel: all is well\x1b[2J\x9b2J\r\x07\u202e\u2028\u2066\ud800\U000e0041.png"
STEERING = {"\x1b", "\x9b", "\r", "\x07", "\u202e", "\u2028", "\u2066", "\ud800", "\U000e0041"}


def assert_harmless(text: str) -> None:
    assert not STEERING & set(text), ascii(text)
    assert not any(line.startswith("brixel: all is well") for line in text.splitlines()), ascii(text)
    assert "all is well" in text


def test_printable_escapes_and_leaves_writing_alone():
    assert printable("a\tb\x1b\x9b\u202e\udcff") == r"a\tb\x1b\x9b\u202e\udcff"
    for text in ("déjà vu, 写真 (1).png", "👩\u200d🔬.jpg", "می\u200cخواهم", "a\xa0b", r"C:\new\table"):
        assert printable(text) == text
    assert one_line("two lines,\n  one message \r\n end") == "two lines, one message end"


@pytest.mark.parametrize("kind", [BrixelError, ImageError, MemoryLimitError])
def test_errors(kind):
    error = kind(f"{ODD}: is missing")
    assert_harmless(str(error))
    assert_harmless("".join(traceback.format_exception(error)))
    assert error.args == (f"{ODD}: is missing",)


def test_log_lines(caplog):
    logging.getLogger("brixel").warning("skipped: %s (%d)", ODD, 3)
    assert_harmless(caplog.text)
    assert "(3)" in caplog.text


@pytest.mark.parametrize("missing", [True, False])
def test_images(tmp_path, missing):
    name = ODD.replace("\ud800", os.fsdecode(b"\xff"))
    if not missing:
        (tmp_path / name).write_text("no image")
    with pytest.raises((BrixelError, FileNotFoundError)) as raised:
        load_image(tmp_path / name)
    assert_harmless(str(raised.value))
    assert r"a\nbrixel" in str(raised.value)


def test_cards_and_tables(capsys):
    config = brixel.BrixelFeatures.from_pretrained("brixel-tiny", device="cpu").config
    object.__setattr__(config, "training", {ODD: ODD})
    assert_harmless(model_card(config, ODD, whole=True))
    assert_harmless("\n".join(markdown_table([ODD, ""], [[ODD, "1"]])))
    print_table({ODD: ODD, "more": [ODD]})
    assert_harmless(capsys.readouterr().out)
    print_json({ODD: [ODD], "é": "é"})
    printed = capsys.readouterr().out
    assert_harmless(printed)
    assert json.loads(printed) == {ODD: [ODD], "é": "é"}
    print_json({"é": "é"})
    assert '"é": "é"' in capsys.readouterr().out


@pytest.mark.slow
def test_commands(tmp_path, capfd, caplog):
    from brixel.cli.app import main

    folder = tmp_path / "in"
    folder.mkdir()
    name = ODD.replace("\ud800", os.fsdecode(b"\xff"))
    (folder / name).write_text("no image")
    (folder / f"x.{name[2:-4]}").touch()
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    for arguments in (
        ("extract", folder, "--model", "brixel-tiny", "--short-side-px", 28, "-o", tmp_path / "out"),
        ("extract", folder, "--model", "brixel-tiny", "--short-side-px", 28, "-o", tmp_path / "out", "--json"),
        ("extract", folder, "--verify", "-o", tmp_path / "out"),
        ("show", folder / name, "-o", tmp_path / "panel.png"),
        ("show", tmp_path / name),
        ("info", name),
        ("extract", "--verify", "-o", tmp_path / name),
        ("plan", "32x32", "--model", name),
    ):
        assert main([str(argument) for argument in arguments]) in (1, 2), arguments
        printed = capfd.readouterr()
        assert_harmless(printed.out + printed.err + caplog.text)
        caplog.clear()
    with pytest.raises(SystemExit):
        main(["show", name, f"--{name}"])
    assert_harmless(capfd.readouterr().err)
