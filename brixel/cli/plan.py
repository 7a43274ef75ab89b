"""`brixel plan`: how an image of some size would be computed within a memory limit; tables of such limits."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from brixel.cli.options import (
    REPORT_HELP,
    add_flag,
    add_memory_options,
    add_model_options,
    add_short_side,
    check_report,
    command,
    height_by_width,
    load,
    positive,
    print_json,
    print_table,
    tell,
)
from brixel.errors import BrixelError
from brixel.evaluate.cost.memory import ARCHITECTURES, SIDES, memory_table, report
from brixel.evaluate.cost.memory_limits import limit_report, limit_table
from brixel.images.patch_grid import NATIVE
from brixel.inference.memory.planner import check_tiles
from brixel.utils.devices import choose_dtype
from brixel.utils.memory import parse_bytes


def add(commands: Any) -> None:
    """Add the command."""
    text = "predict how an image would be computed in a memory limit"
    one = command(commands, "plan", _plan, text, "brixel plan 4096x4096 --memory-limit 4GiB")
    one.add_argument(
        "size", nargs="?", type=height_by_width, metavar="HEIGHTxWIDTH", help="size of the image in pixels"
    )
    add_short_side(one, "native")
    add_flag(one, "--batch-size", default=1)
    one.add_argument("--to-file", action="store_true", help="write the map to a file, not to memory")
    add_model_options(one)
    add_memory_options(one)
    add_flag(one, "--json")
    one.add_argument("--table", action="store_true", help="instead: the least memory of random weights, by size")
    one.add_argument(
        "--limits", nargs="+", default=(), metavar="AMOUNT", help="instead: run random weights within these, and count"
    )
    one.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="NAME", help="of the tables")
    one.add_argument("--sides", nargs="+", type=positive, default=SIDES, metavar="PX", help="of the tables' images")
    one.add_argument(
        "--measure", nargs="+", default=(), type=_measured, metavar="NAME=PX", help="also run, up to that side"
    )
    one.add_argument("-o", "--output", type=Path, help=REPORT_HELP)


def _measured(text: str) -> tuple[str, int]:
    name, equals, side = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an architecture and a side, such as dinov3-vits16=512")
    return name, positive(side)


def _plan(options: argparse.Namespace) -> int:
    asked = [options.size is not None, options.table, bool(options.limits)]
    if sum(asked) != 1:
        raise BrixelError("give one of a size HEIGHTxWIDTH, such as 4096x4096, --table and --limits")
    if options.table:
        check_report(options.output)
        rows = memory_table(options.architectures, options.sides, measured=dict(options.measure))
        tell(report(rows, options.command), options.output)
        return 0
    if options.limits:
        check_report(options.output)
        found = limit_table(
            options.architectures,
            options.sides,
            [parse_bytes(each) for each in options.limits],
            dtype=choose_dtype(options.dtype, torch.device("cpu")),
            tiles=check_tiles(options.tiles),
        )
        tell(limit_report(list(found), options.command), options.output)
        return 0
    plan = load(options).plan(
        options.size,
        batch=options.batch_size,
        memory_limit=options.memory_limit,
        tiles=options.tiles,
        short_side_px=NATIVE if options.short_side_px is None else options.short_side_px,
        to_file=options.to_file,
    )
    facts = dataclasses.asdict(plan)
    if options.json:
        print_json(facts)
        return 0
    print_table({name: value for name, value in facts.items() if value is not None})
    if plan.tiles is not None:
        print("an approximation: tiles do not attend to one another")
    return 0
