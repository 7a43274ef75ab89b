"""Work done ahead of whoever takes it, and after them, in threads: bounded, in order, nothing left running."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def prefetch(
    function: Callable[[Given], Made],
    items: Iterable[Given],
    *,
    workers: int,
    depth: int | None = None,
    at_once: Callable[[Given], bool] = lambda item: False,
    size: Callable[[Made], int] = lambda made: 0,
    room: Callable[[], int] = lambda: sys.maxsize,
) -> Iterator[Made]:
    """``function`` of every item, in order, in ``workers`` threads that are at most ``depth`` items ahead.

    ``items`` is advanced by whoever takes the results, never by the threads. What ``function`` or ``items`` raises
    comes at its place, after the results before it. Without workers it is `map`. ``depth``: where None, twice the
    number of workers. ``at_once``: for which items the function is called when they are taken, by whoever takes the
    results: those that their owner may change afterwards. ``size``: bytes of a result, of which no more than ``room()``
    are made ahead, taking what is begun to be as large as the largest so far; one result is always begun.
    """
    if workers == 0:
        yield from map(function, items)
        return
    iterator = iter(items)
    failure: Exception | None = None
    waiting: deque[Future[Made]] = deque()
    largest: int | None = None  # until a first result with a size is there
    executor = ThreadPoolExecutor(workers, thread_name_prefix="brixel-ahead")
    try:
        while True:
            while failure is None and len(waiting) < (depth or 2 * workers):
                if waiting and _is_too_much(len(waiting) + 1, largest, room()):
                    break
                try:
                    item = next(iterator)
                    waiting.append(_done(function(item)) if at_once(item) else executor.submit(function, item))
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
            if not waiting:
                break
            largest = max(largest or 0, size(waiting[0].result())) or None  # what has no size tells nothing
            yield waiting.popleft().result()  # and not held here while it is worked on
    finally:
        executor.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


def _is_too_much(count: int, largest: int | None, room: int) -> bool:
    return room < sys.maxsize and (largest is None or count * largest > room)


def _done(made: Made) -> Future[Made]:
    future: Future[Made] = Future()
    future.set_result(made)
    return future
