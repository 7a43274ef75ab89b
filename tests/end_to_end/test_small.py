"""The default model, brixel-small: in the package, loaded without a network, with outlines where the image has them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED

import brixel
from brixel import BrixelFeatures
from brixel.backbones.registry import BRIXEL_SMALL
from brixel.images.find_images import SCENE

FOLDER = Path(brixel.__file__).parent / "assets" / "brixel-small"


@pytest.fixture(scope="module")
def small() -> BrixelFeatures:
    return BrixelFeatures.from_pretrained(device="cpu")


def test_it_is_what_is_loaded_without_a_name(small, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    named = BrixelFeatures.from_pretrained("brixel-small", device="cpu")
    torch.testing.assert_close(dict(named.state_dict()), dict(small.state_dict()), rtol=0, atol=0)
    assert (small.embed_dim, small.patch_px, small.stride_px, small.dtype) == (384, 14, 3.5, torch.float32)


def test_it_takes_less_than_30_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30e6


def test_its_config_says_what_it_is_and_names_no_path_of_the_machine_it_was_made_on(small):
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["backbone"]["sources"] == [
        "brixel-small",
        "facebook/dinov2-small",
        "timm/vit_small_patch14_dinov2.lvd142m",
    ]
    assert config["backbone"]["int8"]
    assert (config["adapter"]["generation"], config["adapter"]["grids"]) == (2, [8, 12, 16])
    assert small.config.backbone.vit == BRIXEL_SMALL.vit


@pytest.mark.slow
def test_a_saved_copy_loads_without_its_backbone(small, tmp_path, offline):
    small.save_pretrained(tmp_path)
    again = BrixelFeatures.from_pretrained(tmp_path, device="cpu")
    torch.testing.assert_close(dict(again.state_dict()), dict(small.state_dict()), rtol=0, atol=0)


def test_its_backbone_is_known_by_name(small, offline):
    universal = BrixelFeatures.from_backbone("brixel-small", device="cpu")
    torch.testing.assert_close(dict(universal.backbone.state_dict()), dict(small.backbone.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_outlines_are_steeper_than_by_interpolation(small):
    """Across the side of the house in the drawing that comes with the package."""
    dense, backbone = small.extract(SCENE), small.extract_backbone(SCENE)
    interpolated = backbone.resize(dense.grid_hw)

    def step(feature_map) -> float:
        cells = F.normalize(feature_map.features, dim=0)
        change = 1 - (cells[:, :, 1:] * cells[:, :, :-1]).sum(0)  # Hf Wf-1
        rows = change[change.shape[0] // 3 : 2 * change.shape[0] // 3]
        return float(rows.topk(5, dim=1).values.mean())

    assert step(dense) > 1.5 * step(interpolated)


@pytest.mark.shared
def test_its_backbone_is_dinov2_s_to_eight_bits(small):
    original = BrixelFeatures.from_backbone(SHARED / "weights" / "dinov2-small", device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    pixels = F.avg_pool2d(torch.randn(1, 3, 448, 448), 8, 1, 4)[..., :224, :224] * 8
    with torch.no_grad():
        cosine = F.cosine_similarity(small.backbone_features(pixels), original.backbone_features(pixels), dim=1)
    assert cosine.mean() > 0.999
