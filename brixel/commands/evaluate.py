"""`brixel evaluate`: how good a model is."""

import argparse
from pathlib import Path
from typing import Any

from brixel.commands.options import REPORT_HELP, add_model_options, check_report, command, load, positive, tell
from brixel.evaluate.fidelity import fidelity, report
from brixel.pictures import find_pictures


def add(commands: Any) -> None:
    """Add the command to the parser's, with a command of its own for each thing to evaluate."""
    judges = commands.add_parser("evaluate", help="how good a model is").add_subparsers(required=True, metavar="WHAT")
    one = command(judges, "fidelity", _fidelity, "nearness to the backbone on the large picture, beside interpolation")
    one.add_argument("--images", nargs="+", type=Path, required=True, metavar="PATH", help="pictures, and folders")
    one.add_argument("--teacher-px", nargs="+", type=positive, required=True, metavar="PX", help="sides, in pixels")
    one.add_argument("-o", "--output", type=Path, help=REPORT_HELP)
    add_model_options(one)


def _fidelity(options: argparse.Namespace) -> int:
    check_report(options.output)
    pictures = [path for path, _ in find_pictures(options.images)]
    tell(report(fidelity(load(options), pictures, options.teacher_px), options.command), options.output)
    return 0
