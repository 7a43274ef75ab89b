"""Sources of features."""

import pytest
import torch
import torch.nn.functional as F
from helpers import mean_colour

import brixel
from brixel import BrixelError, BrixelFeatures
from brixel.evaluate.feature_sources import FeatureSource, cost_of, features_by_name, sources_of
from brixel.images.crops import normalised, student_view


def test_each_source_is_what_its_name_says(model):
    crops = torch.rand(2, 3, 112, 112)
    small, large = (normalised(each, model.backbone.mean, model.backbone.std) for each in (student_view(crops), crops))
    with torch.no_grad():
        low = model.backbone_features(small)
        expected = {mode: F.interpolate(low, (8, 8), mode=mode) for mode in ("nearest", "bilinear", "bicubic")}
        expected["universal"] = brixel.upsample(low, student_view(crops))
        expected |= {"student": model(small), "teacher": model.backbone_features(large)}
    found = features_by_name(sources_of(model), crops)
    assert list(found) == list(expected)
    for name, maps in expected.items():
        assert torch.allclose(found[name], maps, atol=1e-4)


def test_modes_are_left_as_they_were(model):
    model.train()
    sources_of(model, ["student"])[0].features(torch.rand(1, 3, 56, 56))
    assert model.adapter.training
    model.eval()


def test_identities_tell_models_apart_and_interpolations_not(model, backbone_folder):
    names = ["nearest", "bilinear", "student", "teacher", "universal"]
    one = [source.key for source in sources_of(model, names)]
    other = [source.key for source in sources_of(BrixelFeatures.from_backbone(backbone_folder, device="cpu"), names)]
    assert one[0] == one[1]
    assert len({*one}) == 4
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, True, True]


def test_what_is_no_source_is_refused(model):
    with pytest.raises(BrixelError, match="unknown source 'bilinar'; did you mean 'bilinear'"):
        sources_of(model, ["bilinar"])
    with pytest.raises(BrixelError, match="scale of source 'x' is 2; expected 1"):
        FeatureSource("x", mean_colour, 8, scale=2)
    with pytest.raises(BrixelError, match="resize of source 'x' is 'cubic'; expected one of"):
        FeatureSource("x", mean_colour, 8, resize="cubic")
    with pytest.raises(BrixelError, match=r"'x' gave a tensor \(1, 3\); expected a tensor \(1, D, h, w\)"):
        FeatureSource("x", lambda pixels: pixels.mean((2, 3)), 8).features(torch.rand(1, 3, 32, 32))
    with pytest.raises(BrixelError, match="'x' gave ndarray; expected a tensor"):
        FeatureSource("x", lambda pixels: pixels.numpy(), 8).features(torch.rand(1, 3, 32, 32))  # type: ignore[arg-type]
    with pytest.raises(BrixelError, match="'x' gave features that are not finite"):
        FeatureSource("x", lambda pixels: pixels / 0, 8).features(torch.rand(1, 3, 32, 32))
    with pytest.raises(BrixelError, match="two sources are named 'x'"):
        features_by_name(
            [FeatureSource("x", mean_colour, 8), FeatureSource("x", mean_colour, 4)], torch.rand(1, 3, 32, 32)
        )
    with pytest.raises(BrixelError, match="multiple of 32"):
        FeatureSource("x", mean_colour, 8).features(torch.rand(1, 3, 40, 40))


def test_costs_are_counted_on_what_a_source_sees():
    layer = torch.nn.Conv2d(3, 4, 8, stride=8, bias=False)
    for scale, cells in ((1, 1), (4, 16)):
        cost = cost_of(FeatureSource("x", layer, 8, scale=scale), 32, rounds=1)
        assert cost["gflop"] == pytest.approx(2 * 4 * 3 * 64 * cells / 1e9)
        assert cost["ms"] > 0
