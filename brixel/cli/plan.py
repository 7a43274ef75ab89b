"""`brixel plan`: how an image of some size would be computed within a limit of memory, and a table of such limits."""

import argparse
from pathlib import Path
from typing import Any

import torch

from brixel.cli.options import (
    REPORT_HELP,
    add_memory_options,
    add_model_options,
    check_report,
    command,
    height_by_width,
    load,
    positive,
    print_table,
    tell,
)
from brixel.errors import BrixelError
from brixel.evaluate.cost.memory import ARCHITECTURES, SIDES, memory_table, report
from brixel.evaluate.cost.memory_limits import limit_report, limit_table
from brixel.inference.memory.planner import Plan, check_tiles
from brixel.utils.devices import choose_dtype
from brixel.utils.memory import format_bytes, parse_bytes


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    one = command(commands, "plan", _plan, "how an image would be computed within a limit of memory; nothing is run")
    one.add_argument(
        "size", nargs="?", type=height_by_width, metavar="HEIGHTxWIDTH", help="as it enters the model, in pixels"
    )
    one.add_argument("--batch-size", type=positive, default=1, help="images of that size at once; default: 1")
    one.add_argument("--to-file", action="store_true", help="as if the map went to a file rather than to memory")
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
    add_model_options(one)
    add_memory_options(one)


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
        to_file=options.to_file,
    )
    print_table(describe(plan))
    return 0


def describe(plan: Plan) -> dict[str, str]:
    """A plan in words, for people."""
    strategies = {
        "whole": f"whole, {plan.micro_batch} of {plan.batch} at a time",
        "row_chunks": f"in exact row chunks, {plan.chunk_rows} rows of patches at a time",
        "tiles": f"in {plan.tiles} blended tiles, an approximation",
    }
    rows = {
        "strategy": strategies[plan.strategy],
        "on": f"{plan.device}, {plan.dtype}",
        "padded size": "{}x{} px".format(*plan.padded_hw),
        "peak": f"{format_bytes(plan.peak_bytes)}, predicted, weights included",
        "limit": format_bytes(plan.limit_bytes, up=False),
    }
    if plan.tile_px is not None:
        rows["tiles of"] = "{}x{} px".format(*plan.tile_px) + f", overlapping by {plan.overlap_px} px or more"
    return rows
