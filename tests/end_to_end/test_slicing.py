"""The slicing that brixel-tiny started from: without a reduction it is exact; larger reductions are less accurate."""

import dataclasses
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig

PATH = ROOT / "examples" / "tiny" / "slicing.py"
WIDE = ViTConfig(
    width=64, depth=3, heads=4, patch_px=14, ffn="mlp", ffn_width=128, positions="learned", norm_eps=1e-6, native_grid=4
)


@pytest.fixture(scope="module")
def slicing():
    spec = importlib.util.spec_from_file_location("slicing", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wide():
    """Random weights, none near zero; the same position everywhere, as slicing drops positions."""
    torch.manual_seed(0)
    vit = ViT(WIDE).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "scale" in name else 0.1))
        vit.positions.copy_(torch.randn(1, 1, 64).expand_as(vit.positions))
    return vit


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 56, 56, generator=generator) for _ in range(4)]


def nearness(slicing, wide, images, **changes):
    """Cosine of the narrow model's cells, less their mean, to the projected ones of the wide model."""
    narrow, projection = slicing.slice_vit(wide, dataclasses.replace(WIDE, **changes), images)
    with torch.no_grad():
        found = narrow.block_maps(images[0], [2])[0]
        expected = torch.einsum("ed,bdhw->behw", projection, wide.block_maps(images[0], [2])[0])
    found, expected = (maps - maps.mean((0, 2, 3), keepdim=True) for maps in (found, expected))
    return float(F.cosine_similarity(found, expected, dim=1).mean())


def test_the_same_sizes_give_the_same_features(slicing, wide, images):
    assert nearness(slicing, wide, images) > 0.999


def test_the_projection_is_nearly_a_rotation(slicing, wide, images):
    _, projection = slicing.slice_vit(wide, dataclasses.replace(WIDE, width=32), images)
    assert projection.shape == (32, 64)
    sizes = torch.linalg.svdvals(projection)
    assert sizes[-1] < 1e-3 * sizes[0]  # one of 32 channels is the mean of the others
    assert 0.5 < sizes[-2] < sizes[0] < 2


def test_less_width_and_fewer_units_are_less_accurate(slicing, wide, images):
    whole, narrower = (nearness(slicing, wide, images, width=width) for width in (64, 48))
    fewer = nearness(slicing, wide, images, ffn_width=96)
    assert whole > narrower > 0.5
    assert whole > fewer > 0.8


def test_a_larger_patch_embeds_an_enlarged_image_alike(slicing, wide, images):
    narrow, _ = slicing.slice_vit(wide, dataclasses.replace(WIDE, patch_px=16), images)
    generator = torch.Generator().manual_seed(2)
    small = torch.randn(2, 3, 14, 14, generator=generator)  # one patch: the image's and the patch's edges are the same
    large = F.interpolate(small, (16, 16), mode="bicubic", align_corners=False)
    same, _ = slicing.slice_vit(wide, WIDE, images)
    with torch.no_grad():
        torch.testing.assert_close(narrow.patch_embed(large), same.patch_embed(small), rtol=1e-3, atol=1e-3)
