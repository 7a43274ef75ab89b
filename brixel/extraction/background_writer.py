"""One background thread that runs functions in order, with a limit on how many wait."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """A thread that runs submitted functions one after another; at most ``depth`` of them are unfinished.

    ``on_result`` gets every result, in the caller's thread. An error is raised at the next call, and the functions
    after it are not run. Leaving the block waits for all of them, or raises the first error.
    """

    def __init__(self, on_result: Callable[[T], None], *, depth: int) -> None:
        self._on_result, self._depth = on_result, depth
        self._pending: deque[Future[T]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="brixel-writer")

    def submit(self, function: Callable[[], T]) -> None:
        """Queue a function; blocks while more than ``depth`` are unfinished."""
        self._pending.append(self._executor.submit(function))
        while self._pending and (len(self._pending) > self._depth or self._pending[0].done()):
            self._take_result()

    def _take_result(self) -> None:
        try:
            self._on_result(self._pending.popleft().result())
        except BaseException:
            self._executor.shutdown(cancel_futures=True)
            self._pending.clear()
            raise

    def __enter__(self) -> "BackgroundWriter[T]":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._pending:
                self._take_result()
        finally:
            self._executor.shutdown()
