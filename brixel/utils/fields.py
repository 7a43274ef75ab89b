"""Validation of the fields of configurations: of dataclasses, and of tables read from JSON and TOML."""

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any

from brixel.errors import BrixelError, did_you_mean

_MOST_SHOWN = 200  # characters of a value in an error
_SHORT = reprlib.Repr()  # containers from files may contain each other many times over
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, _MOST_SHOWN, _MOST_SHOWN, _MOST_SHOWN
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


@dataclass(frozen=True)
class Rule:
    """What values a field may have.

    Args:
        expected: The allowed values in words, such as "a whole number from 1 up".
        convert: Converts a value to the one to store; raises TypeError or ValueError if it is not allowed.
    """

    expected: str
    convert: Callable[[Any], Any]


def check_field(name: str, value: object, rule: Rule) -> Any:
    """Convert a value by its rule. Raises BrixelError, which names the field, if it is not allowed."""
    try:
        return rule.convert(value)
    except (TypeError, ValueError, OverflowError):
        raise BrixelError(f"{name} is {short_repr(value)}; expected {rule.expected}") from None


def check_fields(instance: object, rules: Mapping[str, Rule], *, prefix: str = "") -> None:
    """Check and convert fields of a dataclass, even a frozen one, in place; ``prefix`` precedes names in errors."""
    for name, rule in rules.items():
        object.__setattr__(instance, name, check_field(f"{prefix}{name}", getattr(instance, name), rule))


def check_table(
    name: str, content: object, rules: Mapping[str, Rule], defaults: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """A table that was read from a file, its fields converted by their rules.

    Args:
        name: Of the table, for errors.
        content: What was read; a table with these fields, no others.
        rules: By field.
        defaults: Of fields that may be missing.

    Raises:
        BrixelError: It is no table, a field is missing or unknown, or has a value that is not allowed.
    """
    if not isinstance(content, Mapping):
        raise BrixelError(f"{name} is {short_repr(content)}; expected a table of {', '.join(rules)}")
    if not content.keys() <= rules.keys():
        check_names(content, rules, f"{name} has the unknown field")
    given = {**defaults, **content}
    if missing := [field for field in rules if field not in given]:
        raise BrixelError(f"{name} lacks {', '.join(missing)}")
    return {field: check_field(f"{field} in {name}", given[field], rule) for field, rule in rules.items()}


def short_repr(value: object) -> str:
    """A value in an error, cut where it is long."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise BrixelError for the first unknown name; ``what`` starts the message, such as "unknown setting"."""
    known = list(known)
    for name in given:
        if name not in known:
            raise BrixelError(f"{what} {short_repr(name)}; {did_you_mean(str(name)[:_MOST_SHOWN], known)}")


def whole_number(least: int = 0, below: int | None = None) -> Rule:
    """An integer, also NumPy's, from ``least`` up, and below a bound where one is given; a boolean is no integer."""

    def convert(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
        if found < least or (below is not None and found >= below):
            raise ValueError
        return found

    return Rule(f"a whole number from {least} {'up' if below is None else f'to below {below}'}", convert)


def number(
    least: float = -math.inf,
    below: float = math.inf,
    *,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> Rule:
    """A finite number, which becomes a float: from ``least`` to ``most``, above ``above``, below ``below``.

    With ``finite`` False, where a file may record that a run went wrong, NaN and infinities are numbers as well.
    Scalars of NumPy and PyTorch are numbers; booleans and texts are not.
    """

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError
        found = float(value)
        if not finite:
            return found
        if not (math.isfinite(found) and least <= found <= most and above < found < below):
            raise ValueError
        return found

    bounds = [f"from {least:g} up"] if math.isfinite(least) else []
    bounds += [f"above {above:g}"] if math.isfinite(above) else []
    bounds += [f"below {below:g}"] if math.isfinite(below) else []
    bounds += [f"at most {most:g}"] if math.isfinite(most) else []
    return Rule(" ".join(["a finite number", " and ".join(bounds)]).strip(), convert)


def boolean() -> Rule:
    """True or False."""
    return Rule("True or False", _boolean)


def one_of(*choices: str) -> Rule:
    """One of several strings."""

    def convert(value: Any) -> str:
        if value not in choices or not isinstance(value, str):
            raise ValueError
        return value

    return Rule(f"one of {', '.join(map(repr, choices))}", convert)


def text(*, empty: bool = False) -> Rule:
    """A string or a path, stored as string; without ``empty`` neither empty nor with NUL, which no file name has."""

    def convert(value: Any) -> str:
        string = fspath(value) if isinstance(value, PathLike) else value
        if not isinstance(string, str) or (not empty and (not string or "\0" in string)):
            raise ValueError
        return string

    return Rule("a text" if empty else "a text that is not empty", convert)


def path_like() -> Rule:
    """A path, as text that is not empty or as an object that stands for one; it becomes a ``pathlib.Path``."""

    def convert(value: Any) -> Path:
        string = fspath(value)
        if not isinstance(string, str) or not string or "\0" in string:
            raise ValueError
        return Path(string)

    return Rule("a path, as text or pathlib.Path, not empty", convert)


def optional(rule: Rule) -> Rule:
    """None, or what ``rule`` allows."""
    return Rule(f"{rule.expected}, or None", lambda value: None if value is None else rule.convert(value))


def several(
    rule: Rule,
    expected: str,
    *,
    count: int | None = None,
    least: int = 0,
    most: int | None = None,
    single: bool = True,
) -> Rule:
    """A list or tuple of values that ``rule`` allows, which becomes a tuple.

    Args:
        rule: The rule for its values.
        expected: The allowed values in words.
        count: How many there must be.
        least: How many there must be at least.
        most: How many there may be.
        single: Without ``count``, a value that is no list or tuple stands for a list of one.
    """

    def convert(value: Any) -> tuple[Any, ...]:
        if isinstance(value, Mapping | bytes) or (isinstance(value, str) and not (single and count is None)):
            raise TypeError
        alone = single and count is None and not isinstance(value, list | tuple)
        kept = tuple(rule.convert(item) for item in ([value] if alone else value))
        low, high = (least, math.inf if most is None else most) if count is None else (count, count)
        if not low <= len(kept) <= high:
            raise ValueError
        return kept

    return Rule(expected, convert)


def json_table() -> Rule:
    """A mapping, of whatever JSON holds, which becomes a dict."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)

    return Rule("a table", convert)


def table_of(rule: Rule, expected: str) -> Rule:
    """A mapping from texts to values that ``rule`` allows, which becomes a dict; ``expected`` says so in words."""
    name_rule = text(empty=True)

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise TypeError
        return {name_rule.convert(name): rule.convert(content) for name, content in value.items()}

    return Rule(expected, convert)


def text_table(expected: str) -> Rule:
    """A mapping from texts to texts, which becomes a dict."""
    return table_of(text(empty=True), expected)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value
