"""Damage to files of text that machines read: JSON by its structure, TOML by its tokens, headers of safetensors."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from fuzz.mutations import mutate

_TOWER = json.dumps("[" * 200)  # replaced by nested lists; dumps itself is recursive
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e-300, 1e308, -1e308, 2**31, 2**32, 2**62, 2**64, 10**9, 10**400),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "a" * 300, "1", "null", "../../x", "/etc/passwd", "a\0b"),
    *("\ud800", "C:\\x", ".", "..", "a/b", "\u202ex", [], {}, [[]], [None], {"a": 1}, [0] * 100, ["x"] * 5, {"": {}}),
    *([10**400] * 3, [1e308] * 3, [1, 2], [-1, 2, 3], [0, 1, 2, 3], "float16", "int8", "uint8", 14, 16, 64, 4),
    _TOWER,
)
_TOML_ODD = (
    *("0", "-1", "1", "3.5", "1e308", "inf", "-inf", "nan", "true", '""', '"x"', "[]", "{}", "[[]]", "[0]", '["x"]'),
    *("10" * 200, "9223372036854775808", '"' + "a" * 300 + '"', '"../../x"', '"a\\u0000b"', "1979-05-27", "07:32:00"),
    *("{a = 1}", "[1, 'x']", "'''\nx'''", "[" * 500, "{a = " * 500, "0x7fffffffffffffff", '"\\ud800"', "1_000"),
)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """One to three damages to the structure of a JSON text; of its bytes now and then."""
    try:
        value = json.loads(content)
    except ValueError:  # a text in metadata, or damaged already
        return mutate(rng, content)
    if rng.random() < 0.15:
        return mutate(rng, content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.05:  # a key that is there twice
        keys = re.findall(r'"\w+": ', text)
        text = text.replace(rng.choice(keys), rng.choice(keys), 1) if keys else text
    return text.replace(_TOWER, "[" * 200 + "]" * rng.choice((0, 200))).encode()


def _changed(rng: random.Random, value: Any) -> Any:
    """A value with one damage somewhere inside."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return _odd(rng, value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    value = value.copy()
    kind = rng.random()
    if kind < 0.08:
        del value[key]
    elif kind < 0.12 and isinstance(value, dict):
        value[rng.choice((*keys, "x", "", "a" * 300, "../x", "\ud800"))] = value.pop(key)
    elif kind < 0.16 and isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), rng.choice((value[key], rng.choice(_ODD))))
    elif kind < 0.2:
        value[key] = value[rng.choice(keys)]
    else:
        value[key] = _changed(rng, value[key])
    return value


def _odd(rng: random.Random, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64 and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value), [value]))
    if isinstance(value, str) and value and rng.random() < 0.3:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(("", "/", "\0", "\n", "é", "..", "\\")) + value[place + 1 :]
    return rng.choice(_ODD)


def mutate_toml(rng: random.Random, content: bytes) -> bytes:
    """One to three damages to the tokens of a TOML text; of its bytes now and then."""
    text = content.decode()
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        values = list(re.finditer(r"(?<== ).+$", text, re.MULTILINE))
        lines = text.splitlines(keepends=True)
        if kind < 0.2 or not values or not lines:
            return mutate(rng, text.encode())
        if kind < 0.7:
            found = rng.choice(values)
            text = text[: found.start()] + rng.choice((*_TOML_ODD, rng.choice(values)[0])) + text[found.end() :]
        elif kind < 0.8:
            del lines[rng.randrange(len(lines))]
            text = "".join(lines)
        elif kind < 0.9:
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "".join(lines)
        else:
            keys = list(re.finditer(r"^\s*[\w.\"-]+(?= = )|(?<=\[)[\w.\"-]+(?=\])", text, re.MULTILINE))
            if keys:
                found = rng.choice(keys)
                new = rng.choice(("x", '""', '"a/b"', "a.b", ".".join("a" * 100), found[0] * 2, '"\\u0000"', "é"))
                text = text[: found.start()] + new + text[found.end() :]
    return text.encode()


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """A file of JSON lines with damage to one line, to their order, or to its bytes."""
    lines = content.splitlines(keepends=True)
    kind, place = rng.random(), rng.randrange(len(lines))
    if kind < 0.1:
        return mutate(rng, content)
    if kind < 0.2:
        lines.insert(rng.randrange(len(lines)), lines[place])
    elif kind < 0.25:
        del lines[place]
    else:
        lines[place] = mutate_json(rng, lines[place]) + b"\n"
    return b"".join(lines)


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with damage to its header, of the right length now and then, or to its bytes."""
    if rng.random() < 0.3:
        return mutate(rng, content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__")
    if metadata and rng.random() < 0.4:
        key = rng.choice(list(metadata))
        metadata[key] = mutate_json(rng, metadata[key].encode()).decode("utf-8", "replace")
        text = json.dumps(header).encode("utf-8", "replace")
    else:
        text = mutate_json(rng, json.dumps(header).encode())
    if rng.random() < 0.5:
        text = text.replace(b'"F32"', rng.choice((b'"F16"', b'"I32"', b'"F64"', b'"BF16"', b'"F8_E4M3"', b'"BOOL"')), 1)
    size = len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) - 1, 2**32, 2**63))
    return size.to_bytes(8, "little") + text + content[8 + length :]


Mutator = Callable[[random.Random, bytes], bytes]
