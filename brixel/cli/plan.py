"""`brixel plan`: how an image of some size would be computed within a limit of memory."""

import argparse
from typing import Any

from brixel.cli.options import (
    add_memory_options,
    add_model_options,
    command,
    height_by_width,
    load,
    positive,
    print_table,
)
from brixel.inference.memory.planner import Plan
from brixel.utils.memory import format_bytes


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    one = command(commands, "plan", _plan, "how an image would be computed within a limit of memory; nothing is run")
    one.add_argument("size", type=height_by_width, metavar="HEIGHTxWIDTH", help="as it enters the model, in pixels")
    one.add_argument("--batch-size", type=positive, default=1, help="images of that size at once; default: 1")
    one.add_argument("--to-file", action="store_true", help="as if the map went to a file rather than to memory")
    add_model_options(one)
    add_memory_options(one)


def _plan(options: argparse.Namespace) -> int:
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
    ways = {
        "whole": f"whole, {plan.micro_batch} of {plan.batch} at a time",
        "pieces": f"in exact pieces, {plan.piece_rows} rows of patches at a time",
        "tiles": f"in {plan.tiles} blended tiles, an approximation",
    }
    rows = {
        "way": ways[plan.way],
        "on": f"{plan.device}, {plan.dtype}",
        "padded size": "{}x{} px".format(*plan.padded_hw),
        "peak": f"{format_bytes(plan.peak_bytes)}, predicted, weights included",
        "limit": format_bytes(plan.limit_bytes, up=False),
    }
    if plan.tile_px is not None:
        rows["tiles of"] = "{}x{} px".format(*plan.tile_px) + f", overlapping by {plan.overlap_px} px or more"
    return rows
