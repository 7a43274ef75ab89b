"""A limit of memory: predictions against what is counted, plans, refusals, and memory that runs out anyway."""

import dataclasses
import itertools
import json
import logging
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError, BrixelFeatures, FeatureMap, MemoryLimitError
from brixel.backbones.vit import ViT
from brixel.cli.app import main
from brixel.evaluate.cost.timing import random_student
from brixel.inference.memory import limited_forward as bounded_module
from brixel.inference.memory import planner as memory_plan
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes, weights_and_buffers
from brixel.inference.memory.limited_forward import MemoryLimitedForward, check_host, is_out_of_memory
from brixel.inference.memory.planner import Job, choose_way, predict_peak, run_job, surely_fits, ways_by_cost
from brixel.inference.memory.strategies import Way, new_results, smaller
from brixel.utils.memory import format_bytes, free_bytes, parse_bytes

MIB = 2**20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    """The bundled model with four of its twelve blocks, as a prediction takes its time block by block."""
    bundled = BrixelFeatures.from_pretrained(device="cpu")
    adapter = dataclasses.replace(bundled.config.adapter, blocks=(0, 1, 2, 3))
    vit = dataclasses.replace(bundled.config.backbone.vit, depth=4)
    config = dataclasses.replace(
        bundled.config, adapter=adapter, backbone=dataclasses.replace(bundled.config.backbone, vit=vit)
    )
    backbone, state = ViT(vit), bundled.backbone.state_dict()
    backbone.load_state_dict({name: state[name] for name in backbone.state_dict()})
    return BrixelFeatures(backbone, bundled.upsampler, config).eval()


@pytest.fixture(scope="module")
def foreign_patch(backbone_folder):
    """Patch 14, a fresh adapter with its blend."""
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu")


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("given", "expected"),
    [(7, 7), ("4GiB", 4 * 2**30), ("500 MiB", 500 * MIB), ("1.5 gb", 1_500_000_000), (" 12 ", 12), ("2KiB", 2048)],
)
def test_amounts_of_memory(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "", "GiB", "4 Gi", "four", "-1GiB", "0MiB", None])
def test_what_is_no_amount_is_refused(given):
    with pytest.raises(BrixelError, match="no amount of memory; expected bytes above zero or text such as '4GiB'"):
        parse_bytes(given)


def test_amounts_as_text():
    assert [format_bytes(each) for each in (1, MIB, 1000 * MIB, 2**30, 5 * 2**28)] == [
        "1 MiB",
        "1 MiB",
        "1000 MiB",
        "1.00 GiB",
        "1.25 GiB",
    ]


@pytest.mark.parametrize("need", [1, MIB - 1, MIB, MIB + 1, 2**30 - 1, 2**30 + 1, 1_960_000_000, 5 * 2**28 + 1])
def test_what_is_needed_is_told_as_a_limit_that_is_enough(need):
    assert parse_bytes(format_bytes(need)) >= need
    assert format_bytes(need - 1, up=False) != format_bytes(need)  # "needs 1.83 GiB, and the limit is 1.83 GiB"
    assert format_bytes(1_960_000_000, up=False) == "1.82 GiB"
    assert format_bytes(parse_bytes("1.83GiB"), up=False) == "1.83 GiB"


def test_what_is_free_is_known_here():
    free = free_bytes(CPU)
    assert free is None or 0 <= free < 2**50


# ---------------------------------------------------------------- counting


def test_live_bytes_are_counted_while_they_live():
    held = torch.ones(1000)
    with AllocationTracker("cpu") as counter:
        counter.track([held, held[:10]])
        assert counter.live == 4000
        made = held * 2
        view = made[5:]
        assert counter.live == 8000
        del made
        assert counter.live == 8000  # the view holds it
        del view
        assert (counter.live, counter.peak) == (4000, 8000)
        room = torch.empty(50)
        counter.leave_out([torch.empty(0), room])
    del held
    assert counter.peak == 8000


def test_what_is_left_out_stays_out_when_it_is_looked_at():
    room = torch.zeros(100)
    with AllocationTracker("cpu") as counter:
        counter.leave_out([room])
        room[:10].fill_(1)
    assert counter.peak == 0


def test_a_copy_shares_or_changes_weights_and_leaves_the_model_alone(tiny):
    twin = copy_with(tiny, lambda each: each.double())
    assert {each.dtype for each in twin.parameters()} == {torch.float64}
    assert {each.dtype for each in tiny.parameters()} == {torch.float32}
    assert storage_bytes(twin) > storage_bytes(tiny) > 0


JOBS = [
    (Job(1, (64, 64)), Way("whole")),
    (Job(3, (64, 96)), Way("whole", batch=3)),
    (Job(3, (64, 96)), Way("whole", batch=2)),
    (Job(1, (160, 96), to_file=True), Way("whole")),
    (Job(1, (160, 96)), Way("pieces", rows=3)),
    (Job(2, (160, 96)), Way("pieces", rows=1)),
    (Job(1, (256, 224), to_file=True), Way("pieces", rows=2)),
    (Job(1, (256, 224)), Way("tiles", side=8)),
    (Job(2, (256, 224), to_file=True), Way("tiles", side=12)),
]


def counted_peak(model, way, job, device=CPU):
    images = [torch.randn(3, *job.padded_hw) for _ in range(job.batch)]
    rooms = new_results(model, torch.stack(images)) if job.to_file else None
    with AllocationTracker(device.type) as counter:
        counter.track(weights_and_buffers(model))
        counter.track(images)
        counter.leave_out(rooms or [])
        run_job(model, way, images, rooms)
    return counter.peak


# a batch in parts, pieces, tiles: these in every run, the other pairs where slow ones run
OFTEN = [(JOBS[2], torch.float32), (JOBS[6], torch.bfloat16), (JOBS[7], torch.float32)]


@pytest.mark.parametrize(
    ("job", "way", "dtype"),
    [
        pytest.param(*pair[0], pair[1], marks=[] if pair in OFTEN else pytest.mark.slow)
        for pair in itertools.product(JOBS, (torch.float32, torch.bfloat16))
    ],
)
def test_the_predicted_peak_is_what_is_counted(tiny, job, way, dtype):
    model = copy_with(tiny, lambda each: each.to(dtype) if each.is_floating_point() else each.clone())
    predicted = predict_peak(model, way, job)
    assert 0.9 * predicted <= counted_peak(model, way, job) <= predicted


@pytest.mark.parametrize(
    "way", [Way("whole"), Way("pieces", rows=2), pytest.param(Way("tiles", side=8), marks=pytest.mark.slow)]
)
def test_the_prediction_holds_for_patches_of_14_and_a_blend(foreign_patch, way):
    job = Job(1, (12 * 14, 11 * 14))
    predicted = predict_peak(foreign_patch, way, job)
    assert 0.9 * predicted <= counted_peak(foreign_patch, way, job) <= predicted


@pytest.mark.slow
def test_the_bound_that_spares_a_prediction_is_above_it(tiny, foreign_patch):
    for model, side, batch in itertools.product((tiny, foreign_patch), (4, 16, 40), (1, 4)):
        job = Job(batch, (side * model.patch_px, side * model.patch_px))
        predicted = predict_peak(model, Way("whole", batch=batch), job)
        spare = predicted - storage_bytes(model)
        assert not surely_fits(model, job, spare)
        assert surely_fits(model, job, 100 * spare)


def test_a_generous_limit_spares_a_prediction_and_the_plan_still_tells_one(tiny, monkeypatch):
    job, limit = Job(2, (64, 64)), storage_bytes(tiny) + 400 * MIB
    predicted = predict_peak(tiny, Way("whole", batch=2), job)
    assert tiny.plan((64, 64), batch=2, memory_limit=limit).peak_bytes == predicted
    monkeypatch.setattr(bounded_module, "predict_peak", None)
    monkeypatch.setattr(bounded_module, "choose_way", None)
    run = MemoryLimitedForward(tiny, limit=limit, batch=2)
    run.check((64, 64))
    assert run.together((64, 64)) == 2
    assert run.room() >= (limit - storage_bytes(tiny)) // 2
    assert len(run(torch.zeros(2, 3, 64, 64))) == 2


def test_a_small_image_takes_no_more_than_the_bound(tiny, foreign_patch):
    """What does not depend on the size is most of it."""
    for model, batch in itertools.product((tiny, foreign_patch), (1, 3)):
        job = Job(batch, (model.patch_px, model.patch_px))
        peak = predict_peak(model, Way("whole", batch=batch), job)
        assert not surely_fits(model, job, peak - storage_bytes(model))


def test_maps_that_do_not_fit_are_refused_without_looking_for_a_way(tiny, monkeypatch):
    asked = []

    def counting(student, way, job, device=None):
        asked.append(job.batch)
        return predict_peak(student, way, job, device)

    monkeypatch.setattr(memory_plan, "predict_peak", counting)
    with pytest.raises(MemoryLimitError, match="8 images of 96x96 .* need"):
        choose_way(tiny, Job(8, (96, 96)), storage_bytes(tiny) + 3 * MIB, "never")
    assert len(asked) <= 2 + 3  # the least of each kind, and a few sizes


def test_a_pass_beyond_what_kernels_count_is_never_sure_nor_whole(tiny):
    job = Job(1, (2**15, 2**16))
    assert not surely_fits(tiny, job, 2**60)
    assert [ways[0].kind for ways in ways_by_cost(tiny, job, "auto")] == ["pieces", "tiles"]
    batches = [each.batch for each in ways_by_cost(tiny, Job(4096, (512, 512)), "auto")[0]]
    assert max(batches) < 4096


# ---------------------------------------------------------------- plans


@pytest.mark.slow
def test_less_memory_means_another_way_and_every_plan_keeps_its_limit(tiny):
    job = Job(4, (384, 320), to_file=True)
    most = predict_peak(tiny, Way("whole", batch=4), job)
    seen = []
    for limit in np.geomspace(most, predict_peak(tiny, Way("tiles", side=8), job), 12).astype(int):
        way = choose_way(tiny, job, int(limit), "auto")
        assert predict_peak(tiny, way, job) <= limit
        if way.kind not in seen:
            seen.append(way.kind)
    assert seen == ["whole", "pieces", "tiles"]


def test_a_plan_is_data(tiny):
    plan = tiny.plan((90, 60), memory_limit="60MiB")
    assert (plan.device, plan.dtype, plan.batch, plan.padded_hw) == ("cpu", "float32", 1, (96, 64))
    assert plan.peak_bytes <= plan.limit_bytes == 60 * MIB
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.way = "whole"
    always = tiny.plan((600, 300), tiles="always", memory_limit="4GiB")
    assert (always.way, always.tiles, always.tile_px, always.overlap_px) == ("tiles", 2, (512, 304), 128)
    assert tiny.plan((90, 60), tiles="always", memory_limit="4GiB").way == "whole"
    assert tiny.plan((3000, 2000), short_side_px=64).padded_hw == (96, 64)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["auto", "never", "always"])
def test_what_fits_nowhere_is_refused_with_what_would_fit(tiny, tiles):
    with pytest.raises(MemoryLimitError) as raised:
        tiny.plan((768, 384), memory_limit="13MiB", tiles=tiles)
    assert isinstance(raised.value, BrixelError)
    assert isinstance(raised.value, MemoryError)
    text = str(raised.value)
    assert "768x384 pixels (height x width) needs" in text
    assert "the limit is 13 MiB" in text
    height, width = map(int, text.split("fits has ")[1].split(";")[0].split("x"))
    assert height >= width > 0
    assert tiny.plan((height, width), memory_limit="13MiB", tiles=tiles).peak_bytes <= 13 * MIB
    assert ("allow tiles" in text) == (tiles == "never")


def test_a_limit_below_the_weights_fits_nothing(tiny):
    with pytest.raises(MemoryLimitError, match="no image fits"):
        tiny.plan((16, 16), memory_limit="1MiB")


def test_arguments_are_checked(tiny):
    with pytest.raises(BrixelError, match="tiles is 'sometimes'; expected 'auto'"):
        tiny.plan((64, 64), tiles="sometimes")
    with pytest.raises(BrixelError, match="no amount"):
        tiny.extract(np.zeros((64, 64, 3), np.uint8), memory_limit="much")


def test_the_computer_s_own_memory_bounds_pixels(monkeypatch):
    check_host((64, 64))
    monkeypatch.setattr(bounded_module, "free_bytes", lambda _: 1000)
    with pytest.raises(MemoryLimitError, match="64x64 pixels .* and the computer has 0 MiB free"):
        check_host((64, 64))


# ---------------------------------------------------------------- maps within a limit


@pytest.fixture(scope="module")
def waves():
    y, x = np.mgrid[:130, :260]
    colours = np.stack([x * 0.9, y * 1.9, 128 + 100 * np.sin(x / 7) * np.cos(y / 5)], axis=-1).clip(0, 255)
    return colours.astype(np.uint8)


@pytest.mark.slow
def test_a_map_in_pieces_is_the_map(tiny, waves):
    whole = tiny.extract(waves, short_side_px="native")
    limit = predict_peak(tiny, Way("pieces", rows=1), Job(1, (144, 272)))
    bounded = tiny.extract(waves, short_side_px="native", memory_limit=limit, tiles="never")
    assert tiny.plan((130, 260), memory_limit=limit, tiles="never").way == "pieces"
    torch.testing.assert_close(bounded.features, whole.features, rtol=1e-5, atol=1e-5)
    assert (bounded.meta, bounded.image_hw, bounded.stride) == (whole.meta, whole.image_hw, whole.stride)
    assert bounded.features.is_contiguous()


@pytest.mark.parametrize(
    ("mib", "way"),
    [(18, "whole"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((17.2, "pieces"), (16, "tiles")))],
)
def test_the_limit_holds_while_a_map_is_made(tiny, waves, mib, way):
    """From prepared pixels on, counted from outside; the image itself is small beside them."""
    limit = int(mib * MIB)
    assert tiny.plan(waves.shape[:2], memory_limit=limit).way == way  # predicted by now, and not counted
    with AllocationTracker("cpu") as counter:
        counter.track(weights_and_buffers(tiny))
        tiny.extract(waves, short_side_px="native", memory_limit=limit)
    assert counter.peak <= limit + waves.nbytes


def test_tiles_are_said_once_and_recorded(tiny, waves, caplog):
    with caplog.at_level(logging.WARNING, "brixel"):
        maps = list(tiny.stream([waves, waves, waves[:64]], short_side_px="native", tiles="always", batch_size=2))
    assert [record.message for record in caplog.records if "tiles" in record.message] == [caplog.records[0].message]
    assert "an approximation" in caplog.records[0].message
    note = maps[0].meta["tiles"]
    assert note == maps[1].meta["tiles"]
    assert note.endswith("px, overlapping by 64 px or more")
    whole = tiny.extract(waves, short_side_px="native").features
    assert 0 < (maps[0].features - whole).norm() < 0.7 * whole.norm()


def test_a_map_goes_to_a_file_as_it_is_made(tiny, waves, tmp_path):
    whole = tiny.extract(waves, short_side_px="native")
    path = tmp_path / "map.npy"
    for limit in (None, int(17.2 * MIB)):
        made = tiny.extract(waves, short_side_px="native", out=path, memory_limit=limit, tiles="never")
        torch.testing.assert_close(made.features, whole.features, rtol=1e-5, atol=1e-5)
        loaded = FeatureMap.load(path)
        assert torch.equal(loaded.features, made.features)
        assert (loaded.meta, loaded.image_hw, loaded.stride) == (whole.meta, whole.image_hw, whole.stride)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["map.npy", "map.npy.json"]
    assert "tiles" in tiny.extract(waves, short_side_px="native", out=path, tiles="always").meta


def test_a_map_in_half_precision_goes_to_a_file_as_float32(waves, tmp_path):
    half = BrixelFeatures.from_pretrained(device="cpu", dtype="bfloat16")
    made = half.extract(waves, short_side_px=64, out=tmp_path / "map.npy")
    assert made.features.dtype == torch.float32
    assert torch.equal(made.features, half.extract(waves, short_side_px=64).features.float())


@pytest.mark.parametrize(("name", "message"), [("map.safetensors", "to \\*.npy alone"), ("no/map.npy", "not exist")])
def test_where_a_map_cannot_be_made(tiny, waves, tmp_path, name, message):
    with pytest.raises(BrixelError, match=message):
        tiny.extract(waves, out=tmp_path / name)


def test_a_map_that_fails_leaves_the_file_before_it(tiny, waves, tmp_path, monkeypatch):
    path = tmp_path / "map.npy"
    before = tiny.extract(waves[:64, :64], short_side_px="native", out=path)
    monkeypatch.setattr(MemoryLimitedForward, "fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.extract(waves, out=path)
    assert FeatureMap.load(path).image_hw == before.image_hw
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- memory runs out anyway


def failing(monkeypatch, fails, error):
    """`maps_of` and `run_way` raise where ``fails`` says so of a way; the ways that were tried, in order."""
    tried = []
    for name in ("maps_of", "run_way"):
        genuine = getattr(bounded_module, name)

        def run(student, way, *rest, genuine=genuine):
            tried.append(way)
            if fails(way):
                made = torch.ones(1000) if len(rest) == 1 else rest[1][0].fill_(torch.nan)
                assert made is not None
                raise error
            return genuine(student, way, *rest)

        monkeypatch.setattr(bounded_module, name, run)
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


def test_the_batch_then_the_piece_is_halved_and_remembered(tiny, waves, monkeypatch):
    expected = tiny.extract(waves[:64, :96], short_side_px="native").features
    tried = failing(monkeypatch, lambda way: way.kind == "whole" or way.rows > 1, ERRORS[1])
    maps = list(tiny.stream([waves[:64, :96]] * 9, batch_size=4, short_side_px="native"))
    assert [(way.kind, way.batch, way.rows) for way in tried] == [
        ("whole", 4, 0),
        ("whole", 2, 0),
        ("whole", 1, 0),
        ("pieces", 1, 2),
        *[("pieces", 1, 1)] * 2,  # the first batch, and the second at once
        ("pieces", 1, 1),  # and the last, of another size
    ]
    assert len(maps) == 9
    for each in maps:
        torch.testing.assert_close(each.features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tiles_come_after_pieces_where_they_are_allowed(tiny, waves, monkeypatch):
    tried = failing(monkeypatch, lambda way: way.kind != "tiles" or way.side > 8, ERRORS[0])
    assert "of 128x128 px" in tiny.extract(waves, short_side_px="native").meta["tiles"]
    assert [way.side for way in tried if way.kind == "tiles"] == [16, 8]
    with pytest.raises(MemoryLimitError, match="memory ran out for an image of 144x272 pixels"):
        tiny.extract(waves, short_side_px="native", tiles="never")


def test_a_file_never_holds_a_partly_filled_map(tiny, waves, monkeypatch, tmp_path):
    whole = tiny.extract(waves, short_side_px="native").features
    failing(monkeypatch, lambda way: way.kind == "whole" or way.rows > 2, ERRORS[0])
    made = tiny.extract(waves, short_side_px="native", out=tmp_path / "map.npy")
    torch.testing.assert_close(made.features, whole, rtol=1e-5, atol=1e-5)
    failing(monkeypatch, lambda way: True, ERRORS[0])
    with pytest.raises(MemoryLimitError):
        tiny.extract(waves[:32, :48], short_side_px="native", out=tmp_path / "other.npy")
    assert not (tmp_path / "other.npy").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, waves, monkeypatch):
    error = RuntimeError("the size of tensor a must match")
    assert not is_out_of_memory(error)
    tried = failing(monkeypatch, lambda way: True, error)
    with pytest.raises(RuntimeError, match="must match"):
        tiny.extract(waves)
    assert len(tried) == 1


def test_what_a_failed_attempt_held_is_free_before_the_next(tiny, waves, monkeypatch):
    genuine, held, freed = bounded_module.maps_of, [], []

    def run(student, way, pixels):
        if not held:
            big = torch.ones(1000)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")
        freed.append(held[0]() is None)
        return genuine(student, way, pixels)

    monkeypatch.setattr(bounded_module, "maps_of", run)
    tiny.extract(waves, short_side_px=64)
    assert freed == [True]


def test_smaller_ways_end_with_the_smallest_tile():
    way, kinds = Way("whole", batch=5), []
    while way is not None:
        kinds.append((way.kind, way.batch, way.rows, way.side))
        way = smaller(way, (20, 40), tiles=True)
    assert kinds == [
        ("whole", 5, 0, 0),
        ("whole", 2, 0, 0),
        ("whole", 1, 0, 0),
        *[("pieces", 1, rows, 0) for rows in (10, 5, 2, 1)],
        *[("tiles", 1, 0, side) for side in (32, 16, 8)],
    ]
    assert smaller(Way("pieces", rows=1), (20, 40), tiles=False) is None


# ---------------------------------------------------------------- on the command line


@pytest.mark.slow
@pytest.mark.slow
def test_extract_and_show_take_a_limit(waves, tmp_path, caplog):
    Image.fromarray(waves).save(tmp_path / "waves.png")
    limited = ["--short-side-px", "native", "--tiles", "always", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "waves.png"), "-o", str(tmp_path / "out"), *limited]) == 0
    made = FeatureMap.load(tmp_path / "out" / "waves.png.safetensors")
    assert "tiles" in made.meta
    tight = ["--memory-limit", "4MiB", "--device", "cpu"]
    assert main(["extract", str(tmp_path / "waves.png"), "-o", str(tmp_path / "none"), *tight]) == 1
    assert "the limit is 4 MiB" in caplog.text
    assert main(["show", str(tmp_path / "waves.png"), "-o", str(tmp_path / "panel.png"), *tight]) == 2


@pytest.mark.parametrize(
    ("architecture", "published_mib"),
    [
        ("dinov3-vits16", 181),
        pytest.param("dinov3-vitb16", 542, marks=pytest.mark.slow),
        pytest.param("dinov3-vitl16", 1434, marks=pytest.mark.slow),
        ("dinov3-vith16plus", 3672),
    ],
)
def test_a_256_px_image_takes_far_less_than_the_release_published(architecture, published_mib):
    """Its figures are of mixed precision on a GPU; ours of bfloat16 throughout, weights included."""
    with torch.device("meta"):
        student = random_student(architecture).to(torch.bfloat16)
    assert predict_peak(student, Way("whole"), Job(1, (256, 256)), CPU) < 0.5 * published_mib * MIB


# ---------------------------------------------------------------- the same on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("job", "way"), JOBS)
def test_the_peak_on_cuda_is_near_the_prediction(tiny, job, way, dtype):
    """Allocated at most, less what lay there; kernels' own workspaces come on top of tensors."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = copy_with(tiny, lambda each: each.to(device, dtype if each.is_floating_point() else None))
    run_job(model, way, [torch.randn(3, *job.padded_hw) for _ in range(job.batch)], None)  # libraries start
    torch.cuda.reset_peak_memory_stats()
    run_job(model, way, [torch.randn(3, *job.padded_hw) for _ in range(job.batch)], None)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * predict_peak(model, way, job) + 64 * MIB


@pytest.mark.gpu
def test_a_real_lack_of_memory_on_cuda_ends_in_a_map(tiny, waves):
    waves = np.tile(waves, (2, 2, 1))[:250, :330]  # as large as the limit below was chosen for
    expected = tiny.extract(waves, short_side_px="native").features
    model = copy_with(tiny, lambda each: each.cuda())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 40 * MIB) / total)
        found = model.extract(waves, short_side_px="native", memory_limit="4GiB", tiles="never").features
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_what_does_not_fit_on_cuda_is_computed_on_the_cpu_with_one_warning(tiny, waves, caplog):
    model = copy_with(tiny, lambda each: each.cuda())
    with caplog.at_level(logging.WARNING, "brixel"):
        (first, second) = model.stream([waves, waves], memory_limit="4MiB")
    assert len([record for record in caplog.records if "the CPU computes" in record.message]) == 1
    torch.testing.assert_close(first.features, tiny.extract(waves).features, rtol=1e-4, atol=1e-4)
    assert json.loads(json.dumps(dict(second.meta))) == dict(first.meta)
