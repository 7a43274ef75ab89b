"""A memory limit that is kept, and memory that runs out anyway."""

import json
import logging
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import FeatureMap, MemoryLimitError
from brixel.cli.app import main
from brixel.inference.memory import budget as budget_module
from brixel.inference.memory import limited_forward as limited_forward_module
from brixel.inference.memory import planner as planner_module
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes, weights_and_buffers
from brixel.inference.memory.limited_forward import MemoryLimitedForward, check_host
from brixel.inference.memory.prediction import Job, needed_bytes
from brixel.inference.memory.strategies import RowChunks, Tiles, Whole
from brixel.utils.out_of_memory import is_out_of_memory

MIB = 2**20

# ---------------------------------------------------------------- the limit is kept


def test_the_computer_s_own_memory_bounds_pixels(monkeypatch):
    check_host((64, 64))
    monkeypatch.setattr(limited_forward_module, "free_bytes", lambda _: 1000)
    with pytest.raises(MemoryLimitError, match="64x64 pixels .* and the computer has 0 MiB free"):
        check_host((64, 64))


def test_a_generous_limit_spares_a_prediction_and_the_plan_still_has_one(tiny, monkeypatch):
    job, limit = Job(2, (64, 64)), storage_bytes(tiny) + 400 * MIB
    predicted = needed_bytes(tiny, Whole(2), job)
    assert tiny.plan((64, 64), batch=2, memory_limit=limit, short_side_px="native").peak_bytes == predicted
    monkeypatch.setattr(planner_module, "needed_bytes", None)
    monkeypatch.setattr(planner_module, "choose_strategy", None)
    monkeypatch.setattr(budget_module, "needed_bytes", None)
    forward = MemoryLimitedForward(tiny, limit=limit, batch=2)
    forward.check((64, 64))
    assert forward.budget.max_batch((64, 64)) == 2
    assert forward.budget.spare_bytes() >= (limit - storage_bytes(tiny)) // 2
    assert len(forward(torch.zeros(2, 3, 64, 64))) == 2


@pytest.mark.slow
def test_a_map_in_row_chunks_is_the_map(tiny, waves):
    whole = tiny.extract(waves, short_side_px="native")
    limit = needed_bytes(tiny, RowChunks(1), Job(1, (144, 272)))
    limited = tiny.extract(waves, short_side_px="native", memory_limit=limit, tiles="never")
    assert tiny.plan((130, 260), memory_limit=limit, tiles="never", short_side_px="native").strategy == "row_chunks"
    torch.testing.assert_close(limited.features, whole.features, rtol=1e-4, atol=1e-4)
    assert (limited.meta, limited.image_hw, limited.stride) == (whole.meta, whole.image_hw, whole.stride)
    assert limited.features.is_contiguous()


@pytest.mark.parametrize(
    "strategy", [Whole(), *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in (RowChunks(1), Tiles(8)))]
)
def test_the_limit_holds_while_a_map_is_made(tiny, waves, strategy):
    """From prepared pixels on, counted from outside; the image itself is small beside them."""
    limit = needed_bytes(tiny, strategy, Job(1, (144, 272)))
    tiles = "always" if isinstance(strategy, Tiles) else "auto"  # row chunks, which are exact, may need less
    plan = tiny.plan(waves.shape[:2], memory_limit=limit, tiles=tiles, short_side_px="native")
    assert plan.strategy == strategy.name  # predicted by now, and not counted
    with AllocationTracker("cpu") as tracker:
        tracker.track(weights_and_buffers(tiny))
        tiny.extract(waves, short_side_px="native", memory_limit=limit, tiles=tiles)
    assert tracker.peak <= limit + waves.nbytes


@pytest.mark.slow
def test_tiles_are_warned_of_once_and_recorded(tiny, waves, caplog, monkeypatch):
    for module in (budget_module, planner_module):
        monkeypatch.setattr(module, "needed_bytes", lambda *_: 1)
    with caplog.at_level(logging.WARNING, "brixel"):
        maps = list(tiny.stream([waves, waves, waves[:64]], short_side_px="native", tiles="always", batch_size=2))
    assert [record.message for record in caplog.records if "tiles" in record.message] == [caplog.records[0].message]
    assert "an approximation" in caplog.records[0].message
    note = maps[0].meta["tiles"]
    assert note == maps[1].meta["tiles"]
    assert note.endswith("px, overlapping by 64 px or more")
    whole = tiny.extract(waves, short_side_px="native").features
    assert 0 < (maps[0].features - whole).norm() < 0.7 * whole.norm()


@pytest.mark.slow
def test_extract_and_show_take_a_limit(waves, tmp_path, caplog):
    Image.fromarray(waves).save(tmp_path / "waves.png")
    limited = ["--tiles", "always", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "waves.png"), "-o", str(tmp_path / "out"), *limited]) == 0
    made = FeatureMap.load(tmp_path / "out" / "waves.png.safetensors")
    assert "tiles" in made.meta
    tight = ["--memory-limit", "4MiB", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "waves.png"), "-o", str(tmp_path / "none"), *tight]) == 1
    assert "the limit is 4 MiB" in caplog.text
    assert main(["show", str(tmp_path / "waves.png"), "-o", str(tmp_path / "panel.png"), *tight]) == 2


# ---------------------------------------------------------------- memory runs out anyway


def failing(monkeypatch, fails, error):
    """Strategies raise where ``fails`` says so; returns the list of those that were tried, in order."""
    tried = []
    for strategy_class in (Whole, RowChunks, Tiles):
        genuine = strategy_class.run

        def run(self, student, pixels, outputs=None, *, counting=False, on_device=False, genuine=genuine):
            if not counting:
                tried.append(self)
                if fails(self):
                    made = torch.ones(1000) if outputs is None else outputs[0].fill_(torch.nan)
                    assert made is not None
                    raise error
            return genuine(self, student, pixels, outputs, counting=counting, on_device=on_device)

        monkeypatch.setattr(strategy_class, "run", run)
    return tried


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_lack_of_memory_is_known_by_every_devices_error(error):
    assert is_out_of_memory(error)


@pytest.mark.slow
def test_the_batch_then_the_chunk_is_halved_and_remembered(tiny, waves, monkeypatch):
    expected = tiny.extract(waves[:64, :96], short_side_px="native").features
    tried = failing(monkeypatch, lambda strategy: strategy != RowChunks(1), ERRORS[1])
    maps = list(tiny.stream([waves[:64, :96]] * 9, batch_size=4, short_side_px="native"))
    assert tried == [
        *(Whole(4), Whole(2), Whole(1), RowChunks(2)),
        *[RowChunks(1)] * 2,  # the first batch, and the second at once
        RowChunks(1),  # and the last, of another size
    ]
    assert len(maps) == 9
    for feature_map in maps:
        torch.testing.assert_close(feature_map.features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tiles_come_after_row_chunks_where_they_are_allowed(tiny, waves, monkeypatch):
    tried = failing(monkeypatch, lambda strategy: strategy != Tiles(8), ERRORS[0])
    assert "of 128x128 px" in tiny.extract(waves, short_side_px="native").meta["tiles"]
    assert tried[-2:] == [Tiles(16), Tiles(8)]
    assert [strategy.name for strategy in tried[:-2]] == ["whole", *["row_chunks"] * 3]
    with pytest.raises(MemoryLimitError, match="memory ran out for an image of 144x272 pixels"):
        tiny.extract(waves, short_side_px="native", tiles="never")


@pytest.mark.slow
def test_a_file_never_holds_a_partly_filled_map(tiny, waves, monkeypatch, tmp_path):
    whole = tiny.extract(waves, short_side_px="native").features
    failing(monkeypatch, lambda strategy: strategy.name == "whole" or strategy.rows > 2, ERRORS[0])
    made = tiny.extract(waves, short_side_px="native", out=tmp_path / "map.npy")
    torch.testing.assert_close(made.features, whole, rtol=1e-4, atol=1e-4)
    failing(monkeypatch, lambda strategy: True, ERRORS[0])
    with pytest.raises(MemoryLimitError):
        tiny.extract(waves[:32, :48], short_side_px="native", out=tmp_path / "other.npy")
    assert not (tmp_path / "other.npy").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, waves, monkeypatch):
    error = RuntimeError("the size of tensor a must match")
    assert not is_out_of_memory(error)
    tried = failing(monkeypatch, lambda strategy: True, error)
    with pytest.raises(RuntimeError, match="must match"):
        tiny.extract(waves)
    assert len(tried) == 1


def test_what_a_failed_attempt_held_is_free_before_the_next(tiny, waves, monkeypatch):
    held, freed = [], []

    def run(self, student, pixels, outputs=None, *, counting=False, on_device=False):
        big = torch.ones(1000)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    genuine = RowChunks.run

    def run_chunks(self, *arguments, **options):
        freed.append(held[0]() is None)
        return genuine(self, *arguments, **options)

    monkeypatch.setattr(Whole, "run", run)
    monkeypatch.setattr(RowChunks, "run", run_chunks)
    tiny.extract(waves, short_side_px=64)
    assert (len(held), freed) == (1, [True])


# ---------------------------------------------------------------- from an accelerator to the CPU


@pytest.fixture
def accelerated(tiny, monkeypatch):
    """The planner takes the model to be on CUDA; predictions are 1 KiB per pixel in work, and the weights."""

    def predict(student, strategy, job, device=None):
        pixels = strategy.pixels_at_once(job.grid_hw(student), student.patch_px)
        return storage_bytes(student) + 1024 * pixels

    for module in (budget_module, planner_module):
        monkeypatch.setattr(module, "needed_bytes", predict)
    monkeypatch.setattr(planner_module.Planner, "device", torch.device("cuda"))
    return tiny


def test_what_does_not_fit_on_an_accelerator_is_computed_on_the_cpu(accelerated, waves, caplog):
    expected = accelerated.extract(waves[:64, :96], short_side_px="native", memory_limit="4GiB").features
    limited = {"short_side_px": "native", "memory_limit": storage_bytes(accelerated), "tiles": "never"}
    with caplog.at_level(logging.WARNING, "brixel"):
        maps = list(accelerated.stream([waves[:64, :96]] * 2, **limited))
    assert [record.message for record in caplog.records] == [
        "cuda has too little memory for 64x96 px: the CPU computes them"
    ]
    assert all(torch.equal(feature_map.features, expected) for feature_map in maps)
    assert accelerated.plan((64, 96), memory_limit="4MiB", short_side_px="native").device == "cpu"
    assert accelerated.plan((64, 96), memory_limit="4GiB", short_side_px="native").device == "cuda"


def test_the_cpu_takes_over_where_the_accelerator_runs_out_with_the_least(accelerated, waves, monkeypatch, caplog):
    expected = accelerated.extract(waves[:64, :96], short_side_px="native", memory_limit="4GiB").features
    tried = failing(monkeypatch, lambda strategy: len(tried) <= 3, ERRORS[0])
    with caplog.at_level(logging.WARNING, "brixel"):
        limited = {"short_side_px": "native", "memory_limit": "4GiB", "tiles": "never"}
        maps = list(accelerated.stream([waves[:64, :96]] * 2, **limited))
    assert tried == [Whole(1), RowChunks(2), RowChunks(1), Whole(1), Whole(1)]
    assert len([record for record in caplog.records if "the CPU computes" in record.message]) == 1
    assert all(torch.equal(feature_map.features, expected) for feature_map in maps)


# ---------------------------------------------------------------- the same on a GPU


@pytest.mark.gpu
def test_a_real_lack_of_memory_on_cuda_ends_in_a_map(tiny, waves):
    waves = np.tile(waves, (2, 2, 1))[:250, :330]  # as large as the limit below was chosen for
    expected = tiny.extract(waves, short_side_px="native").features
    model = copy_with(tiny, lambda tensor: tensor.cuda())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 40 * MIB) / total)
        features = model.extract(waves, short_side_px="native", memory_limit="4GiB", tiles="never").features
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_what_does_not_fit_on_cuda_is_computed_on_the_cpu_with_one_warning(tiny, waves, caplog):
    model = copy_with(tiny, lambda tensor: tensor.cuda())
    with caplog.at_level(logging.WARNING, "brixel"):
        (first, second) = model.stream([waves, waves], memory_limit="4MiB")
    assert len([record for record in caplog.records if "the CPU computes" in record.message]) == 1
    torch.testing.assert_close(first.features, tiny.extract(waves).features, rtol=1e-4, atol=1e-4)
    assert json.loads(json.dumps(dict(second.meta))) == dict(first.meta)
