"""Progress bars on standard error, where that is a terminal."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from brixel.errors import printable


def progress_bar(iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> "tqdm[Any]":
    """A progress bar over an iterable, or one to update; ``disable=True`` for none.

    Nothing is shown where standard error is no terminal, or closed, as in a daemon.
    """
    disable = options.pop("disable", None) or (True if sys.stderr is None else None)
    return tqdm(iterable, None if desc is None else printable(desc), disable=disable, **options)
