"""JSON and TOML files: what is read, and that every fault is a DamagedFileError that names the file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brixel.errors import BrixelError, DamagedFileError, MissingFileError
from brixel.utils.structured_files import parse_json, read_json, read_json_lines, read_json_value, read_toml


def lines(path: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(path))


def toml(path: Path) -> dict[str, Any]:
    return read_toml(path, "settings")


def test_values_are_read(tmp_path: Path) -> None:
    content = {"a": [1, -2.5, 'ü " [[[{', None, True], "b": {"c": {}}}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # some editors write a mark of byte order
    assert read_json(path) == read_json_value(path) == parse_json(json.dumps(content), "text") == content
    path.write_text("[1, NaN, -Infinity]")
    assert str(read_json_value(path, finite=False)) == "[1, nan, -inf]"
    path.write_text('{"a": 1}\n{"b": 2}\n{"cut off')
    assert lines(path) == [{"a": 1}, {"b": 2}]
    assert read_json(tmp_path / "absent.json") == {}
    path.write_bytes(b"\xef\xbb\xbfsteps = 3\r\n[loss] # [[[\r\nl1 = 0.5\r\ntext = '''[[[\r\n'''\r\n")
    assert toml(path) == {"steps": 3, "loss": {"l1": 0.5, "text": "[[[\n"}}


DEEP = "[" * 100000
JSON = {
    "empty": "",
    "cut": '{"a": 1',
    "text": "depth: 3",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep lists": DEEP,
    "deep and whole": "[" * 1000 + "]" * 1000,
    "deep objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "deep behind a text": '{"a": "]]]]", "b": ' + DEEP,
    "deep behind an escaped quote": '{"a": "\\"", "b": ' + DEEP,
    "NaN": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "infinite in digits": '{"a": 1e999}',
    "whole number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
    "one key twice": '{"a": {"b": 1, "b": 2}}',
    "too many values": "[" + "1," * 2**22 + "1]",
}
TOML = {
    "cut": "steps = ",
    "not UTF-8": b"a = '\xff'",
    "JSON": '{"a": 1}',
    "deep lists": "a = " + DEEP,
    "deep and whole": "a = " + "[" * 3000 + "]" * 3000,
    "deep tables": "a = " + "{a = " * 3000 + "1" + "}" * 3000,
    "deep behind texts": "a = ']]]'\nb = \"\\\"]]\" # '\nc = '''\n]]'\n'''\nd = " + DEEP,
    "a long dotted key": ".".join("a" * 70000) + " = 1",
    "a long dotted table": "[" + " . ".join("a" * 30000) + "]\n" + "".join(f"k{n} = 1\n" for n in range(10000)),
    "quoted dotted keys": ".".join(['"a"'] * 3000) + " = 1",
    "one key twice": "a = 1\na = 2",
    "a number of 5000 digits": "a = " + "9" * 5000,
    "too large": "# " + "a" * 2**18,
}


@pytest.mark.parametrize(
    ("read", "content"),
    [
        *(pytest.param(read_json, content, id=f"JSON, {name}") for name, content in JSON.items()),
        *(pytest.param(toml, content, id=f"TOML, {name}") for name, content in TOML.items()),
        *(pytest.param(read_json, content, id=f"object, {content}") for content in ("[]", "1", "null", '"{}"')),
        pytest.param(lines, "{}\n[]\n", id="lines, a list"),
        pytest.param(lines, "{}\n{\n{}\n", id="lines, one cut off"),
        pytest.param(lines, "{}\n\n", id="lines, an empty one"),
        pytest.param(lines, DEEP + "\n", id="lines, deep"),
    ],
)
def test_damage_is_one_error_that_names_the_file(
    tmp_path: Path, read: Callable[[Path], object], content: str | bytes
) -> None:
    path = tmp_path / "of ours.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedFileError, match=r"of ours\.txt") as raised:
        read(path)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("read", [read_json, read_json_value, lines, toml])
def test_only_regular_files_are_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DamagedFileError, match="folder is a folder; expected a file"):
        read(tmp_path / "folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DamagedFileError, match="pipe is no regular file"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("read", [read_json_value, lines, toml])
def test_a_missing_file_is_an_error_of_both_kinds(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(MissingFileError, match=r"absent") as raised:
        read(tmp_path / "absent")
    assert isinstance(raised.value, BrixelError)
    assert isinstance(raised.value, FileNotFoundError)
    for name in ("a" * 300, "null\0byte"):
        with pytest.raises(BrixelError):
            read(tmp_path / name)


def test_memory_that_runs_out_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    path = tmp_path / "a"
    path.write_text("{}\n")
    monkeypatch.setattr("json.loads", fail)
    monkeypatch.setattr("tomllib.loads", fail)
    for read in (read_json, lines, toml):
        with pytest.raises(MemoryError):
            read(path)
