"""Many images within a limit, which also bounds images decoded ahead and maps that wait for their turn."""

import gc
import itertools
import types
import weakref

import numpy as np
import pytest
import torch

from brixel import BrixelFeatures, MemoryLimitError, Reduce
from brixel.inference.memory.allocation_tracker import AllocationTracker, weights_and_buffers
from brixel.inference.memory.limited_forward import MemoryLimitedForward
from brixel.inference.memory.prediction import Job, needed_bytes
from brixel.inference.memory.strategies import RowChunks, Whole
from brixel.inference.stream import FeatureStream, _on_any_device

MIB = 2**20


@pytest.fixture(scope="module")
def images():
    """Of two sizes in turn, so that each waits for others of its own."""
    chance = np.random.default_rng(0)
    sizes = [(96, 128), (128, 96)] * 6
    return [chance.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("spare_mib", [0, 2, 8])
def test_the_limit_holds_over_a_stream_of_mixed_sizes(tiny, images, spare_mib):
    expected = [tiny.extract(image, short_side_px="native").features for image in images]
    sizes = ((96, 128), (128, 96))
    limit = max(needed_bytes(tiny, Whole(3), Job(3, size)) for size in sizes) + spare_mib * MIB
    for size, batch in itertools.product(sizes, (1, 2)):
        needed_bytes(tiny, Whole(batch), Job(batch, size))  # kept, so that none is made while memory is counted
    stream = tiny.stream(images, short_side_px="native", memory_limit=limit, batch_size=3, workers=0)
    with AllocationTracker("cpu") as tracker:
        tracker.track(weights_and_buffers(tiny))
        found = [next(stream).numpy().copy() for _ in images]  # arrays are not counted
    for features, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(features), whole, rtol=1e-4, atol=1e-4)
    assert tracker.peak <= limit + 2 * images[0].nbytes


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["int8", "stride:6,float16", "regions:16x16"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_limit_holds_while_maps_are_reduced(tiny, images, reduce, batch_size):
    """What a step takes is less than the activations of the batch, which are free by then."""
    limit = max(needed_bytes(tiny, Whole(batch_size), Job(batch_size, size)) for size in ((96, 128), (128, 96)))
    options = {"short_side_px": "native", "memory_limit": limit, "batch_size": batch_size, "workers": 0}
    list(tiny.stream(images[:2], reduce=reduce, **options))  # predictions are kept
    with AllocationTracker("cpu") as tracker:
        tracker.track(weights_and_buffers(tiny))
        for found in tiny.stream(images, reduce=reduce, **options):
            del found
    assert tracker.peak <= limit + 2 * images[0].nbytes


def test_a_batch_is_smaller_where_not_all_its_maps_fit(tiny, images):
    """Neither refused nor in tiles, since each image fits alone."""
    pair = [images[0], images[2]]
    limit = needed_bytes(tiny, Whole(), Job(1, (96, 128)))
    found = list(tiny.stream(pair, short_side_px="native", memory_limit=limit, batch_size=2, workers=0))
    for feature_map, image in zip(found, pair, strict=True):
        assert "tiles" not in feature_map.meta
        assert torch.equal(feature_map.features, tiny.extract(image, short_side_px="native").features)


@pytest.mark.parametrize("batch_size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3))])
def test_an_image_that_nothing_fits_does_not_end_the_stream(tiny, images, monkeypatch, batch_size):
    """Nor do those that share its batch fail with it."""
    mixed = [images[0], np.full((96, 128, 3), 255, np.uint8), images[2], images[1]]
    white = tiny.prepare(mixed[1], short_side_px="native")[0]
    for strategy_class in (Whole, RowChunks):
        genuine = strategy_class.run

        def run(self, student, pixels, *rest, genuine=genuine, **options):
            if any(torch.equal(image, white) for image in pixels):
                raise MemoryError
            return genuine(self, student, pixels, *rest, **options)

        monkeypatch.setattr(strategy_class, "run", run)
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


def test_a_map_that_was_yielded_is_not_held(tiny, images):
    limit = needed_bytes(tiny, Whole(), Job(1, (96, 128)))
    stream = tiny.stream([images[0], images[2]], short_side_px="native", memory_limit=limit, workers=0)
    with AllocationTracker("cpu") as tracker:
        tracker.track(weights_and_buffers(tiny))
        for _ in range(2):
            next(stream)
    assert tracker.peak <= limit


@pytest.mark.gpu
def test_results_on_cuda_leave_it_before_they_wait(images):
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cuda", dtype="float32")
    expected = [model.extract(image, short_side_px="native").features for image in images]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = list(model.stream(images, short_side_px="native", batch_size=3))
    assert torch.cuda.max_memory_allocated() < needed_bytes(model, Whole(3), Job(3, (96, 128))) + 40 * MIB
    for feature_map, whole in zip(found, expected, strict=True):
        assert feature_map.features.device.type == "cpu"
        torch.testing.assert_close(feature_map.features, whole, rtol=1e-4, atol=1e-4)


class Elsewhere:
    """A map on a device that runs out of memory when it is reduced there."""

    def __init__(self, kind="cuda"):
        self.features = types.SimpleNamespace(device=types.SimpleNamespace(type=kind))

    def to(self, device):
        return Elsewhere(device)


def test_a_map_is_reduced_on_the_cpu_where_its_device_runs_out():
    tried = []

    def reduce(whole, name):
        tried.append((whole.features.device.type, name))
        if whole.features.device.type == "cuda":
            raise torch.OutOfMemoryError("out of memory")
        return "reduced"

    assert _on_any_device(reduce, Elsewhere(), "a.jpg") == "reduced"
    assert tried == [("cuda", "a.jpg"), ("cpu", "a.jpg")]
    with pytest.raises(torch.OutOfMemoryError):
        _on_any_device(lambda whole, name: reduce(Elsewhere(), name), Elsewhere("cpu"), "")


def test_maps_are_reduced_before_they_wait(tiny, images):
    """After a batch, nothing but the reduced maps is held."""
    alive = []

    def noting(feature_map, name=""):
        alive.append(weakref.ref(feature_map.features.untyped_storage()))
        return reduce(feature_map, name)

    reduce = Reduce("regions:2x2")
    stream = FeatureStream(MemoryLimitedForward(tiny, batch=3), tiny.preparation(64), batch_size=3, workers=0)
    stream._reduce = noting
    results = stream.maps_or_errors(images[::2][:3])
    first = next(results)
    gc.collect()
    assert len(alive) == 3
    assert [storage() for storage in alive] == [None] * 3
    assert first.grid_hw == (2, 2)
