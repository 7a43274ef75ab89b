"""What a stream may hold at once, by the limit and the largest image so far; predictions are stubbed but for one."""

import dataclasses
import threading

import pytest

from brixel.inference.memory import budget as budget_module
from brixel.inference.memory import planner as planner_module
from brixel.inference.memory.allocation_tracker import storage_bytes
from brixel.inference.memory.limited_forward import MemoryLimitedForward
from brixel.inference.memory.prediction import Job, needed_bytes
from brixel.inference.memory.strategies import Whole

MIB = 2**20
BYTES_PER_PIXEL = 600


@pytest.fixture
def stubbed(tiny, monkeypatch):
    """Predictions of 600 bytes per pixel in work, and the weights; the limits below are too small for the bound."""

    def predict(student, strategy, job, device=None):
        pixels = strategy.pixels_at_once(job.grid_hw(student), student.patch_px)
        return storage_bytes(student) + BYTES_PER_PIXEL * pixels * (1 if strategy.name != "whole" else job.batch)

    for module in (budget_module, planner_module):
        monkeypatch.setattr(module, "needed_bytes", predict)
    return predict


def test_what_may_wait_is_what_batches_leave_of_the_limit(tiny, stubbed):
    limit, weights = 50 * MIB, storage_bytes(tiny)
    waiting = 128 * 128 * 12 + 192 * 32 * 32 * 4  # pixels and map of the larger image
    forward = MemoryLimitedForward(tiny, limit=limit, batch=2)
    budget = forward.budget
    assert budget.spare_bytes() == limit - weights  # no image is known yet
    forward.check((128, 128))
    largest = BYTES_PER_PIXEL * 128 * 128
    assert budget.spare_bytes() == limit - weights - 2 * largest
    forward.check((32, 32))
    assert budget.spare_bytes() == limit - weights - 2 * largest
    assert budget.max_in_flight() == 2 + (budget.spare_bytes() // 2 - waiting) // waiting
    assert MemoryLimitedForward(tiny, limit=weights + MIB, batch=2).budget.max_in_flight() >= 2


def test_the_largest_image_counts_as_it_is_predicted(tiny):
    limit, weights = 50 * MIB, storage_bytes(tiny)
    forward = MemoryLimitedForward(tiny, limit=limit, batch=2)
    forward.check((96, 128))
    need = needed_bytes(tiny, Whole(), Job(1, (96, 128))) - weights
    assert forward.budget.spare_bytes() == limit - weights - 2 * need


def test_with_memory_enough_nothing_is_predicted(tiny, monkeypatch):
    for module in (budget_module, planner_module):
        monkeypatch.setattr(module, "needed_bytes", None)
    forward = MemoryLimitedForward(tiny, batch=2)  # within what is free
    forward.check((64, 64))
    assert 0 < forward.budget.spare_bytes() < 2**60
    assert MemoryLimitedForward(tiny, batch=4).budget.max_batch((96, 128)) == 4


def test_a_batch_is_as_large_as_all_of_it_is_computed_as_one_image_is(tiny, stubbed):
    job = Job(1, (96, 128))
    one, two = (stubbed(tiny, Whole(), dataclasses.replace(job, batch=count)) for count in (1, 2))
    for limit, count in ((one, 1), (two, 2), (one * 9, 4)):
        budget = MemoryLimitedForward(tiny, limit=limit, batch=4).budget
        assert budget.max_batch((96, 128)) == count
        assert budget.max_in_flight() >= count


@pytest.mark.slow
def test_a_small_image_checked_by_another_thread_does_not_undo_a_large_one(tiny, stubbed, monkeypatch):
    forward, begun, done = MemoryLimitedForward(tiny, limit=50 * MIB), threading.Event(), threading.Event()

    def slow(student, strategy, job, device=None):
        if job.padded_hw == (32, 32):
            begun.set()
            done.wait(1)  # the other thread has its turn, if it may
        return stubbed(student, strategy, job)

    monkeypatch.setattr(budget_module, "needed_bytes", slow)
    monkeypatch.setattr(planner_module, "surely_fits", lambda *_: False)
    thread = threading.Thread(target=forward.check, args=((32, 32),))
    thread.start()
    begun.wait()
    forward.check((96, 128))
    done.set()
    thread.join()
    assert forward.budget.spare_bytes() == 50 * MIB - storage_bytes(tiny) - BYTES_PER_PIXEL * 96 * 128
