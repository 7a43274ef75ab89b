"""Errors that a user can act on: each message states what came, what was expected and what to do."""

import difflib
import errno
from collections.abc import Iterable


class BrixelError(ValueError):
    """Base class of brixel's errors; the command line prints one as a single line."""


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

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOENT


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
