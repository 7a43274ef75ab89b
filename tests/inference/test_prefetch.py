import threading
import time

import pytest

from brixel.extraction.background_writer import BackgroundWriter
from brixel.inference.prefetch import prefetch


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("brixel")}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whatever_ends_first(workers):
    def slow_at_first(number):
        time.sleep(0.02 if number == 0 else 0)
        return 10 * number

    assert list(prefetch(slow_at_first, range(9), workers=workers)) == list(range(0, 90, 10))
    assert threads() == set()


def test_items_are_read_only_so_far_ahead_and_by_the_consumer():
    taken = []

    def items():
        for number in range(20):
            taken.append((number, threading.current_thread()))
            yield number

    results = prefetch(str, items(), workers=2, depth=3)
    assert taken == []
    assert next(results) == "0"
    assert [number for number, _ in taken] == [0, 1, 2]
    assert next(results) == "1"
    assert [number for number, _ in taken] == [0, 1, 2, 3]
    assert {thread for _, thread in taken} == {threading.current_thread()}
    results.close()
    assert threads() == set()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_function_raises_comes_in_its_turn(workers):
    def fail(number):
        if number == 3:
            raise KeyError("three")
        return number

    results = prefetch(fail, range(9), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert threads() == set()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_items_raise_comes_after_the_results_before_it(workers):
    def items():
        yield from range(3)
        raise KeyError("items")

    results = prefetch(str, items(), workers=workers)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(KeyError, match="items"):
        next(results)


def test_things_are_done_behind_in_order_and_all_of_them():
    done = []
    with BackgroundWriter(done.append, depth=2) as behind:
        for number in range(9):
            behind.submit(lambda number=number: time.sleep(0.002) or number)
            assert len(done) >= number - 2
    assert done == list(range(9))
    assert threads() == set()


def test_an_error_behind_is_raised_and_ends_it():
    done, began = [], []

    def work(number):
        began.append(number)
        if number == 2:
            raise OSError("full")
        return number

    with pytest.raises(OSError, match="full"), BackgroundWriter(done.append, depth=1) as behind:
        for number in range(9):
            behind.submit(lambda number=number: work(number))
    assert done == [0, 1]
    assert 8 not in began
    assert threads() == set()


def test_an_error_in_the_block_lets_what_was_given_be_done():
    done = []
    with pytest.raises(KeyError), BackgroundWriter(done.append, depth=5) as behind:
        for number in range(4):
            behind.submit(lambda number=number: number)
        raise KeyError("elsewhere")
    assert done == [0, 1, 2, 3]


def test_what_may_change_is_done_when_it_is_read():
    here = threading.get_ident()
    where = prefetch(lambda _: threading.get_ident(), range(6), workers=2, in_consumer=lambda number: number % 2 == 0)
    assert [thread == here for thread in where] == [True, False] * 3


@pytest.mark.parametrize(("max_bytes", "most"), [(0, 1), (10, 1), (39, 3), (10**9, 6)])
def test_no_more_bytes_are_ahead_than_allowed(max_bytes, most):
    begun = []

    def items():
        for number in range(12):
            begun.append(number)
            yield number

    ahead = []
    results = prefetch(str, items(), workers=2, depth=6, size=lambda result: 13, max_bytes=lambda: max_bytes)
    for taken, _ in enumerate(results):
        ahead.append(len(begun) - taken)
    assert ahead[0] == 1  # nothing is known of sizes yet
    assert max(ahead) == most


def test_a_result_without_a_size_says_nothing_of_the_others():
    begun, sizes = [], [0, 0, 13, 13, 13, 13]

    def items():
        for size in sizes:
            begun.append(size)
            yield size

    made = prefetch(int, items(), workers=2, depth=6, size=int, max_bytes=lambda: 26)
    assert [len(begun) - taken for taken, _ in enumerate(made)] == [1, 1, 1, 2, 2, 1]
