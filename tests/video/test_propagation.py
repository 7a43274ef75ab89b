"""Labels carried by features that are planted, against a naive twin; the bundled model in a slow test."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError, BrixelFeatures, FeatureMap
from brixel.video import propagate
from brixel.video.propagation import PropagationSettings, carried_shares, label_shares

HEIGHT, WIDTH = 60, 80


def disk_at(time):
    """A moving disk, (H, W)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (y - 25 - 0.5 * time) ** 2 + (x - 20 - 3 * time) ** 2 < 14**2


def iou(ours, theirs):
    return (ours & theirs).sum() / (ours | theirs).sum()


def planted_map(mask, grid_hw, seed):
    """Features that tell the disk from the rest, with noise: those of a cell are the mean over its pixels."""
    vectors = torch.nn.functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    shares = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask).float()[None], grid_hw)[0]
    features = vectors[1][:, None, None] * shares + vectors[0][:, None, None] * (1 - shares)
    features = features + 0.05 * torch.randn(16, *grid_hw, generator=torch.Generator().manual_seed(seed))
    return FeatureMap(features, mask.shape, (mask.shape[0] / grid_hw[0], mask.shape[1] / grid_hw[1]))


@pytest.mark.slow
def test_a_moving_disk_is_followed():
    truth = [disk_at(time) for time in range(12)]
    maps = [planted_map(mask, (30, 40), time) for time, mask in enumerate(truth)]
    found = list(propagate(truth[0], iter(maps)))
    assert len(found) == 12
    assert found[0].numpy().tolist() == truth[0].astype(int).tolist()
    assert all(mask.shape == (HEIGHT, WIDTH) and mask.dtype == torch.int64 for mask in found)
    assert min(iou(ours.numpy() == 1, theirs) for ours, theirs in zip(found[1:], truth[1:], strict=True)) > 0.93
    again = list(propagate(truth[0], maps))
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))


def naive_shares(cells, earlier, reach_hw, settings):
    """The definition, cell by cell, in float64."""
    height, width, _ = cells.shape
    found = torch.zeros(height, width, earlier[0][1].shape[-1], dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            votes = []
            for number, (theirs, _) in enumerate(earlier):
                for y in range(height):
                    for x in range(width):
                        if abs(y - row) <= reach_hw[0] and abs(x - column) <= reach_hw[1]:
                            votes.append((float(theirs[y, x].double() @ cells[row, column].double()), number, y, x))
            votes = sorted(votes, reverse=True)[: settings.top_k]
            weights = [math.exp(similarity / settings.temperature) for similarity, *_ in votes]
            for weight, (_, number, y, x) in zip(weights, votes, strict=True):
                found[row, column] += weight / sum(weights) * earlier[number][1][y, x].double()
    return found


@pytest.mark.parametrize(("reach_hw", "at_once"), [([2, 3], 2**23), ([50, 1], 2**23), ([4, 4], 1)])
def test_shares_are_those_of_the_definition(monkeypatch, reach_hw, at_once):
    monkeypatch.setattr("brixel.video.propagation._QUERY_CELLS", 5)
    monkeypatch.setattr("brixel.video.propagation._MOST_SIMILARITIES", at_once)
    generator = torch.Generator().manual_seed(0)
    unit = lambda: torch.nn.functional.normalize(torch.randn(7, 12, 6, generator=generator), dim=2)  # noqa: E731
    earlier = [(unit(), torch.rand(7, 12, 3, generator=generator)) for _ in range(3)]
    cells, settings = unit(), PropagationSettings(top_k=4)
    found = carried_shares(cells, earlier, reach_hw, settings)
    torch.testing.assert_close(found.double(), naive_shares(cells, earlier, reach_hw, settings), atol=1e-5, rtol=0)


def test_more_votes_than_cells_near_are_no_votes():
    """A radius of one cell with nine near cells at most, and twenty votes: those outside weigh nothing."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.nn.functional.normalize(torch.randn(6, 6, 4, generator=generator), dim=2)
    earlier = [(cells, torch.rand(6, 6, 2, generator=generator))]
    settings = PropagationSettings(top_k=20)
    found = carried_shares(cells, earlier, [1, 1], settings)
    torch.testing.assert_close(found.double(), naive_shares(cells, earlier, [1, 1], settings), atol=1e-5, rtol=0)


def test_shares_of_labels_are_areas_also_where_cells_lie_across_pixels_and_the_edge():
    mask = torch.tensor([[1, 1, 5], [1, 0, 5]])
    feature_map = FeatureMap(torch.zeros(1, 2, 2), (2, 3), (1.5, 2.0))
    shares = label_shares(mask, torch.tensor([0, 1, 5]), feature_map)
    expected = [[[1 / 6, 5 / 6, 0], [0, 0, 1]], [[0.5, 0.5, 0], [0, 0, 1]]]
    torch.testing.assert_close(shares, torch.tensor(expected))


def test_labels_are_any_numbers_and_many():
    mask = (np.arange(HEIGHT)[:, None] // 10 * 8 + np.arange(WIDTH) // 10) * 1000 - 7
    features = torch.nn.functional.normalize(torch.randn(32, 6, 8, generator=torch.Generator().manual_seed(0)), dim=0)
    still = FeatureMap(features, (HEIGHT, WIDTH), (10.0, 10.0))
    *_, last = propagate(mask, [still] * 3, top_k=1)
    assert set(last.unique().tolist()) <= set(np.unique(mask).tolist())
    assert (last.numpy() == mask).mean() > 0.95


def test_masks_are_images_arrays_and_tensors():
    mask = disk_at(0)
    maps = [planted_map(mask, (15, 20), 0)] * 2
    palette = Image.fromarray(mask.astype(np.uint8)).convert("P")
    readonly = mask.astype(np.uint16)
    readonly.flags.writeable = False
    expected = list(propagate(mask, maps))
    grey = Image.fromarray(mask.astype(np.uint8))
    for given in (mask.astype(np.uint8), torch.from_numpy(mask), readonly, grey, palette):
        assert all(a.equal(b) for a, b in zip(propagate(given, maps), expected, strict=True))


@pytest.mark.parametrize(
    ("mask", "frames", "settings", "message"),
    [
        (np.zeros((4, 4)), [], {}, r"the mask is float64 \(4, 4\); expected \(H, W\) whole numbers"),
        (np.zeros((4, 4, 3), int), [], {}, r"the mask is torch.int64 \(4, 4, 3\)"),
        (Image.new("RGB", (4, 4)), [], {}, "the mask has mode RGB; expected one whole number per pixel"),
        ("mask.png", [], {}, "the mask is 'mask.png'"),
        (np.zeros((4, 4), int), [], {}, "no frames to carry labels through"),
        (np.zeros((4, 4), int), "clip.mp4", {}, "images are 'clip.mp4'; expected several"),
        (np.zeros((4, 4), int), [], {"top_k": 0}, "top_k is 0; expected a whole number from 1 up"),
        (np.zeros((4, 4), int), [], {"temperature": 0}, "temperature is 0; expected"),
        (np.arange(1100).reshape(11, 100), "maps", {}, "the mask has 1100 different labels; expected 1024 at most"),
    ],
)
def test_what_cannot_be_carried_is_an_error(mask, frames, settings, message):
    if frames == "maps":
        frames = [FeatureMap(torch.zeros(2, 1, 10), (11, 100), (11.0, 10.0))]
    with pytest.raises(BrixelError, match=message):
        list(propagate(mask, frames, **settings))


def test_frames_of_another_size_are_named():
    first, other = planted_map(disk_at(0), (15, 20), 0), planted_map(disk_at(0)[:50], (15, 20), 0)
    with pytest.raises(BrixelError, match=r"frame 2 has 50 x 80 px \(height x width\), the mask 60 x 80"):
        list(propagate(disk_at(0), [first, first, other]))
    with pytest.raises(BrixelError, match=r"a map has shape \(16, 30, 40\), that of the first frame \(16, 15, 20\)"):
        list(propagate(disk_at(0), [first, planted_map(disk_at(0), (30, 40), 0)]))
    with pytest.raises(BrixelError, match="frames are one feature map"):
        list(propagate(disk_at(0), first))


def test_images_go_through_a_model(backbone_folder):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)
    images = [np.full((28, 42, 3), 100 + 20 * time, np.uint8) for time in range(3)]
    mask = np.arange(28 * 42).reshape(28, 42) % 2
    by_images = list(propagate(mask, images, model))
    by_maps = list(propagate(mask, model.stream(images)))
    assert [each.tolist() for each in by_images] == [each.tolist() for each in by_maps]
    assert len(by_images) == 3


@pytest.mark.slow
def test_the_bundled_model_follows_a_drawn_disk_through_a_video(tmp_path):
    from brixel.video import frames, write_video

    noise = np.random.default_rng(0)

    def texture(height, width, colour):
        grain = Image.fromarray(noise.integers(60, 196, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
        return (
            np.asarray(grain.resize((width, height), Image.Resampling.BICUBIC)) // 2 + np.array(colour, np.uint8) // 2
        )

    ground, inside = texture(160, 224, (90, 140, 90)), texture(160, 224, (220, 80, 60))
    truth, images = [], []
    for time in range(10):
        y, x = np.mgrid[:160, :224] + 0.5
        mask = (y - 60 - 3 * time) ** 2 + (x - 60 - 8 * time) ** 2 < 36**2
        moved = np.roll(inside, (3 * time, 8 * time), (0, 1))
        images.append(np.where(mask[..., None], moved, ground))
        truth.append(mask)
    write_video(tmp_path / "disk.mp4", images, fps=10)
    found = propagate(truth[0], frames(tmp_path / "disk.mp4"), BrixelFeatures.from_pretrained(device="cpu"))
    scores = [iou(ours.numpy() == 1, theirs) for ours, theirs in zip(found, truth, strict=True)]
    assert np.mean(scores[1:]) > 0.9, scores
    assert scores[0] == 1
