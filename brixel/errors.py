"""Errors that a user can act on: each message says what came, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class BrixelError(ValueError):
    """Base of the errors below; the command line prints one as a single line."""


class ImageError(BrixelError):
    """An image that cannot be read or used: wrong type, shape, range, or a damaged file."""


class CheckpointError(BrixelError):
    """A weight file, a configuration or a folder of either that does not fit."""


class DamagedFileError(CheckpointError):
    """A weight file or a configuration that cannot be read at all, as one that was cut off."""


class MemoryLimitError(BrixelError, MemoryError):
    """An image whose map cannot be computed in the memory that there is, or that was allowed."""


class DownloadError(BrixelError):
    """What cannot be had from the Hub: gated, missing, out of reach, damaged. Its cause is the client's own error."""


class UploadError(BrixelError):
    """What the Hub did not take, and has changed nothing for. Its cause is the client's own error, if there was one."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause to append to "unknown ...": the nearest known name, or all of them where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
