"""Every flag of every command: described, with one meaning; usage errors; old names of flags."""

import argparse
import subprocess
import sys

import pytest

from brixel.cli.app import build_parser
from brixel.cli.options import SHARED, Parser, in_flags


def commands(parser=None):
    """The parsers of all commands by name, those with commands of their own included."""
    parser = parser or build_parser()
    found = {parser.prog: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= commands(child)
    return found


COMMANDS = commands()
# flags of `train` whose name has another meaning in `evaluate`, and the one folder of `throughput`
OTHER_MEANING = {("brixel train", flag) for flag in ("--images", "--val", "--steps", "--cache")}
OTHER_MEANING |= {("brixel evaluate throughput", "--images")}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_flag_has_a_description(name):
    for action in COMMANDS[name]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert len(action.help or "") >= 10, (name, action.option_strings or action.dest)


def descriptions(flag):
    """By command, the description of a flag without notes and default."""
    found = [(name, parser._option_string_actions.get(flag)) for name, parser in COMMANDS.items()]
    return {name: action.help.split("; ")[0] for name, action in found if action is not None}


@pytest.mark.parametrize("flag", sorted(SHARED))
def test_a_shared_flag_has_one_meaning(flag):
    assert set(descriptions(flag).values()) == {SHARED[flag]["help"].split("; ")[0]}


def test_a_flag_of_two_commands_has_one_meaning():
    for flag in {flag for parser in COMMANDS.values() for flag in parser._option_string_actions}:
        found = {name: text for name, text in descriptions(flag).items() if (name, flag) not in OTHER_MEANING}
        assert len(set(found.values())) == 1 or not found, (flag, found)


def test_other_meanings_differ():
    for name, flag in OTHER_MEANING:
        assert list(descriptions(flag).values()).count(descriptions(flag)[name]) == 1


def test_help_has_an_example():
    for name in ("show", "view", "extract", "info", "models", "plan", "convert", "export", "train"):
        assert f"example: brixel {name} " in COMMANDS[f"brixel {name}"].format_help()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shwo", "unknown command 'shwo'; did you mean 'show'?"),
        ("benchmark", "unknown command 'benchmark'; it is 'brixel evaluate cost' now"),
        ("throughput --rounds 2", "unknown command 'throughput'; it is 'brixel evaluate throughput' now"),
        ("plan --table", "unknown option '--table'; it is 'brixel evaluate memory' now"),
        ("evaluate fidelty", "unknown command 'fidelty'; did you mean 'fidelity'?"),
        ("--verison", "unknown option '--verison'; did you mean '--version'?"),
        ("show --shrot-side 5", "unknown option '--shrot-side'; did you mean '--short-side-px'?"),
        ("show --shrot-side=5", "unknown option '--shrot-side'; did you mean '--short-side-px'?"),
        ("show --memory 4GiB", "unknown option '--memory'; did you mean '--memory-limit'?"),  # no abbreviations
        (
            "extract photos --ouptut maps",
            "unknown option '--ouptut'; did you mean '--output'?",
        ),  # before what is missing
        ("show --colour", "unknown option '--colour'; see 'brixel show --help'"),
        ("show --tiles alway", "--tiles: unknown value 'alway'; did you mean 'always'?"),
        ("extract photos", "missing -o/--output; example: brixel extract photos -o maps"),
        ("info", "missing MODEL; example: brixel info brixel-small"),
        ("info a b", "unexpected argument 'b'; example: brixel info brixel-small"),
        ("show a -o x.png b", "unexpected argument 'b': give every PATH in one place; example: brixel show "),
        ("show --short-side-px", "--short-side-px: expected one argument; example: brixel show "),
        ("show --short-side-px 0", "--short-side-px: '0'; expected a positive number of pixels, or 'native'"),
        ("show --memory-limit much", "--memory-limit: 'much'; expected a size such as 4GiB or 500MiB"),
        ("plan big", "HEIGHTxWIDTH: 'big'; expected height x width in pixels, such as 4096x4096"),
        ("convert a.pth --blocks x -o m", "--blocks: 'x'; expected four numbers as 3,6,9,11"),
    ],
)
def test_a_usage_error_is_one_line(line, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(line.split())
    error = capsys.readouterr().err
    assert error.startswith(f"brixel: error: {message}")
    assert error.count("\n") == 1


def test_what_follows_two_dashes_is_no_option():
    assert build_parser().parse_args(["show", "--", "--odd.png"]).images == ["--odd.png"]


def test_sizes_are_bytes():
    options = build_parser().parse_args(["show", "--memory-limit", "1.5 GiB"])
    assert options.memory_limit == 3 * 2**29
    assert build_parser().parse_args(["extract", "-o", "x", "--shard-size", "5000"]).shard_size == 5000


@pytest.mark.parametrize(
    ("line", "new", "name", "value"),
    [
        ("show --short-side native", "--short-side-px", "short_side_px", "native"),
        ("extract a -o b --short-side 64", "--short-side-px", "short_side_px", 64),
        ("convert a -o b --short-side 64", "--short-side-px", "short_side_px", 64),
        ("extract a -o b --shard-gib 0.5", "--shard-size", "shard_size", 2**29),
    ],
)
def test_old_flags_work_with_a_warning(line, new, name, value):
    with pytest.warns(DeprecationWarning, match=f"is deprecated; use {new}"):
        options = build_parser().parse_args(line.split())
    assert getattr(options, name) == value
    assert "--short-side " not in build_parser().format_help()


@pytest.mark.slow
def test_the_warning_is_one_line_on_standard_error():
    command = [sys.executable, "-m", "brixel", "plan", "64x64", "--short-side", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "brixel:0: DeprecationWarning: --short-side is deprecated; use --short-side-px\n"
    assert done.stdout.startswith("{")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give it as backbone=", "give it as --backbone"),
        ("load it with backbone='ORG/NAME' first", "load it with --backbone 'ORG/NAME' first"),
        ("from_pretrained(..., backbone=module)", "from_pretrained(..., backbone=module)"),
        ("ask for a short_side_px of 5", "ask for a --short-side-px of 5"),
        ("no folder /data/short_side_px", "no folder /data/short_side_px"),
        ("push with include_backbone=True if", "push with --include-backbone if"),
        ("the backbone is 5 wide", "the backbone is 5 wide"),
        ("backbone is ''; expected a path", "--backbone is ''; expected a path"),
    ],
)
def test_errors_of_the_library_name_flags(message, expected):
    parser = Parser(prog="brixel")
    for flag in ("--backbone", "--short-side-px", "--include-backbone"):
        parser.add_argument(flag)
    assert in_flags(message, parser) == expected
