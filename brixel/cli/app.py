"""The command line: the parser of all commands, and how errors and interruptions end."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence

from brixel import __version__
from brixel.cli import convert, evaluate, export, extract, info, plan, probe, show, train, view
from brixel.cli.options import Parser, in_flags
from brixel.errors import BrixelError, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows ``brixel`` on the command line; those of this process where None.

    Returns:
        The exit status. An error is one line on standard error, with ``--debug`` a traceback.
    """
    _replace_closed_streams()
    parser = build_parser()
    options = parser.parse_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 0
    options.command = shlex.join(["brixel", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("brixel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        print(f"brixel: error: {in_flags(_one_line(error), options.parser)}", file=sys.stderr)
        return 2


def _replace_closed_streams() -> None:
    """Let commands print where daemons and `2>&-` have closed a stream, and never fail at the encoding of a name."""
    for descriptor in (0, 1, 2):  # in this order: an open takes the lowest that is free, which no file of ours may be
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that is no UTF-8 keeps its bytes, for the program that reads them
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, BrixelError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    kind = "" if isinstance(error, (BrixelError, OSError)) else f"{type(error).__name__}: "
    return kind + one_line(" ".join(str(error).split()))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="brixel",
        description="Dense features of images from frozen vision transformers. `brixel COMMAND --help` lists options.",
        example="brixel show photo.jpg --teacher -o panel.png",
    )
    parser.add_argument("--version", action="version", version=f"brixel {__version__}", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in (show, view, extract, probe, info, plan, convert, export, train, evaluate):
        module.add(commands)
    return parser
