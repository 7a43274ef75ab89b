import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from brixel import BrixelError
from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD
from brixel.images.crops import CropSettings, check_teacher_px, student_view, teacher_crop
from brixel.train.data import (
    CropDataset,
    CropSources,
    MicroBatchSampler,
    collate,
    find_training_images,
    shuffled_index,
)

T = 32


def noise(height_px, width_px, seed=0, grain_px=4):
    """Noise that is smooth enough to be an image: (3, H, W) uint8."""
    coarse = torch.rand(1, 3, height_px // grain_px, width_px // grain_px, generator=generator(seed))
    return F.interpolate(coarse, (height_px, width_px), mode="bilinear")[0].mul(255).round().to(torch.uint8)


def ramp(height_px, width_px):
    """Pixels hold their position: red the column, green the row, over 256."""
    y, x = torch.meshgrid(torch.arange(height_px), torch.arange(width_px), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).float() / 256


def save(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(path)
    return path


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def crops_of(rgb, settings, number=40):
    return [teacher_crop(rgb, settings, generator(seed)) for seed in range(number)]


def region_of(crop):
    """Side and origin in source pixels, and whether it is mirrored, read from a crop of a ramp."""
    red, green = crop[0] * 256, crop[1] * 256
    inner = slice(T // 4, -T // 4)
    step_x = (red[:, inner].diff(dim=1)).mean().item()
    step_y = (green[inner].diff(dim=0)).mean().item()
    assert abs(abs(step_x) - step_y) < 0.02, "aspect"
    middle_x, middle_y = red[:, T // 2 - 1 : T // 2 + 1].mean().item(), green[T // 2 - 1 : T // 2 + 1].mean().item()
    side = step_y * T
    return side, middle_y + 0.5 - side / 2, middle_x + 0.5 - side / 2, step_x < 0


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Seven usable images of various sizes and formats, two folders deep."""
    folder = tmp_path_factory.mktemp("album")
    sizes = [(40, 60), (60, 40), (33, 33), (48, 36), (36, 80), (90, 45), (64, 64)]
    for number, (height_px, width_px) in enumerate(sizes):
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        save(folder / ("deep/er" if number > 4 else "") / name, noise(height_px, width_px, number))
    return folder


def dataset_of(folder, **settings):
    images = find_training_images([folder])
    return CropDataset(images, CropSettings(T, **settings), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def spoil(folder):
    """Write files with the names of images that are none."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    whole = save(folder / "whole.png", noise(48, 48)).read_bytes()
    (folder / "whole.png").unlink()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return {"cut.png", "empty.png", "text.jpg"}


# ---------------------------------------------------------------- finding images


def test_folders_are_searched_in_order_and_images_are_not_repeated(album, tmp_path):
    for name in ("b/1.png", "a.PNG", ".hidden.png", ".cache/2.png", "b/.cache/3.png"):
        save(tmp_path / name, noise(8, 8))
    (tmp_path / "notes.txt").write_text("no")
    other = [tmp_path / "a.PNG", tmp_path / "b" / "1.png"]
    assert find_training_images([tmp_path]) == other
    names = [f"{number}.{'jpg' if number % 2 else 'png'}" for number in range(5)] + ["deep/er/5.jpg", "deep/er/6.png"]
    assert find_training_images([album]) == [album / name for name in names]
    assert find_training_images([tmp_path, album]) == other + [album / name for name in names]
    assert find_training_images([tmp_path / "b", tmp_path, tmp_path]) == other[::-1]


def test_wrong_folders_say_so(tmp_path):
    save(tmp_path / ".hidden" / "a.png", noise(8, 8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrixelError, match="nowhere is missing; expected a folder"):
        find_training_images([tmp_path / "nowhere"])
    with pytest.raises(BrixelError, match=r"a\.png is a file; expected a folder"):
        find_training_images([tmp_path / ".hidden" / "a.png"])
    with pytest.raises(BrixelError, match=r"no images in .*empty; looked for .*\.jpg.*\.png"):
        find_training_images([tmp_path / "empty"])
    with pytest.raises(BrixelError, match=r"no images in .*; looked for .*\.jpg.*\.png"):
        find_training_images([tmp_path])
    with pytest.raises(BrixelError, match="no training images"):
        CropDataset(find_training_images([]), CropSettings(T), mean=IMAGENET_MEAN, std=IMAGENET_STD)


# ---------------------------------------------------------------- settings


def test_a_wrong_teacher_size_names_the_nearest_right_ones():
    check_teacher_px(448, 14)
    check_teacher_px(1024, 16)
    with pytest.raises(BrixelError, match="teacher_px is 1000; expected a multiple of 64, 4 x 16: take 960 or 1024"):
        check_teacher_px(1000, 16)
    with pytest.raises(BrixelError, match="teacher_px is 40; expected a multiple of 56, 4 x 14: take 56$"):
        check_teacher_px(40, 14)
    for wrong in (0, -64, 64.0, True, None):
        with pytest.raises(BrixelError, match="expected a whole number of pixels, such as 1024"):
            check_teacher_px(wrong, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"teacher_px": 30}, "multiple of 4.*take 28 or 32"),
        ({"max_zoom": 0.9}, "max_zoom is 0.9; expected a number from 1 up"),
        ({"max_zoom": float("nan")}, "max_zoom is nan"),
        ({"small": "drop"}, "small is 'drop'; expected 'upsample' or 'skip'"),
    ],
)
def test_wrong_settings_say_so(wrong, message):
    with pytest.raises(BrixelError, match=message):
        CropSettings(**{"teacher_px": T, **wrong})


def test_settings_are_json():
    settings = CropSettings(T, max_zoom=1.5)
    assert CropSettings(**json.loads(json.dumps(asdict(settings)))) == settings


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("image_hw", [(61, 90), (90, 61), (32, 47), (32, 32), (20, 31), (7, 300), (1, 1)])
def test_centre_crop_is_what_pillow_gives(image_hw):
    rgb = torch.randint(0, 256, (3, *image_hw), generator=generator(), dtype=torch.uint8)
    crop = teacher_crop(rgb, CropSettings(T, max_zoom=3, random=False), generator())
    height, width = image_hw
    side = min(image_hw)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    for ours, channel in zip(crop, rgb, strict=True):
        region = Image.fromarray(channel[top : top + side, left : left + side].numpy().astype(np.float32) / 255)
        twin = np.asarray(region.resize((T, T), Image.Resampling.BICUBIC)).clip(0, 1)
        np.testing.assert_allclose(ours.numpy(), twin, atol=1e-5)
    assert crop.dtype == torch.float32
    assert crop.is_contiguous()


def test_the_crop_is_close_to_a_crop_of_the_resized_image():
    """Cropping before resizing shifts the image by less than a pixel, which a smooth image hardly shows."""
    rgb = noise(120, 203, grain_px=24)
    crop = teacher_crop(rgb, CropSettings(T, random=False), generator())
    whole = F.interpolate(rgb[None].float() / 255, (T, 54), mode="bicubic", antialias=True)[0]  # 54.1
    assert (crop - whole[:, :, 11 : 11 + T]).abs().mean() < 0.01
    assert (crop - whole[:, :, 8 : 8 + T]).abs().mean() > 0.02, "the bound distinguishes crops"


def test_random_crops_lie_within_the_image_and_cover_it():
    height, width = 48, 96
    regions = [region_of(crop) for crop in crops_of(ramp(height, width), CropSettings(T, max_zoom=1.4))]
    sides, tops, lefts, mirrored = (np.array(values) for values in zip(*regions, strict=True))
    assert sides.min() >= 48 / 1.4 - 0.6
    assert sides.max() <= 48 + 0.1
    assert sides.max() - sides.min() > 8
    assert min(tops.min(), lefts.min()) > -0.2
    assert (tops + sides).max() < height + 0.2
    assert (lefts + sides).max() < width + 0.2
    assert lefts.max() - lefts.min() > 30
    assert tops.max() > 3
    assert 10 <= mirrored.sum() <= 30


def test_without_zoom_the_short_side_is_covered():
    sides = [region_of(crop)[0] for crop in crops_of(ramp(48, 96), CropSettings(T), 10)]
    np.testing.assert_allclose(sides, 48, atol=0.2)


def test_zoom_stops_at_the_images_own_size():
    rgb = noise(40, 60)
    settings = CropSettings(T, max_zoom=9, flip=False)
    unscaled_crops = {
        crop.numpy().tobytes()
        for crop in (rgb / 255).unfold(1, T, 1).unfold(2, T, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, T, T)
    }
    unscaled = sum(crop.numpy().tobytes() in unscaled_crops for crop in crops_of(rgb, settings))
    assert unscaled > 30, "most crops are the image's own pixels"


def test_small_images_are_upsampled_whole_and_never_zoomed():
    for crop in crops_of(ramp(20, 24), CropSettings(T, max_zoom=4), 10):
        side, top, left, _ = region_of(crop)
        assert side == pytest.approx(20, abs=0.3)
        assert top == pytest.approx(0, abs=0.3)
        assert -0.3 < left < 4.3


def test_flip_mirrors_half_and_changes_nothing_else():
    rgb = noise(48, 64)
    flipped = crops_of(rgb, CropSettings(T, max_zoom=1.3))
    plain = crops_of(rgb, CropSettings(T, max_zoom=1.3, flip=False))
    same = [torch.equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 10 <= sum(mirrored) <= 30


def test_floats_and_bytes_give_the_same():
    rgb = noise(48, 64)
    settings = CropSettings(T, max_zoom=1.5)
    assert torch.equal(teacher_crop(rgb, settings, generator()), teacher_crop(rgb.float() / 255, settings, generator()))


def test_the_image_itself_is_left_alone():
    rgb = torch.rand(3, T, T, generator=generator())
    before = rgb.clone()
    teacher_crop(rgb, CropSettings(T, random=False), generator()).zero_()
    assert torch.equal(rgb, before)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_student_view_is_the_antialiased_quarter(leading):
    blocks = torch.rand(
        *leading, 3, 4, 4, generator=generator()
    ).round()  # with hard edges, bicubic interpolation overshoots
    crop = blocks.repeat_interleave(T // 4, -1).repeat_interleave(T // 4, -2)
    twin = F.interpolate(crop.reshape(-1, 3, T, T), scale_factor=0.25, mode="bicubic", antialias=True)
    assert twin.min() < 0
    view = student_view(crop)
    assert view.shape == (*leading, 3, T // 4, T // 4)
    torch.testing.assert_close(view, twin.clamp(0, 1).reshape(view.shape), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the data set


def assert_same(one, other):
    assert one.image == other.image
    assert one.skipped == other.skipped
    assert torch.equal(one.teacher, other.teacher)
    assert torch.equal(one.student, other.student)


def test_items_are_normalised_crop_and_its_quarter(album):
    dataset = dataset_of(album)
    crop = dataset[3]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = crop.teacher * std + mean
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    assert crop.teacher.shape == (3, T, T)
    torch.testing.assert_close(crop.student, (student_view(pixels) - mean) / std, rtol=0, atol=1e-5)
    assert crop.image == str(dataset.images[shuffled_index(3, 7, 0)])
    assert crop.skipped == ()


def test_an_item_depends_on_seed_and_position_alone(album):
    dataset = dataset_of(album, max_zoom=1.5)
    positions = [0, 5, 13, 14, 700, 10**12]
    first = {position: dataset[position] for position in positions}
    torch.rand(5)  # the global generator has no effect
    again = dataset_of(album, max_zoom=1.5)
    for position in reversed(positions):
        assert_same(again[position], first[position])
    other = dataset_of(album, max_zoom=1.5, seed=1)
    assert any(not torch.equal(other[position].teacher, first[position].teacher) for position in positions)


def test_the_global_random_state_is_left_alone(album):
    before = torch.get_rng_state()
    dataset_of(album)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_shuffles_all_images(album):
    dataset = dataset_of(album)
    epochs = [[dataset[epoch * 7 + index].image for index in range(7)] for epoch in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(map(str, dataset.images))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [shuffled_index(position, 1, 0) for position in range(3)] == [0, 0, 0]


def test_an_image_is_cropped_differently_in_other_epochs(tmp_path):
    save(tmp_path / "one.png", noise(48, 96))
    dataset = dataset_of(tmp_path)
    assert len({dataset[position].teacher.numpy().tobytes() for position in range(6)}) > 4


def test_validation_uses_the_same_centre_crops_in_every_epoch(tmp_path):
    rgb = noise(48, 96)
    save(tmp_path / "one.png", rgb)
    dataset = dataset_of(tmp_path, max_zoom=2, random=False)
    expected = teacher_crop(rgb[:, :, 24:72], CropSettings(T, flip=False), generator())
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for position in range(5):
        torch.testing.assert_close(dataset[position].teacher, (expected - mean) / std)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_workers_and_restarts_read_the_same(album, tmp_path, batch_size):
    for path in find_training_images([album]):
        save(tmp_path / path.name, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
    bad = spoil(tmp_path)
    dataset = dataset_of(tmp_path, max_zoom=1.5)

    def read(workers, start_step, steps):
        sampler = MicroBatchSampler([batch_size], start=start_step, stop=start_step + steps)
        sources = CropSources([dataset])
        return list(DataLoader(sources, batch_sampler=sampler, num_workers=workers, collate_fn=collate))

    whole = read(0, 0, 6)
    restarted = read(2 if batch_size > 1 else 0, 0, 2) + read(0, 2, 4)
    for one, other in zip(whole, restarted, strict=True):
        assert torch.equal(one.teacher, other.teacher)
        assert torch.equal(one.student, other.student)
        assert (one.images, one.skipped) == (other.images, other.skipped)
    assert whole[0].teacher.shape == (batch_size, 3, T, T)
    assert len(whole[0].images) == batch_size
    if batch_size > 1:
        assert {name.rpartition("/")[2] for batch in whole for name in batch.skipped} == bad


def test_unusable_files_are_listed_and_replaced_by_the_next_image(album, tmp_path):
    for path in find_training_images([album])[:3]:
        save(tmp_path / path.name, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
    bad = spoil(tmp_path)
    dataset = dataset_of(tmp_path)
    (tmp_path / "0.png").unlink()  # deleted after it was found
    order = [dataset.images[shuffled_index(position, 6, 0)] for position in range(6)]
    for position in range(6):
        ring = order[position:] + order[:position]
        usable = next(path for path in ring if path.name in ("1.jpg", "2.png"))
        crop = dataset[position]
        assert crop.image == str(usable)
        assert crop.skipped == tuple(str(path) for path in ring[: ring.index(usable)])
    assert {path.rpartition("/")[2] for position in range(6) for path in dataset[position].skipped} == bad | {"0.png"}


def test_small_images_are_skipped_on_request(tmp_path):
    save(tmp_path / "large.png", noise(32, 40))
    save(tmp_path / "low.png", noise(31, 400))
    dataset = dataset_of(tmp_path, small="skip")
    assert {dataset[position].image for position in range(4)} == {str(tmp_path / "large.png")}
    assert {name for position in range(2) for name in dataset[position].skipped} == {str(tmp_path / "low.png")}
    upsampling = dataset_of(tmp_path)
    assert len({upsampling[position].image for position in range(2)}) == 2
    assert upsampling[0].skipped == ()


def test_the_error_without_usable_images_gives_reasons(tmp_path):
    spoil(tmp_path)
    save(tmp_path / "small.png", noise(8, 8))
    (tmp_path / "cut.png").unlink()
    with pytest.raises(BrixelError, match="none of the 3 training images can be used") as caught:
        dataset_of(tmp_path, small="skip")[4]
    for reason in ("is an empty file", "text.jpg: is not an image", "small.png: smaller than teacher_px=32"):
        assert reason in str(caught.value)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_divide_the_same_positions(world_size):
    options = {"start": 5, "stop": 8, "world_size": world_size}
    samplers = [MicroBatchSampler([8 // world_size], **options, rank=rank) for rank in range(world_size)]
    parts = [torch.tensor([[position for _, position in batch] for batch in sampler]) for sampler in samplers]
    assert torch.equal(torch.cat(parts, dim=1), torch.arange(40, 64).reshape(3, 8))
    assert {len(sampler) for sampler in samplers} == {3}


def test_sizes_take_turns_and_each_reads_its_own_positions():
    batches = list(MicroBatchSampler([3, 1], start=0, stop=5))
    assert batches == [[(0, 0), (0, 1), (0, 2)], [(1, 0)], [(0, 3), (0, 4), (0, 5)], [(1, 1)], [(0, 6), (0, 7), (0, 8)]]


def test_a_restarted_sampler_continues_at_its_micro_batch():
    whole = list(MicroBatchSampler([4, 2, 1], start=0, stop=9, rank=1, world_size=3))
    assert whole[4:] == list(MicroBatchSampler([4, 2, 1], start=4, stop=9, rank=1, world_size=3))
    assert list(MicroBatchSampler([6], start=4, stop=4)) == []
