"""Errors that a user can act on: each message states what came, what was expected and what to do.

Names of files, keys and repositories come from outside. In the messages of errors and of the logger "brixel" they
cannot steer a terminal or begin a line: see :func:`one_line`.
"""

import difflib
import errno
import logging
import re
from collections.abc import Iterable

_STEERING = re.compile(  # control characters, line separators, marks of writing direction, invisible tags, surrogates
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text with characters that steer a terminal, or that cannot be encoded, as escapes such as ``\\x1b``."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(message: str) -> str:
    """The message on one line, printable: white space around line breaks becomes a space."""
    return printable(re.sub(r"[^\S\n\r]*[\n\r]\s*", " ", message))


class BrixelError(ValueError):
    """Base class of brixel's errors; the command line prints one as a single line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ImageError(BrixelError):
    """An image cannot be read or used: its type, shape or range is wrong, or its file is damaged."""


class CheckpointError(BrixelError):
    """A weight file, a configuration, or a folder of them does not fit the model."""


class DamagedFileError(CheckpointError):
    """A file cannot be read at all, or holds what no such file may hold: it was cut off, changed, or is another's.

    Weight files, configurations, feature maps, manifests, caches, states: everything that is read back.
    """


class MissingFileError(BrixelError, FileNotFoundError):
    """A file that was named is not there."""

    def __init__(self, message: str, filename: str | None = None) -> None:
        super().__init__(message)
        self.errno, self.strerror = errno.ENOENT, message
        self.filename = filename

    def __str__(self) -> str:
        return one_line(str(self.strerror))


class NotFittedError(BrixelError, AttributeError):
    """A probe is used before it was fitted."""


class MemoryLimitError(BrixelError, MemoryError):
    """A map cannot be computed within the memory limit, or within the memory that is free."""


class DownloadError(BrixelError):
    """The Hub does not give a file: it is gated, missing, unreachable or damaged.

    ``__cause__`` is the error of the Hub's client.
    """


class UploadError(BrixelError):
    """The Hub did not accept an upload, and nothing was changed there.

    ``__cause__`` is the error of the Hub's client, if there was one.
    """


def did_you_mean(name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> str:
    """A clause to append to "unknown ...": the closest of all names, or the list of ``known`` where none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, [*names, *aliases], n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _one_line_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), None
    return True


logging.getLogger("brixel").addFilter(_one_line_record)
