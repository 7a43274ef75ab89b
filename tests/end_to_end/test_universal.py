"""The weights of the universal upsampler in the package: what they are, and that they sharpen maps along outlines."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED

import brixel
from brixel import BrixelFeatures
from brixel.checkpoints.bundled_universal import UNIVERSAL, load_universal
from brixel.evaluate import fidelity
from brixel.images.find_images import find_images


def test_the_weights_are_small_and_come_without_gradients():
    assert Path(UNIVERSAL).stat().st_size < 1_000_000
    universal = load_universal(torch.float32)
    assert not universal.training
    assert not any(parameter.requires_grad for parameter in universal.parameters())
    assert all(parameter.isfinite().all() for parameter in universal.parameters())


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("width", [32, 700])
def test_an_edge_of_the_image_is_found_in_features_of_any_kind(scale, width):
    """Two regions with features of their own, whose border runs through low-resolution cells."""
    torch.manual_seed(0)
    rows, columns, border = 10, 12, 5.6  # in cells
    inside = torch.arange(columns * 16) / 16 < border
    image = torch.where(inside, torch.tensor([0.8, 0.3, 0.2])[:, None], torch.tensor([0.1, 0.5, 0.9])[:, None])
    image = (image[:, None].expand(3, rows * 16, -1) + 0.02 * torch.randn(3, rows * 16, columns * 16)).clamp(0, 1)
    kinds = torch.randn(2, width)
    share = (border - torch.arange(columns)).clamp(0, 1)  # of a cell that is inside
    low = share * kinds[0][:, None] + (1 - share) * kinds[1][:, None]  # D w
    low = (low[:, None].expand(width, rows, columns) + 0.1 * torch.randn(width, rows, columns))[None]
    centres = (torch.arange(scale * columns) + 0.5) / scale
    target = torch.where(centres < border, kinds[0][:, None], kinds[1][:, None])[None, :, None]
    size = (scale * rows, scale * columns)
    near = (centres - border).abs() < 1.5

    def error(maps):
        return 1 - F.cosine_similarity(maps, target.expand_as(maps), dim=1)[..., near].mean()

    assert error(brixel.upsample(low, image, scale)) < 0.8 * error(F.interpolate(low, size, mode="bilinear"))


def test_even_images_and_features_stay_even():
    constant = torch.randn(1, 48, 1, 1).expand(1, 48, 6, 6)
    for image in (torch.zeros(3, 96, 96), torch.rand(3, 96, 96)):
        found = brixel.upsample(constant, image)
        torch.testing.assert_close(found, constant[:, :, :1, :1].expand_as(found), rtol=1e-4, atol=1e-4)


@pytest.mark.shared
@pytest.mark.slow
def test_photographs_gain_on_a_bundled_backbone():
    images = [path for path, _ in islice(find_images([SHARED / "data" / "photos" / "val"]), 8)]
    model = BrixelFeatures.from_backbone("brixel-tiny", device="cpu")
    rows = fidelity(model, images, [512], ["bilinear", "universal"]).rows
    assert rows[1]["centred_removed"] > 0.12
    assert rows[1]["edges_removed"] > 0.25
    assert rows[1]["better"][0] >= 7
