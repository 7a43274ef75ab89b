"""Work done in one background thread, in order and bounded."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Made = TypeVar("Made")


class BackgroundWriter(Generic[Made]):
    """One thread that does things after another, in the order given, at most ``depth`` of them outstanding.

    ``done`` gets each result, in the caller's thread. An error is raised at the next call; what was given after it is
    not done. On leaving the block all is done, or the first error raised.
    """

    def __init__(self, done: Callable[[Made], None], *, depth: int) -> None:
        self._done, self._depth = done, depth
        self._waiting: deque[Future[Made]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="brixel-behind")

    def do(self, function: Callable[[], Made]) -> None:
        """Have something done; waits while there is too much to do already."""
        self._waiting.append(self._executor.submit(function))
        while self._waiting and (len(self._waiting) > self._depth or self._waiting[0].done()):
            self._take()

    def _take(self) -> None:
        try:
            self._done(self._waiting.popleft().result())
        except BaseException:
            self._executor.shutdown(cancel_futures=True)
            self._waiting.clear()
            raise

    def __enter__(self) -> "BackgroundWriter[Made]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._waiting:
                self._take()
        finally:
            self._executor.shutdown()
