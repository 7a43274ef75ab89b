"""`brixel.upsample`: features that exist already, and their image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import brixel
from brixel import BrixelError, BrixelFeatures, ImageError
from brixel.images.find_images import SCENE


@pytest.fixture
def features() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 20, 6, 9)


def test_four_times_the_grid_unless_another_scale_is_asked_for(features):
    assert brixel.upsample(features, SCENE).shape == (1, 20, 24, 36)
    assert brixel.upsample(features, SCENE, 8).shape == (1, 20, 48, 72)
    assert brixel.upsample(features, SCENE, scale=1.5).shape == (1, 20, 9, 13)
    assert brixel.upsample(features, SCENE, size=(11, 30)).shape == (1, 20, 11, 30)


def test_it_is_what_a_model_with_the_universal_adapter_computes():
    model = BrixelFeatures.from_backbone("brixel-tiny", device="cpu")
    image = torch.rand(3, 64, 96)
    pixels, _ = model.prepare(image, short_side_px="native")
    with torch.no_grad():
        low, dense = model.backbone_features(pixels[None]), model(pixels[None])
    torch.testing.assert_close(brixel.upsample(low, image), dense, rtol=0, atol=2e-5)


def test_it_differs_from_interpolation_and_follows_the_image(features):
    image = torch.zeros(3, 48, 72)
    image[:, :, 30:] = 1
    found = brixel.upsample(features, image)
    assert (found - F.interpolate(features, (24, 36), mode="bilinear")).abs().max() > 0.05
    assert (found - brixel.upsample(features, image.flip(-1))).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["path", "PIL", "array", "tensor"])
def test_the_image_may_be_any_image(features, kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    images = {
        "path": tmp_path / "image.png",
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
    }
    assert torch.equal(brixel.upsample(features, images[kind]), brixel.upsample(features, pixels))


def test_a_batch_takes_an_image_for_each(features):
    both = torch.cat([features, 2 * features.flip(-1)])
    images = [torch.rand(3, 40, 60), torch.rand(3, 30, 30)]
    found = brixel.upsample(both, images)
    assert found.shape == (2, 20, 24, 36)
    for index in range(2):
        assert torch.equal(found[[index]], brixel.upsample(both[[index]], images[index]))
    stacked = torch.rand(2, 3, 40, 60)
    assert torch.equal(brixel.upsample(both, stacked), brixel.upsample(both, list(stacked)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(features, dtype):
    found = brixel.upsample(features.to(dtype), SCENE)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), brixel.upsample(features, SCENE), rtol=0, atol=0.05)


def test_gradients_reach_the_features(features):
    features.requires_grad_(True)
    brixel.upsample(features, SCENE).sum().backward()
    assert features.grad.abs().sum() > 0


def test_large_windows_are_computed_in_chunks_with_the_same_numbers(features, monkeypatch):
    expected = brixel.upsample(features, SCENE)
    monkeypatch.setattr("brixel.inference.upsample._WINDOW_BYTES", 40_000)
    torch.testing.assert_close(brixel.upsample(features, SCENE), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.rand(20, 6, 9)}, r"\(20, 6, 9\).*expected.*\(B, D, h, w\).*features\[None\]"),
        ({"features": torch.rand(1, 20, 0, 9)}, "none of them 0"),
        ({"features": torch.ones(1, 20, 6, 9, dtype=torch.int64)}, "int64.*floating point"),
        ({"features": np.zeros((1, 20, 6, 9))}, "ndarray; expected a tensor"),
        ({"features": torch.full((1, 20, 6, 9), float("nan"))}, "not finite"),
        ({"scale": 0.5}, r"scale is 0.5; expected a number from 1 up"),
        ({"scale": "4"}, r"scale is '4'"),
        ({"scale": True}, "scale is True"),
        ({"size": (5, 9)}, r"size is \(5, 9\), below the \(6, 9\)"),
        ({"size": 24}, r"size is 24; expected \(height, width\)"),
        ({"size": (24.5, 36)}, r"expected \(height, width\)"),
        ({"image": [SCENE, SCENE]}, "2 images for 1 feature maps"),
    ],
)
def test_bad_arguments_are_explained(features, arguments, message):
    given = {"features": features, "image": SCENE, **arguments}
    with pytest.raises(BrixelError, match=message):
        brixel.upsample(**given)


def test_an_image_that_cannot_be_read_is_named(features, tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"no\.jpg"):
        brixel.upsample(features, tmp_path / "no.jpg")
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        brixel.upsample(features, tmp_path / "missing.jpg")
