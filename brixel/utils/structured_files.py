"""Reading JSON and TOML. Size, nesting and number of values are bounded before anything is parsed.

Whatever is wrong with a file, the error is a DamagedFileError that names it.
"""

import itertools
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError, DamagedFileError, MissingFileError

_MAX_BYTES = 2**25  # of a JSON file; also of a line in a file of lines
_MAX_TOML_BYTES = 2**18  # files that people write
_BYTES_PER_VALUE = 8  # at least, on average: empty lists take thirty times their text
_MAX_DEPTH = 64

_JSON_STRING = re.compile(r'"(?:\\.|[^"\\])*(?:"|\Z)', re.DOTALL)
_TOML_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)'
    r"|'''.*?(?:'''|\Z)"
    r'|"(?:\\.|[^"\\\n])*(?:"|$)'
    r"|'[^'\n]*(?:'|$)"
    r"|#[^\n]*",
    re.DOTALL | re.MULTILINE,
)
_DEEP_KEY = re.compile(rf"(?:[\w-]+[ \t]*\.[ \t]*){{{_MAX_DEPTH}}}")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no such file."""
    if not os.path.lexists(path):
        return {}
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} holds {_kind(content)}; expected a JSON object")
    return content


def read_json_value(path: Path, *, finite: bool = True, most_bytes: int = _MAX_BYTES) -> Any:
    """Any JSON value from a file.

    Args:
        path: The file.
        finite: Whether all numbers must be finite; otherwise NaN and Infinity are read as well.
        most_bytes: How large the file may be.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is not JSON in UTF-8, or larger or deeper than any file of ours.
    """
    return parse_json(read_bounded(path, most_bytes), path, finite=finite, most_bytes=most_bytes)


def read_json_lines(path: Path, *, finite: bool = True) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one on each line; a last line without its newline was cut off, and is ignored.

    Raises as :func:`read_json_value`.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(_MAX_BYTES)
                if not line.endswith(b"\n"):
                    if len(line) == _MAX_BYTES:
                        raise DamagedFileError(f"line {number} of {path} has more than {_MAX_BYTES} bytes")
                    return
                record = parse_json(line, f"line {number} of {path}", finite=finite)
                if not isinstance(record, dict):
                    raise DamagedFileError(f"line {number} of {path} holds {_kind(record)}; expected a JSON object")
                yield record
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror or error})") from error


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file; ``what`` names its purpose in errors.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is not TOML in UTF-8, or larger or deeper than any file of ours.
    """
    try:
        text = read_bounded(path, _MAX_TOML_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
        code = _TOML_STRING.sub("s", text)
        if _depth(code) > _MAX_DEPTH or _DEEP_KEY.search(code):
            raise DamagedFileError(f"{path} is nested deeper than {_MAX_DEPTH} levels")
        return tomllib.loads(text)
    except MissingFileError as error:
        raise MissingFileError(f"no {what} at {path}: there is no such file") from error
    except ValueError as error:
        raise _in_context(error, f"{path} is no TOML in UTF-8") from error


def parse_json(content: str | bytes, name: object, *, finite: bool = True, most_bytes: int = _MAX_BYTES) -> Any:
    """The value of a JSON text from a file that errors call ``name``; see :func:`read_json_value`."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if len(text) > most_bytes:
            raise DamagedFileError(f"{name} has more than {most_bytes} bytes of JSON")
        opened = text.count("[") + text.count("{")
        if opened + text.count(",") > most_bytes // _BYTES_PER_VALUE:
            raise DamagedFileError(f"{name} holds more than {most_bytes // _BYTES_PER_VALUE} values")
        if opened > _MAX_DEPTH and _depth(_JSON_STRING.sub("", text)) > _MAX_DEPTH:
            raise DamagedFileError(f"{name} is nested deeper than {_MAX_DEPTH} levels")
        if not finite:
            return json.loads(text, object_pairs_hook=_object)
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise _in_context(error, f"{name} is not JSON") from error


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file of at most so many.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is larger, no regular file, or cannot be read.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(content) > most_bytes:
        raise DamagedFileError(f"{path} has more than {most_bytes} bytes; expected a smaller file")
    return content


def check_regular(path: Path) -> None:
    """Raise MissingFileError where there is no file, DamagedFileError where it is a folder, a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{str(path)[:200]!r} cannot be read ({error})") from error
    if not stat.S_ISREG(mode):
        raise DamagedFileError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected a file")


@contextmanager
def checking_content(path: Path, kind: str, advice: str) -> Iterator[None]:
    """A context for reading a file of ours: errors about its content become one that names the file and what to do.

    Args:
        path: The file.
        kind: What it should be, such as "a manifest of brixel".
        advice: What to do.

    Raises:
        DamagedFileError: In place of any BrixelError but those for what is missing, and for memory that runs out.
    """
    try:
        yield
    except (MissingFileError, MemoryError):
        raise
    except BrixelError as error:
        raise DamagedFileError(f"{path} is damaged or not {kind} ({error}); {advice}") from error


def _depth(code: str) -> int:
    """How deep brackets are nested in a text without strings."""
    return max(itertools.accumulate(_STEPS[mark] for mark in re.findall(r"[\[\]{}]", code)), default=0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} is there twice")
        found[name] = value
    return found


def _finite(literal: str) -> float:
    number = float(literal)
    if number - number != 0:  # NaN or infinite
        raise ValueError(f"the number {literal[:40]} is not finite")
    return number


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{str(value)[:40]}")


def _in_context(error: ValueError, what: str) -> DamagedFileError:
    """An error of a parser as ours, which names the file; one of ours stays as it is."""
    return error if isinstance(error, DamagedFileError) else DamagedFileError(f"{what} ({error})")
