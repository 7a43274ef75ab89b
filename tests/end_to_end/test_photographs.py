"""The main job on real photographs, through a real DINOv2-S."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED
from PIL import Image

from brixel import BrixelFeatures, FeatureMap
from brixel.cli.app import main

pytestmark = pytest.mark.shared
BACKBONE = SHARED / "weights" / "dinov2-small"
PHOTOS = SHARED / "data" / "photos" / "val"


@pytest.fixture(scope="module")
def model():
    return BrixelFeatures.from_backbone(BACKBONE, adapter="fresh", device="cpu")


def photos(count):
    found = sorted(PHOTOS.glob("*.jpg"))[:count]
    assert len(found) == count, f"no photographs in {PHOTOS}"
    return found


def test_the_backbone_is_recognised(model):
    assert model.config.backbone.architecture == "dinov2-vits14"
    assert (model.embed_dim, model.config.adapter.short_side_px) == (384, 224)
    assert model.config.adapter.blocks == (3, 6, 9, 11)


def test_every_token_is_what_transformers_gives(model):
    from transformers import Dinov2Model

    reference = Dinov2Model.from_pretrained(BACKBONE, dtype=torch.float32).eval()
    pixels = torch.randn(1, 3, 70, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = reference(pixels, output_hidden_states=True).hidden_states[1:]
        expected = [reference.layernorm(each)[:, 1:].transpose(1, 2).unflatten(2, (5, 8)) for each in hidden]
        ours = model.backbone.block_maps(pixels, range(12))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_show_and_extract(tmp_path):
    pair = [str(path) for path in photos(2)]
    assert main(["show", *pair, "--backbone", str(BACKBONE), "-o", str(tmp_path / "panel.png")]) == 0
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width > 3 * 384
    assert main(["extract", *pair, "--backbone", str(BACKBONE), "-o", str(tmp_path / "maps")]) == 0
    for path in photos(2):
        feature_map = FeatureMap.load(tmp_path / "maps" / f"{path.name}.safetensors")
        with Image.open(path) as photo:
            assert feature_map.image_hw == (photo.height, photo.width)
        assert feature_map.embed_dim == 384
        assert min(feature_map.grid_hw) == 64


def test_neighbours_are_more_alike_than_strangers(model):
    """On both axes, in every photograph: the map lies on the image the right way round."""
    for photo in photos(4):
        features = F.normalize(model.extract_backbone(photo).features, dim=0)
        beside = (features[:, :, 1:] * features[:, :, :-1]).sum(0).mean()
        below = (features[:, 1:] * features[:, :-1]).sum(0).mean()
        anywhere = (features.flatten(1).T @ features.flatten(1)).mean()
        assert 1 - min(beside, below) < 0.6 * (1 - anywhere)
