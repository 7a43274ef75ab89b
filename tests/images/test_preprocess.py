"""Preprocessing of images, and the feature maps of a user's own loop: the same as those of `extract`."""

import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from brixel import BrixelError, BrixelFeatures, ImageError, MemoryLimitError
from brixel.images import decode
from brixel.images import preprocess as preprocessing
from brixel.images.patch_grid import plan_patch_grid
from brixel.images.preprocess import ImagePlacement, Preprocessor, resize_normalise_pad

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


class Images(Dataset):
    def __init__(self, paths, prepare):
        self.paths, self.prepare = paths, prepare

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.prepare(self.paths[index])


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_over_a_data_loader(model, image_path, tmp_path, workers):
    with Image.open(image_path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    paths = [image_path, tmp_path / "other.png", image_path]
    loader = DataLoader(Images(paths, model.preparation()), batch_size=3, num_workers=workers, collate_fn=as_it_is)
    maps = []
    for batch in loader:
        with torch.no_grad():
            features = model(torch.stack([pixels for pixels, _ in batch]))
        maps += [placement.feature_map(each) for each, (_, placement) in zip(features, batch, strict=True)]
    for path, ours in zip(paths, maps, strict=True):
        expected = model.extract(path)
        torch.testing.assert_close(ours.features, expected.features, rtol=1e-5, atol=1e-5)
        assert (ours.image_hw, ours.stride, ours.meta) == (expected.image_hw, expected.stride, expected.meta)


def test_one_image(model, image_path):
    pixels, placement = model.prepare(image_path, short_side_px="native")
    assert pixels.shape == (3, 70, 98)
    with torch.no_grad():
        dense, coarse = model(pixels[None])[0], model.backbone_features(pixels[None])[0]
    before = dense.clone()
    ours = placement.feature_map(dense, meta={"by": "me"})
    torch.testing.assert_close(ours.features, model.extract(image_path, short_side_px="native").features)
    assert ours.meta["by"] == "me"
    ours.features.zero_()
    assert torch.equal(dense, before)
    expected = model.extract_backbone(image_path, short_side_px="native").features
    torch.testing.assert_close(placement.feature_map(coarse).features, expected)


def test_what_is_sent_to_workers_is_small(model):
    assert len(pickle.dumps(model.preparation())) < 2000


@pytest.mark.parametrize("shape", [(64, 20, 28), (1, 64, 20, 29), (64, 21, 28), (64, 4, 6), (64,)])
def test_features_of_another_image_are_refused(model, image_path, shape):
    _, placement = model.prepare(image_path, short_side_px="native")
    if shape == (64, 20, 28):
        assert placement.feature_map(torch.zeros(shape)).grid_hw == (18, 26)
        return
    with pytest.raises(BrixelError, match=r"expected \(D, 4h, 4w\) for the 5 x 7 patches of this image"):
        placement.feature_map(torch.zeros(shape))


def test_an_image_that_cannot_be_used(model, tmp_path):
    (tmp_path / "some.png").write_text("no image")
    with pytest.raises(ImageError, match="some.png"):
        model.prepare(tmp_path / "some.png")


@pytest.mark.slow
def test_errors_name_a_line_and_an_image_that_does_not_fit_into_memory(model, image_path, tmp_path):
    Image.new("RGB", (1000, 1)).save(tmp_path / "line.png")
    line, found = model.stream_all([tmp_path / "line.png", image_path])
    assert isinstance(line, ImageError)
    assert str(line).startswith(f"{tmp_path / 'line.png'}: an image of 1x1000 pixels")
    assert found.features.ndim == 3
    with pytest.raises(MemoryLimitError, match=r"line\.png: an image of .* needs"):
        model.extract(tmp_path / "line.png", short_side_px="native", memory_limit="1MiB")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_goes_on_over_what_cannot_be_used(model, image_path, tmp_path, workers):
    (tmp_path / "bad.png").write_text("no image")
    images = [image_path, tmp_path / "bad.png", image_path, tmp_path / "gone.png"]
    results = list(model.stream_all(images, batch_size=2, workers=workers))
    assert [type(each).__name__ for each in results] == ["FeatureMap", "ImageError", "FeatureMap", "MissingFileError"]
    torch.testing.assert_close(results[0].features, results[2].features)
    stream = model.stream(images, workers=workers)
    next(stream)
    with pytest.raises(ImageError, match=r"bad\.png"):
        next(stream)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "lack", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_memory_that_runs_out_while_decoding_is_that_image_s_error(model, image_path, monkeypatch, lack, workers):
    def failing(rgb, *rest):
        if rgb.shape[1:] == (50, 60):
            raise lack
        return resize_normalise_pad(rgb, *rest)

    monkeypatch.setattr(preprocessing, "resize_normalise_pad", failing)
    images = [image_path, np.zeros((50, 60, 3), np.uint8), image_path]
    first, failed, last = model.stream_all(images, batch_size=2, workers=workers)
    assert isinstance(failed, MemoryLimitError)
    assert str(failed).startswith("one image, a ndarray: memory ran out while it was decoded")
    torch.testing.assert_close(first.features, last.features)


def test_other_errors_while_decoding_end_the_run(model, image_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "resize_normalise_pad", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(model.stream_all([image_path]))


@pytest.mark.parametrize("given", [-1, 1.5, True, "2"])
def test_numbers_that_are_none(model, given):
    with pytest.raises(BrixelError, match="workers is .*; expected zero or a positive whole number"):
        model.stream([], workers=given)


def test_a_buffer_that_is_filled_again_for_each_image_streams_right(model):
    """What its owner may change is prepared when it is taken, however far the stream reads ahead."""

    def frames():
        frame = np.zeros((28, 28, 3), np.uint8)
        for level in (0, 100, 200):
            frame[:] = level
            yield frame

    for level, ours in zip((0, 100, 200), model.stream(frames(), batch_size=2, workers=3), strict=True):
        expected = model.extract(np.full((28, 28, 3), level, np.uint8)).features
        torch.testing.assert_close(ours.features, expected, rtol=1e-5, atol=1e-5)


def test_the_frames_of_an_animation_stream_right(model, tmp_path):
    """Of a PIL image the frame that it stands at when it is given."""
    frames = [Image.fromarray(np.full((28, 28, 3), level, np.uint8)) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "film.tiff", save_all=True, append_images=frames[1:])

    def seeking():
        with Image.open(tmp_path / "film.tiff") as film:
            for number in range(3):
                film.seek(number)
                yield film

    for ours, frame in zip(model.stream(seeking(), workers=3), frames, strict=True):
        torch.testing.assert_close(ours.features, model.extract(frame).features, rtol=1e-5, atol=1e-5)


def test_what_pillow_decoded_is_freed_before_the_pixels_are_resized(tmp_path, monkeypatch):
    Image.new("RGB", (90, 70)).save(tmp_path / "image.jpg")
    opened_files, free = [], []
    identify = decode.identify

    def identified(*arguments):
        file = identify(*arguments)
        opened_files.append(weakref.ref(file))
        return file

    def preprocessed(*arguments):
        free.append(opened_files[-1]() is None)
        return resize_normalise_pad(*arguments)

    monkeypatch.setattr(decode, "identify", identified)
    monkeypatch.setattr(preprocessing, "resize_normalise_pad", preprocessed)
    Preprocessor(16, 32, (0, 0, 0), (1, 1, 1))(tmp_path / "image.jpg")
    assert free == [True]


def test_the_patch_grid_goes_by_its_old_name_too():
    placement = ImagePlacement(plan_patch_grid((20, 30), 14, 28))
    assert placement.geometry is placement.patch_grid
    with pytest.raises(AttributeError):
        placement.geometry = None


# ---- the pixels

SIZES = [
    ((37, 53), 20),
    ((53, 37), 64),
    ((64, 64), 64),
    ((5, 90), 3),
    ((11, 17), "native"),
    ((1, 1), "native"),
    ((1, 1), 40),
]


def draw(image_hw, dtype):
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (3, *image_hw), dtype=dtype, generator=generator)
    return torch.rand(3, *image_hw, generator=generator)


@pytest.mark.parametrize(("image_hw", "short_side_px"), SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch_px", [14, 16])
def test_preprocess_equals_all_channels_at_once(image_hw, short_side_px, dtype, patch_px):
    """All three channels at once; the edges repeated by NumPy. Not a bit differs."""
    image = draw(image_hw, dtype)
    before = image.clone()
    grid = plan_patch_grid(image_hw, patch_px, short_side_px)
    result = resize_normalise_pad(image, grid, MEAN, STD)

    plain = image.float() / 255 if dtype == torch.uint8 else image
    if grid.resized_hw != image_hw:
        size = grid.resized_hw
        plain = F.interpolate(plain[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
    plain = (plain.clamp(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    more = [(0, padded - resized) for padded, resized in zip(grid.padded_hw, grid.resized_hw, strict=True)]
    expected = np.pad(plain.numpy(), [(0, 0), *more], mode="edge")

    assert result.dtype == torch.float32
    assert result.shape == (3, *grid.padded_hw)
    assert np.array_equal(result.numpy(), expected)
    assert torch.equal(image, before)


@pytest.mark.parametrize(("image_hw", "short_side_px"), [((61, 83), 24), ((83, 61), 45), ((20, 31), 64)])
def test_resize_agrees_with_pillow(image_hw, short_side_px):
    grid = plan_patch_grid(image_hw, 16, short_side_px)
    height_px, width_px = grid.resized_hw
    image = draw(image_hw, torch.uint8)
    ours = resize_normalise_pad(image, grid, (0, 0, 0), (1, 1, 1))[:, :height_px, :width_px].numpy()
    for channel in range(3):
        floats = Image.fromarray(image[channel].numpy().astype(np.float32) / 255)
        twin = np.asarray(floats.resize((width_px, height_px), Image.Resampling.BICUBIC)).clip(0, 1)
        assert np.abs(ours[channel] - twin).max() < 1e-5  # float32 rounding, weights worked out on their own


def test_resize_agrees_with_pillow_on_bytes():
    """Mid greys, as Pillow cuts to 0..255 after each axis, and ours only at the end.

    Pillow rounds after each axis as well: half a level twice, the first weighed by a bicubic's 1.25.
    """
    image = draw((83, 61), torch.uint8) // 2 + 64
    ours = resize_normalise_pad(image, plan_patch_grid((83, 61), 15, 45), (0, 0, 0), (1, 1, 1))[:, :61].numpy()
    for channel in range(3):
        twin = Image.fromarray(image[channel].numpy()).resize((45, 61), Image.Resampling.BICUBIC)
        assert np.abs(ours[channel] * 255 - np.asarray(twin)).max() < 1.2


def test_preprocess_takes_any_layout():
    image = draw((20, 30), torch.uint8)
    grid = plan_patch_grid((20, 30), 14, 17)
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expanded = image[:1].expand(3, -1, -1)
    assert torch.equal(
        resize_normalise_pad(channels_last, grid, MEAN, STD), resize_normalise_pad(image, grid, MEAN, STD)
    )
    same = resize_normalise_pad(expanded, grid, (0, 0, 0), (1, 1, 1))
    assert torch.equal(same[0], same[2])


def test_preprocess_clamps_the_overshoot():
    """A bicubic rings at a hard edge; an image's values do not leave [0, 1]."""
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    result = resize_normalise_pad(image, plan_patch_grid((32, 32), 16, 64), (0, 0, 0), (1, 1, 1))
    assert result.min() == 0
    assert result.max() == 1


def test_preprocess_wants_the_planned_image():
    with pytest.raises(AssertionError, match=r"\(3, 8, 9\) does not fit PatchGrid\(image_hw=\(9, 8\)"):
        resize_normalise_pad(torch.rand(3, 8, 9), plan_patch_grid((9, 8), 16, "native"), MEAN, STD)
