"""A function of many items, called ahead of the consumer in threads: bounded, in order, nothing left running."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    depth: int | None = None,
    in_consumer: Callable[[Item], bool] = lambda item: False,
    size: Callable[[Result], int] = lambda result: 0,
    max_bytes: Callable[[], int] = lambda: sys.maxsize,
) -> Iterator[Result]:
    """Yield ``function`` of every item, in order. What ``function`` or ``items`` raises comes in its turn.

    Args:
        function: Called in the threads.
        items: Read by the consumer, never by the threads.
        workers: Threads; without any this is `map`.
        depth: Items ahead of the consumer at most; None: twice the number of workers.
        in_consumer: Items for which the consumer calls the function as soon as it reads them: those that their owner
            may change afterwards.
        size: Bytes of a result.
        max_bytes: Bytes of results ahead at most, where those that are not ready count as large as the largest so far;
            one result is always begun.
    """
    if workers == 0:
        yield from map(function, items)
        return
    iterator = iter(items)
    failure: Exception | None = None
    waiting: deque[Future[Result]] = deque()
    largest: int | None = None  # until there is a first result with a size
    executor = ThreadPoolExecutor(workers, thread_name_prefix="brixel-prefetch")
    try:
        while True:
            while failure is None and len(waiting) < (depth or 2 * workers):
                if waiting and _is_too_much(len(waiting) + 1, largest, max_bytes()):
                    break
                try:
                    item = next(iterator)
                    waiting.append(_done(function(item)) if in_consumer(item) else executor.submit(function, item))
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
            if not waiting:
                break
            largest = max(largest or 0, size(waiting[0].result())) or None  # a result without a size says nothing
            yield waiting.popleft().result()  # not held here while the consumer works on it
    finally:
        executor.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


def _is_too_much(count: int, largest: int | None, max_bytes: int) -> bool:
    return max_bytes < sys.maxsize and (largest is None or count * largest > max_bytes)


def _done(result: Result) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(result)
    return future
