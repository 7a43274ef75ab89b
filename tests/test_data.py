"""The data set and `collate`: images of all sizes in a DataLoader, features as extract gives, values at image size."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from brixel import BrixelError, BrixelFeatures
from brixel.data import ImageDataset, collate

SIZES = ((60, 80), (50, 50), (120, 160), (61, 80))  # the first and the third have one size after resizing


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=56)


@pytest.fixture(scope="module")
def images():
    numbers = np.random.default_rng(0)
    return [numbers.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_all_sizes_in_a_dataloader_have_the_features_of_extract(model, images, workers):
    masks = [np.full(size, number) for number, size in enumerate(SIZES)]
    loader = DataLoader(
        ImageDataset(images, model, masks), batch_size=4, collate_fn=collate, num_workers=workers, pin_memory=False
    )
    (batches,) = loader
    assert [batch.indices for batch in batches] == [(0, 2, 3), (1,)]
    for batch in batches:
        with torch.no_grad():
            features = model(batch.pixels)
        for feature, placement, target, index in zip(
            features, batch.placements, batch.targets, batch.indices, strict=True
        ):
            expected = model.extract(images[index])
            found = placement.feature_map(feature)
            torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)
            assert (found.image_hw, found.stride) == (expected.image_hw, expected.stride)
            assert target.shape == SIZES[index]
            assert (target == index).all()


def test_values_at_image_size_are_those_of_resize_and_let_gradients_through(model, images):
    (batch,) = collate([ImageDataset(images, model)[index] for index in (0, 2)])
    values = torch.randn(2, 5, *(side * 4 // model.patch_px for side in batch.pixels.shape[2:]), requires_grad=True)
    found = batch.at_image_size(values)
    assert [tuple(value.shape) for value in found] == [(5, 60, 80), (5, 120, 160)]
    for value, logits, placement in zip(found, values, batch.placements, strict=True):
        expected = placement.feature_map(logits).resize(placement.patch_grid.image_hw)
        torch.testing.assert_close(value.detach(), expected.features, rtol=0, atol=0)
    sum(value.sum() for value in found).backward()
    height, width = batch.placements[0].patch_grid.map_hw(4)
    assert (values.grad[:, :, :height, :width] != 0).all()
    assert not values.grad[:, :, height:].any()  # the padding
    assert not values.grad[..., width:].any()


def test_pixels_and_tensors_among_the_targets_move(model, images):
    (batch,) = collate([ImageDataset(images, model, [np.ones(2), "b", None, 4])[index] for index in (0, 2, 3)])
    moved = batch.to("meta")
    assert {moved.pixels.device.type, moved.targets[0].device.type} == {"meta"}
    assert moved.targets[1:] == (None, 4)
    assert moved.placements == batch.placements
    assert batch.pixels.device.type == "cpu"


def test_another_shape_is_refused(model, images):
    (batch,) = collate([ImageDataset(images, model)[0]])
    with pytest.raises(BrixelError, match=r"values have shape \(2, 5, 4, 4\); expected \(1, K, 4h, 4w\)"):
        batch.at_image_size(torch.zeros(2, 5, 4, 4))
    with pytest.raises(BrixelError, match="expected"):
        batch.at_image_size(torch.zeros(1, 5, 3, 4))


def test_the_data_set_is_small_without_the_model(model, images):
    assert len(pickle.dumps(ImageDataset(["a.jpg"], model))) < 4000


def test_positions_and_sizes(model, images):
    data = ImageDataset(images, model, ["a", "b", "c", "d"], short_side_px=28)
    assert len(data) == 4
    assert (data[-1].index, data[-1].target) == (3, "d")
    assert min(data[0].pixels.shape[1:]) == 28
    with pytest.raises(IndexError):
        data[4]
    assert ImageDataset(images, model)[0].target is None


def test_images_are_read_when_their_turn_comes(model, tmp_path):
    path = tmp_path / "late.png"
    data = ImageDataset([path], model)
    with pytest.raises(FileNotFoundError, match="late.png"):
        data[0]
    Image.new("RGB", (30, 20)).save(path)
    assert data[0].placement.patch_grid.image_hw == (20, 30)


def test_bad_input(model, images):
    with pytest.raises(BrixelError, match="there are 4 images and 1 targets"):
        ImageDataset(images, model, [1])
    for one in ("photos", images[0], iter(images), None):
        with pytest.raises(BrixelError, match=f"images is a {type(one).__name__}.*expected a list"):
            ImageDataset(one, model)
    with pytest.raises(BrixelError, match="model is a str; expected a BrixelFeatures"):
        ImageDataset(images, "brixel-small")
    assert len(ImageDataset(torch.zeros(2, 3, 30, 30), model)) == 2
