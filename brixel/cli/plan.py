"""`brixel plan`: how an image of some size would be computed within a memory limit."""

import argparse
import dataclasses
from typing import Any

from brixel.cli.options import (
    add_flag,
    add_map_options,
    add_model_options,
    command,
    given,
    height_by_width,
    load,
    print_json,
    print_table,
)


def add(commands: Any) -> None:
    """Add the command."""
    text = "predict how an image would be computed in a memory limit"
    one = command(commands, "plan", _plan, text, "brixel plan 4096x4096 --short-side-px native --memory-limit 4GiB")
    one.add_argument("size", type=height_by_width, metavar="HEIGHTxWIDTH", help="size of the image in pixels")
    add_flag(one, "--batch-size", default=1)
    one.add_argument("--to-file", action="store_true", help="write the map to a file, not to memory")
    add_model_options(one)
    add_map_options(one)
    add_flag(one, "--json")


def _plan(options: argparse.Namespace) -> int:
    plan = load(options).plan(
        options.size,
        batch=options.batch_size,
        **given(options, "scale", "short_side_px", "memory_limit", "tiles", "to_file"),
    )
    facts = dataclasses.asdict(plan)
    if options.json:
        print_json(facts)
        return 0
    print_table({name: value for name, value in facts.items() if value is not None})
    if plan.tiles is not None:
        print("an approximation: tiles do not attend to one another")
    return 0
