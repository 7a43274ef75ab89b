"""A first-generation adapter mixed with the universal upsampler."""

import pytest
import torch

from brixel import BrixelError, BrixelFeatures, CheckpointError
from brixel.checkpoints.bundled_universal import load_universal
from brixel.inference.memory.prediction import Job, bound_bytes, predict_peak
from brixel.inference.memory.strategies import Whole
from brixel.model.upsampler import MixedUpsampler, Upsampler


@pytest.fixture(scope="module")
def first():
    """A model of the first generation in which every weight matters."""
    from brixel.evaluate.cost.timing import random_model

    return random_model("dinov3-vits16")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(1, 3, 4 * 16, 3 * 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@torch.no_grad()
def test_the_map_is_the_universal_one_and_a_share_of_the_difference(first, pixels):
    own, maps = first(pixels), first.backbone.block_maps(pixels, first.blocks)
    mixed = first.mixed_with_universal(0.25)
    assert isinstance(mixed.upsampler, MixedUpsampler)
    universal = load_universal(torch.float32)(maps[-1], mixed.upsampler.guide(pixels), (16, 12))
    torch.testing.assert_close(mixed(pixels), universal + 0.25 * (own - universal))
    torch.testing.assert_close(first.mixed_with_universal(0)(pixels), universal)
    whole = first.mixed_with_universal(1)
    assert type(whole.upsampler) is Upsampler
    assert torch.equal(whole(pixels), own)
    assert mixed.adapter is first.adapter


@pytest.mark.slow
def test_it_is_saved_and_loaded_with_its_share(first, pixels, tmp_path):
    mixed = first.mixed_with_universal()
    assert mixed.config.adapter.own_share == 0.5
    mixed.save_pretrained(tmp_path / "mixed", include_backbone=True)
    again = BrixelFeatures.from_pretrained(tmp_path / "mixed", device="cpu")
    assert again.config.adapter == mixed.config.adapter
    with torch.no_grad():
        assert torch.equal(again(pixels), mixed(pixels))
    first.save_pretrained(tmp_path / "first", include_backbone=True)
    assert "own_share" not in (tmp_path / "first" / "config.json").read_text()  # earlier versions read it
    config = (tmp_path / "mixed" / "config.json").read_text()
    (tmp_path / "mixed" / "config.json").write_text(config.replace('"own_share": 0.5', '"own_share": 2'))
    with pytest.raises(CheckpointError, match="own_share is 2"):
        BrixelFeatures.from_pretrained(tmp_path / "mixed", device="cpu")


def test_its_need_is_within_the_bound(first):
    mixed, job = first.mixed_with_universal(), Job(1, (256, 256))
    own = predict_peak(first, Whole(), job)
    assert own < predict_peak(mixed, Whole(), job) < bound_bytes(mixed, job)


def test_others_are_refused(first):
    for model in (BrixelFeatures.from_pretrained("brixel-tiny", device="cpu"), first):
        with pytest.raises(BrixelError, match="starts from the universal upsampler|own_share is 1.5"):
            model.mixed_with_universal(1.5)
    for adapter in ("universal", "bilinear", "fresh"):
        with pytest.raises(BrixelError, match="or is no trained one"):
            BrixelFeatures.from_backbone("brixel-tiny", adapter=adapter, device="cpu").mixed_with_universal()
