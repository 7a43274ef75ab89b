"""Rules of fields: what they allow and to what they convert it, and what their errors say."""

import dataclasses
import math
from pathlib import Path

import pytest

from brixel.errors import BrixelError
from brixel.utils.fields import (
    Rule,
    boolean,
    check_field,
    check_fields,
    check_names,
    number,
    one_of,
    optional,
    several,
    text,
    whole_number,
)

PAIR = several(whole_number(), "two whole numbers", count=2)
NAMES = several(text(), "one or more names", least=1)


@pytest.mark.parametrize(
    ("rule", "value", "stored"),
    [
        (whole_number(), 0, 0),
        (whole_number(1), 7, 7),
        (whole_number(2, 5), 4, 4),
        (number(), -3, -3.0),
        (number(), 2.5, 2.5),
        (number(0), 0, 0.0),
        (number(above=0), 1e-300, 1e-300),
        (number(0, 1), 0.999, 0.999),
        (number(0, most=1), 1, 1.0),
        (boolean(), True, True),
        (boolean(), False, False),
        (one_of("a", "b"), "b", "b"),
        (text(), "a", "a"),
        (text(), Path("a/b"), str(Path("a/b"))),
        (text(empty=True), "", ""),
        (optional(number()), None, None),
        (optional(number()), 1, 1.0),
        (PAIR, [1, 2], (1, 2)),
        (PAIR, (3, 4), (3, 4)),
        (NAMES, "a", ("a",)),
        (NAMES, Path("a"), ("a",)),
        (NAMES, ["a", "b"], ("a", "b")),
        (several(number(), "numbers"), [], ()),
    ],
)
def test_allowed_values_are_stored(rule: Rule, value: object, stored: object) -> None:
    found = check_field("field", value, rule)
    assert (found, type(found)) == (stored, type(stored))


@pytest.mark.parametrize(
    ("rule", "expected", "values"),
    [
        (whole_number(), "a whole number from 0 up", [-1, True, 1.0, "1", None]),
        (whole_number(2, 5), "a whole number from 2 to below 5", [1, 5, False]),
        (number(), "a finite number", [math.nan, math.inf, -math.inf, "1", True, None, [1]]),
        (number(0, 1), "a finite number from 0 up and below 1", [-1e-9, 1, 1.0]),
        (number(above=0), "a finite number above 0", [0, 0.0, -1]),
        (number(0, most=1), "a finite number from 0 up and at most 1", [-1e-9, 1.0001]),
        (boolean(), "True or False", [0, 1, "True", None]),
        (one_of("a", "b"), "one of 'a', 'b'", ["c", "", None, ["a"], {}]),
        (text(), "a text that is not empty", ["", 1, None, ["a"]]),
        (text(empty=True), "a text", [1, None]),
        (optional(whole_number()), "a whole number from 0 up, or None", [-1, "None"]),
        (PAIR, "two whole numbers", [[1], [1, 2, 3], 1, None, [1, -2], "12"]),
        (NAMES, "one or more names", [[], [""], "", [1], None]),
    ],
)
def test_other_values_are_refused(rule: Rule, expected: str, values: list[object]) -> None:
    assert rule.expected == expected
    for value in values:
        with pytest.raises(BrixelError) as raised:
            check_field("field", value, rule)
        assert str(raised.value) == f"field is {value!r}; expected {expected}"


def test_fields_of_a_frozen_dataclass_are_converted_in_place() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        rate: float
        size: tuple[int, ...]
        free: object = None

        def __post_init__(self) -> None:
            check_fields(self, {"rate": number(0), "size": PAIR}, prefix="settings.")

    settings = Settings(1, [2, 3])  # type: ignore[arg-type]
    assert (settings.rate, settings.size, settings.free) == (1.0, (2, 3), None)
    assert isinstance(settings.rate, float)
    with pytest.raises(BrixelError, match=r"^settings\.rate is -1; expected a finite number from 0 up$"):
        Settings(-1, (2, 3))


def test_the_first_unknown_name_is_named_with_the_nearest_known_one() -> None:
    check_names([], ["steps"], "unknown setting")
    check_names(["steps"], iter(["seed", "steps"]), "unknown setting")
    with pytest.raises(BrixelError, match=r"^unknown setting 'step'; did you mean 'steps'\?$"):
        check_names(["seed", "step", "sed"], ["seed", "steps"], "unknown setting")
    with pytest.raises(BrixelError, match=r"^unknown setting 'x'; known: seed, steps$"):
        check_names(["x"], ["steps", "seed"], "unknown setting")
