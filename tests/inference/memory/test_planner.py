"""Predictions of memory against what is counted, the choice of a strategy, plans and refusals."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from brixel import BrixelError, BrixelFeatures, MemoryLimitError
from brixel.evaluate.cost.timing import random_student
from brixel.inference.memory import planner as planner_module
from brixel.inference.memory import prediction as prediction_module
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes, weights_and_buffers
from brixel.inference.memory.planner import choose_strategy, strategies_by_cost
from brixel.inference.memory.prediction import Job, needed_bytes, predict_peak, run_job, surely_fits
from brixel.inference.memory.strategies import RowChunks, Tiles, Whole, new_outputs

MIB = 2**20
CPU = torch.device("cpu")

# ---------------------------------------------------------------- prediction

JOBS = [
    (Job(1, (64, 64)), Whole()),
    (Job(3, (64, 96)), Whole(3)),
    (Job(3, (64, 96)), Whole(2)),
    (Job(1, (160, 96), to_file=True), Whole()),
    (Job(1, (160, 96)), RowChunks(3)),
    (Job(2, (160, 96)), RowChunks(1)),
    (Job(1, (160, 96), to_file=True), RowChunks(2)),
    (Job(1, (256, 224), to_file=True), RowChunks(2)),
    (Job(1, (256, 224)), Tiles(8)),
    (Job(2, (256, 224), to_file=True), Tiles(12)),
]
# a batch in parts: this in every run, the others where slow tests run
OFTEN = [(JOBS[2], torch.float32)]


def counted_peak(model, strategy, job):
    images = [torch.randn(3, *job.padded_hw) for _ in range(job.batch)]
    outputs = new_outputs(model, torch.stack(images)) if job.to_file else None
    with AllocationTracker("cpu") as tracker:
        tracker.track(weights_and_buffers(model))
        tracker.track(images)
        tracker.leave_out(outputs or [])
        run_job(model, strategy, images, outputs)
    return tracker.peak


def check_prediction(model, strategy, job):
    """Within a hundredth from above, since three chunks and one tile stand for all, and a tenth from below."""
    predicted = predict_peak(model, strategy, job)
    assert 0.9 * predicted <= counted_peak(model, strategy, job) <= 1.01 * predicted


@pytest.mark.parametrize(
    ("job", "strategy", "dtype"),
    [
        pytest.param(*pair[0], pair[1], marks=[] if pair in OFTEN else pytest.mark.slow)
        for pair in itertools.product(JOBS, (torch.float32, torch.bfloat16))
    ],
)
def test_the_predicted_peak_is_what_is_counted(tiny, job, strategy, dtype):
    model = copy_with(tiny, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor.clone())
    check_prediction(model, strategy, job)


@pytest.mark.parametrize(
    "strategy", [Whole(), *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in (RowChunks(2), Tiles(8)))]
)
def test_the_prediction_holds_for_patches_of_14_and_a_blend(patch14, strategy):
    job = Job(1, (12 * 14, 11 * 14))
    check_prediction(patch14, strategy, job)


@pytest.mark.parametrize(
    ("name", "scale", "strategy"),
    [
        ("guided", 4, RowChunks(2)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in itertools.product(("guided", "second"), (4, 8), (Whole(), RowChunks(2), Tiles(8)))
        ),
    ],
)
def test_the_prediction_holds_for_every_kind_and_scale(request, name, scale, strategy):
    model = request.getfixturevalue(name).at_scale(scale)
    job = Job(1, (12 * model.patch_px, 11 * model.patch_px))
    check_prediction(model, strategy, job)


@pytest.mark.slow
def test_the_bound_that_spares_a_prediction_is_above_it(tiny, patch14, guided, second):
    models = (tiny, patch14, guided, second, guided.at_scale(8), guided.at_scale(1))
    for model, side, batch in itertools.product(models, (4, 16, 40), (1, 4)):
        job = Job(batch, (side * model.patch_px, side * model.patch_px))
        predicted = predict_peak(model, Whole(batch), job)
        spare = predicted - storage_bytes(model)
        assert not surely_fits(model, job, spare)
        assert surely_fits(model, job, 100 * spare)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("tiny", 1),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("tiny", 3), ("patch14", 1), ("patch14", 3))),
    ],
)
def test_a_small_image_takes_no_more_than_the_bound(request, name, batch):
    """Most of it does not depend on the size."""
    model = request.getfixturevalue(name)
    job = Job(batch, (model.patch_px, model.patch_px))
    peak = predict_peak(model, Whole(batch), job)
    assert not surely_fits(model, job, peak - storage_bytes(model))


@pytest.mark.parametrize(
    ("architecture", "published_mib"),
    [
        ("dinov3-vits16", 181),
        pytest.param("dinov3-vitb16", 542, marks=pytest.mark.slow),
        pytest.param("dinov3-vitl16", 1434, marks=pytest.mark.slow),
        pytest.param("dinov3-vith16plus", 3672, marks=pytest.mark.slow),
    ],
)
def test_a_256_px_image_takes_far_less_than_the_release_published(architecture, published_mib):
    """Its figures are of mixed precision on a GPU; ours of bfloat16 throughout, weights included."""
    with torch.device("meta"):
        student = random_student(architecture).to(torch.bfloat16)
    assert predict_peak(student, Whole(), Job(1, (256, 256)), CPU) < 0.5 * published_mib * MIB


# ---------------------------------------------------------------- choice


def test_a_pass_beyond_what_kernels_count_is_never_sure_nor_whole(tiny):
    job = Job(1, (2**15, 2**16))
    assert not surely_fits(tiny, job, 2**60)
    assert [strategies[0].name for strategies in strategies_by_cost(tiny, job, "auto")] == ["row_chunks", "tiles"]
    batches = [strategy.batch for strategy in strategies_by_cost(tiny, Job(4096, (512, 512)), "auto")[0]]
    assert max(batches) < 4096


def stub_predictions(monkeypatch, tiny):
    """Predictions of 1 KiB per pixel in work, and half of that per image in a batch; the strategies that are asked."""
    asked = []

    def predict(student, strategy, job, device=None):
        asked.append(strategy)
        pixels = strategy.pixels_at_once(job.grid_hw(student), student.patch_px)
        return storage_bytes(student) + 1024 * pixels + 512 * job.batch

    monkeypatch.setattr(planner_module, "needed_bytes", predict)
    monkeypatch.setattr(prediction_module, "_FIXED_OVERHEAD", 0)
    monkeypatch.setattr(prediction_module, "_PER_THREAD", 0)
    return asked


def test_the_cheapest_strategy_that_fits_is_chosen_after_few_predictions(tiny, monkeypatch):
    """On a grid of 20 x 10 patches of 16 px: 50 KiB per pixel row of one patch's width."""
    asked, weights = stub_predictions(monkeypatch, tiny), storage_bytes(tiny)
    job, image = Job(8, (320, 160), to_file=True), 1024 * 320 * 160
    for limit, expected in (
        (9 * image, Whole(8)),
        (5 * image, Whole(4)),
        (image + 8192, Whole(1)),
        (image * 3 // 5, RowChunks(10)),
        (image // 4, RowChunks(2)),
        (image // 4 - 8192, RowChunks(2)),
    ):
        asked.clear()
        assert choose_strategy(tiny, job, weights + limit, "auto") == expected
        assert len(asked) <= 2 + 2 + 2
    assert choose_strategy(tiny, job, weights + 9 * image, "always") == Tiles(16)


def test_maps_that_do_not_fit_are_refused_without_a_search(tiny, monkeypatch):
    asked = stub_predictions(monkeypatch, tiny)
    with pytest.raises(MemoryLimitError, match="8 images of 96x96 .* need"):
        choose_strategy(tiny, Job(8, (96, 96)), storage_bytes(tiny) + 3 * MIB, "never")
    assert len(asked) <= 2 + 3  # the least of each kind, and a few sizes


@pytest.mark.slow
def test_less_memory_means_another_strategy_and_every_plan_keeps_its_limit(tiny):
    job = Job(4, (384, 320), to_file=True)
    most = needed_bytes(tiny, Whole(4), job)
    seen = []
    for limit in np.geomspace(most, needed_bytes(tiny, Tiles(8), job) + 1, 12).astype(int):
        strategy = choose_strategy(tiny, job, int(limit), "auto")
        assert needed_bytes(tiny, strategy, job) <= limit
        if strategy.name not in seen:
            seen.append(strategy.name)
    assert seen == ["whole", "row_chunks", "tiles"]


# ---------------------------------------------------------------- plans


def test_a_plan_is_data(tiny):
    plan = tiny.plan((90, 60), memory_limit="60MiB", short_side_px="native")
    assert (plan.device, plan.dtype, plan.batch, plan.padded_hw) == ("cpu", "float32", 1, (96, 64))
    assert plan.peak_bytes <= plan.limit_bytes == 60 * MIB
    assert (plan.strategy, plan.micro_batch) == ("whole", 1)
    assert (plan.chunk_rows, plan.tile_px, plan.overlap_px, plan.tiles) == (None, None, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.strategy = "tiles"
    assert tiny.plan((90, 60), tiles="always", memory_limit="4GiB", short_side_px="native").strategy == "whole"
    assert tiny.plan((3000, 2000), short_side_px=64).padded_hw == (96, 64)


def test_a_plan_of_chunks_or_tiles_says_how_large_they_are(tiny, monkeypatch):
    stub_predictions(monkeypatch, tiny)
    tiled = tiny.plan((600, 300), tiles="always", memory_limit="4GiB", short_side_px="native")
    assert (tiled.strategy, tiled.tiles, tiled.tile_px, tiled.overlap_px) == ("tiles", 2, (512, 304), 128)
    chunks = tiny.plan(
        (160, 160), memory_limit=storage_bytes(tiny) + 14 * MIB, tiles="never", to_file=True, short_side_px="native"
    )
    assert (chunks.strategy, chunks.chunk_rows, chunks.micro_batch) == ("row_chunks", 5, 1)
    assert chunks.peak_bytes == storage_bytes(tiny) + 1024 * 80 * 160 + 512


@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["auto", "never", "always"])
def test_what_fits_nowhere_is_refused_with_what_would_fit(tiny, tiles):
    with pytest.raises(MemoryLimitError) as raised:
        tiny.plan((768, 384), memory_limit="17MiB", tiles=tiles, short_side_px="native")
    assert isinstance(raised.value, BrixelError)
    assert isinstance(raised.value, MemoryError)
    text = str(raised.value)
    assert "768x384 pixels (height x width) needs" in text
    assert "the limit is 17 MiB" in text
    height, width = map(int, text.split("of this shape with ")[1].split(" fits")[0].split("x"))
    assert height >= width > 0
    assert tiny.plan((height, width), memory_limit="17MiB", tiles=tiles, short_side_px="native").peak_bytes <= 17 * MIB
    assert ("allow tiles" in text) == (tiles == "never")


def test_a_limit_below_the_weights_fits_nothing(tiny, monkeypatch):
    stub_predictions(monkeypatch, tiny)
    with pytest.raises(MemoryLimitError, match="no image fits"):
        tiny.plan((16, 16), memory_limit="1MiB", short_side_px="native")


@pytest.mark.parametrize("limit", [None, "1GiB"])
def test_a_backbone_whose_memory_cannot_be_predicted_is_named(limit):
    class Reading(torch.nn.Module):
        """A backbone that looks at values, which tensors without data do not have."""

        width, patch_px, depth, mean, std = 32, 8, 1, (0.5,) * 3, (0.5,) * 3

        def block_maps(self, pixels, blocks):
            cells = torch.nn.functional.avg_pool2d(pixels, 8).mean(1, keepdim=True)
            return [cells.expand(-1, 32, -1, -1) / float(cells.abs().max() + 1)]

    model = BrixelFeatures.from_backbone(Reading(), adapter="bilinear", device="cpu")
    with pytest.raises(BrixelError, match="the memory that Reading needs cannot be predicted"):
        model.plan((64, 64), memory_limit=limit)
    assert model.extract(torch.rand(3, 64, 64), short_side_px="native").features.shape == (32, 32, 32)


def test_arguments_are_checked(tiny):
    with pytest.raises(BrixelError, match="tiles is 'sometimes'; expected 'auto'"):
        tiny.plan((64, 64), tiles="sometimes", short_side_px="native")
    with pytest.raises(BrixelError, match="no amount"):
        tiny.extract(np.zeros((64, 64, 3), np.uint8), memory_limit="much")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("job", "strategy"), JOBS)
def test_the_peak_on_cuda_is_near_the_prediction(tiny, job, strategy, dtype):
    """Allocated at most, less what was allocated before; kernels' own workspaces come on top of tensors."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = copy_with(tiny, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))
    run_job(model, strategy, [torch.randn(3, *job.padded_hw) for _ in range(job.batch)], None)  # libraries start
    torch.cuda.reset_peak_memory_stats()
    run_job(model, strategy, [torch.randn(3, *job.padded_hw) for _ in range(job.batch)], None)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * predict_peak(model, strategy, job) + 64 * MIB
