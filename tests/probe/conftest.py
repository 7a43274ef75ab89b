"""What the tests of probes share: a model whose features are the colours of pixels, images, and their masks."""

import pytest
import torch
from probe_images import blocks
from torch import nn

from brixel import BrixelFeatures


class Colours(nn.Module):
    """A backbone with one pixel per patch: 32 fixed linear maps of the pixel's colour."""

    width, patch_px, depth, mean, std = 32, 1, 1, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        mix = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        self.mix = nn.Parameter(mix)

    def block_maps(self, pixels, blocks):
        return [torch.einsum("dc,bchw->bdhw", self.mix, pixels) for _ in blocks]


@pytest.fixture(scope="session")
def colours():
    """A model with a feature for every pixel of an image, which its colour decides."""
    return BrixelFeatures.from_backbone(Colours(), adapter="bilinear", device="cpu", short_side_px=24)


@pytest.fixture
def settings(colours):
    return {"model": colours, "scale": 1, "short_side_px": "native"}


@pytest.fixture
def pairs():
    """Three images and their masks."""
    return [list(each) for each in zip(*(blocks(seed) for seed in range(3)), strict=True)]
