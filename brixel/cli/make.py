"""`brixel benchmark`: what students cost."""

import argparse
from pathlib import Path
from typing import Any

from brixel.cli.options import REPORT_HELP, add_device_options, check_report, command, positive, tell
from brixel.evaluate.cost.timing import DEFAULT_ARCHITECTURES, benchmark, report


def add(commands: Any) -> None:
    """Add the command."""
    one = command(commands, "benchmark", _benchmark, "time, operations and memory of students with random weights")
    one.add_argument("--architectures", nargs="+", default=DEFAULT_ARCHITECTURES, metavar="NAME")
    one.add_argument("--image-px", type=positive, default=256, help="side of the image; default: 256")
    one.add_argument("--rounds", type=positive, default=20, help="default: 20")
    one.add_argument("--threads", type=positive, help="default: torch's own choice")
    one.add_argument("-o", "--output", type=Path, help=REPORT_HELP)
    add_device_options(one)


def _benchmark(options: argparse.Namespace) -> int:
    check_report(options.output)
    results = benchmark(
        options.architectures,
        image_px=options.image_px,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
    )
    tell(report(results, options.command), options.output)
    return 0
