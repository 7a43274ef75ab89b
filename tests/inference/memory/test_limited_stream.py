"""Many images within a limit: what is made ahead and what waits for its turn counts too."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from brixel import BrixelFeatures, MemoryLimitError
from brixel.feature_maps.host_copy import copy_by_channels, to_host
from brixel.inference.memory import limited_forward as bounded_module
from brixel.inference.memory.allocation_tracker import AllocationTracker, storage_bytes, weights_and_buffers
from brixel.inference.memory.limited_forward import MemoryLimitedForward
from brixel.inference.memory.planner import Job, predict_peak
from brixel.inference.memory.strategies import Way

MIB = 2**20


@pytest.fixture(scope="module")
def tiny():
    return BrixelFeatures.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def images():
    """Of two sizes in turn, so that each waits for others of its own."""
    chance = np.random.default_rng(0)
    sizes = [(96, 128), (128, 96)] * 6
    return [chance.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]


def test_the_limit_holds_over_a_stream_of_mixed_sizes(tiny, images):
    expected = [tiny.extract(each, short_side_px="native").features for each in images]
    least = predict_peak(tiny, Way("whole", batch=3), Job(3, (96, 128)))
    for limit in (least, least + 2 * MIB, least + 8 * MIB):
        for size in ((96, 128), (128, 96)):
            for batch in (1, 2, 3):
                tiny.plan(size, batch=batch, memory_limit=limit)  # predictions are made by now, and not counted
        stream = tiny.stream(images, short_side_px="native", memory_limit=limit, batch_size=3, workers=0)
        with AllocationTracker("cpu") as counter:
            counter.track(weights_and_buffers(tiny))
            found = [next(stream).numpy().copy() for _ in images]  # arrays are not counted
        for each, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(each), whole, rtol=1e-4, atol=1e-4)
        assert counter.peak <= limit + 2 * images[0].nbytes


def test_what_may_wait_is_what_batches_leave_of_the_limit(tiny, monkeypatch):
    limit, weights = 50 * MIB, storage_bytes(tiny)
    waiting = 128 * 128 * 12 + 192 * 32 * 32 * 4  # pixels and map of the larger image
    run = MemoryLimitedForward(tiny, limit=limit, batch=2)
    assert run.room() == limit - weights  # no image is known yet
    run.check((128, 128))
    first = predict_peak(tiny, Way("whole"), Job(1, (128, 128))) - weights
    assert run.room() == limit - weights - 2 * first
    run.check((32, 32))
    assert run.room() == limit - weights - 2 * first
    assert run.window() == 2 + (run.room() // 2 - waiting) // waiting
    assert MemoryLimitedForward(tiny, limit=weights + MIB, batch=2).window() >= 2
    monkeypatch.setattr(bounded_module, "predict_peak", None)
    trusting = MemoryLimitedForward(tiny, batch=2)  # what is free: nothing is predicted
    trusting.check((64, 64))
    assert 0 < trusting.room() < 2**60


def test_a_batch_is_smaller_where_the_limit_has_no_room_for_all_its_maps(tiny, images):
    """Neither refused nor in tiles, since each image fits alone."""
    pair = [images[0], images[2]]
    limit = predict_peak(tiny, Way("whole"), Job(1, (96, 128)))
    found = list(tiny.stream(pair, short_side_px="native", memory_limit=limit, batch_size=2, workers=0))
    for each, image in zip(found, pair, strict=True):
        assert "tiles" not in each.meta
        assert torch.equal(each.features, tiny.extract(image, short_side_px="native").features)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_image_that_nothing_fits_does_not_end_the_stream(tiny, images, monkeypatch, batch_size):
    """Neither do those that share its batch fail with it."""
    genuine = {name: getattr(bounded_module, name) for name in ("maps_of", "run_way")}
    mixed = [images[0], np.full((96, 128, 3), 255, np.uint8), images[2], images[1]]
    white = tiny.prepare(mixed[1], short_side_px="native")[0]

    def failing(name):
        def run(student, way, pixels, *rest):
            if any(torch.equal(each, white) for each in pixels):
                raise MemoryError
            return genuine[name](student, way, pixels, *rest)

        return run

    for name in genuine:
        monkeypatch.setattr(bounded_module, name, failing(name))
    found = list(tiny.stream_all(mixed, short_side_px="native", batch_size=batch_size, tiles="never"))
    assert isinstance(found[1], MemoryLimitError)
    assert "memory ran out for an image of 96x128 pixels" in str(found[1])
    for index in (0, 2, 3):
        expected = tiny.extract(mixed[index], short_side_px="native").features
        torch.testing.assert_close(found[index].features, expected, rtol=1e-4, atol=1e-4)
    stream = tiny.stream(mixed, short_side_px="native", batch_size=batch_size, tiles="never")
    next(stream)
    with pytest.raises(MemoryLimitError):
        next(stream)


def test_a_map_that_was_handed_over_is_not_held(tiny, images):
    limit = predict_peak(tiny, Way("whole"), Job(1, (96, 128)))
    stream = tiny.stream([images[0], images[2]], short_side_px="native", memory_limit=limit, workers=0)
    with AllocationTracker("cpu") as counter:
        counter.track(weights_and_buffers(tiny))
        for _ in range(2):
            next(stream)
    assert counter.peak <= limit


def test_as_many_go_together_as_are_computed_as_one_alone_is(tiny):
    whole, job = Way("whole"), Job(1, (96, 128))
    alone, two = (predict_peak(tiny, whole, dataclasses.replace(job, batch=count)) for count in (1, 2))
    for limit, count in ((alone, 1), (two, 2), (alone * 9, 4)):
        run = MemoryLimitedForward(tiny, limit=limit, batch=4)
        assert run.together((96, 128)) == count
        assert run.window() >= count
    assert MemoryLimitedForward(tiny, batch=4).together((96, 128)) == 4


def test_a_small_image_checked_by_another_thread_does_not_undo_a_large_one(tiny, monkeypatch):
    run, begun, done = MemoryLimitedForward(tiny, limit=50 * MIB), threading.Event(), threading.Event()
    alone, need = predict_peak(tiny, Way("whole"), Job(1, (96, 128))) - storage_bytes(tiny), MemoryLimitedForward._need

    def slow(self, way, job):
        if job.padded_hw == (32, 32):
            begun.set()
            done.wait(1)  # the other thread has its turn, if it may
        return need(self, way, job)

    monkeypatch.setattr(MemoryLimitedForward, "_need", slow)
    thread = threading.Thread(target=run.check, args=((32, 32),))
    thread.start()
    begun.wait()
    run.check((96, 128))
    done.set()
    thread.join()
    assert run.room() == 50 * MIB - storage_bytes(tiny) - alone


@pytest.mark.parametrize("channels", [1, 32, 70])
def test_a_map_from_another_device_is_put_in_order_by_channels(channels):
    dense = torch.randn(2, channels, 5, 6).to(memory_format=torch.channels_last)
    copied = copy_by_channels(dense[1])
    assert copied.is_contiguous()
    assert torch.equal(copied, dense[1])
    assert to_host(dense[1]) is not copied
    assert to_host(dense[1]).data_ptr() == dense[1].data_ptr()  # on the CPU nothing is copied


@pytest.mark.gpu
def test_results_on_cuda_leave_it_before_they_wait(images):
    model = BrixelFeatures.from_pretrained(device="cuda", dtype="float32")
    expected = [model.extract(each, short_side_px="native").features for each in images]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = list(model.stream(images, short_side_px="native", batch_size=3))
    assert torch.cuda.max_memory_allocated() < predict_peak(model, Way("whole", batch=3), Job(3, (96, 128))) + 40 * MIB
    for feature_map, whole in zip(found, expected, strict=True):
        assert feature_map.features.device.type == "cpu"
        torch.testing.assert_close(feature_map.features, whole, rtol=1e-4, atol=1e-4)
