"""The command line: `brixel COMMAND --help` tells the options; the commands are in `brixel/commands/`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from brixel import __version__
from brixel.cli import evaluate, make, plan, use
from brixel.errors import BrixelError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one line on standard error, with ``--debug`` a traceback."""
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["brixel", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("brixel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        kind = "" if isinstance(error, (BrixelError, OSError)) else f"{type(error).__name__}: "
        print(f"brixel: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="brixel", description="Dense features of images from frozen ViTs.")
    parser.add_argument("--version", action="version", version=f"brixel {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in (use, make, plan, evaluate):
        each.add(commands)
    return parser
