"""Decoding without the warnings and log lines of Pillow, and the lines that libtiff prints, in this thread alone.

Pillow warns of metadata that it cannot read and of large images; errors in the pixels are raised. None of it names the
file. libtiff prints what Pillow then raises as well, and has one handler of errors for all threads: those that decode
with it at the same time do not see its lines either.
"""

import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from PIL import _imaging


class _Decoding(threading.local):
    depth = 0


class _InDecodingThreads:
    """Takes the place of a regular expression in a warning filter, which all threads share: matches in some of them."""

    def match(self, module: str) -> bool:
        return _decoding.depth > 0


def _not_while_decoding(record: logging.LogRecord) -> bool:
    return _decoding.depth == 0


_decoding = _Decoding()
_FILTER = ("ignore", None, Warning, _InDecodingThreads(), 0)
_LOGGER = logging.getLogger("PIL.TiffImagePlugin")  # the only one of Pillow that logs errors
_lock = threading.Lock()
_threads = 0
_filtered: list[list[Any]] = []  # the lists of filters that hold ours: each `warnings.catch_warnings` starts another
_libtiff_before: Any = None  # its handler of errors


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """No warning of this thread is shown or raised, and libtiff prints nothing. May be nested."""
    _decoding.depth += 1
    _enter()
    try:
        yield
    finally:
        _leave()
        _decoding.depth -= 1


def _enter() -> None:
    global _threads, _libtiff_before
    with _lock:
        _threads += 1
        if _threads == 1:
            _libtiff_before = _set_libtiff_handler()(None)
            _LOGGER.addFilter(_not_while_decoding)
        filters = _filters()
        if not filters or filters[0] is not _FILTER:
            filters.insert(0, _FILTER)
            _filtered.append(filters)


def _leave() -> None:
    global _threads
    with _lock:
        _threads -= 1
        if _threads == 0:
            _set_libtiff_handler()(_libtiff_before)
            _LOGGER.removeFilter(_not_while_decoding)
            for filters in (*_filtered, _filters()):
                filters[:] = [entry for entry in filters if entry is not _FILTER]
            _filtered.clear()


def _filters() -> list[Any]:
    return warnings.filters  # type: ignore[return-value]


@functools.cache
def _set_libtiff_handler() -> Callable[[Any], Any]:
    """The function `TIFFSetErrorHandler` of the libtiff that Pillow uses; where it is not found, one that does nothing.

    It takes and returns pointers to functions; without one, libtiff is silent.
    """
    try:
        function: Any = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):
        return lambda handler: None
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p]
    return cast("Callable[[Any], Any]", function)
