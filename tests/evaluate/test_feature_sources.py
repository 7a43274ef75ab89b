"""Sources of features and the store that keeps them."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.evaluate import feature_cache
from brixel.evaluate.feature_cache import centre_crop, features_of
from brixel.evaluate.feature_sources import FeatureSource, cost_of, features_by_name, sources_of
from brixel.images.crops import normalised, student_view


@pytest.fixture(scope="module")
def model(backbone_folder):
    torch.manual_seed(0)
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    with torch.no_grad():
        for parameter in (*model.adapter.parameters(), *model.head.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def mean_colour(pixels):
    return F.avg_pool2d(pixels, 8)


def test_each_source_is_what_its_name_says(model):
    crops = torch.rand(2, 3, 112, 112)
    small, large = (normalised(each, model.backbone.mean, model.backbone.std) for each in (student_view(crops), crops))
    with torch.no_grad():
        low = model.backbone_features(small)
        expected = {mode: F.interpolate(low, (8, 8), mode=mode) for mode in ("nearest", "bilinear", "bicubic")}
        expected |= {"student": model(small), "teacher": model.backbone_features(large)}
    found = features_by_name(sources_of(model), crops)
    assert list(found) == list(expected)
    for name, maps in expected.items():
        assert torch.allclose(found[name], maps, atol=1e-5)


def test_modes_are_left_as_they_were(model):
    model.train()
    sources_of(model, ["student"])[0].features(torch.rand(1, 3, 56, 56))
    assert model.adapter.training
    model.eval()


def test_identities_tell_models_apart_and_interpolations_not(model, backbone_folder):
    names = ["nearest", "bilinear", "student", "teacher"]
    one = [source.key for source in sources_of(model, names)]
    other = [source.key for source in sources_of(BrixelFeatures.from_backbone(backbone_folder, device="cpu"), names)]
    assert one[0] == one[1]
    assert len({*one}) == 3
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, True]


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


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        colours = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(colours).save(path)
    return paths


def test_kept_features_are_read_again_and_serve_several_sources(images, tmp_path):
    calls = []

    def counted(pixels):
        calls.append(len(pixels))
        return mean_colour(pixels)

    sources = [FeatureSource(mode, counted, 8, resize=mode, identity="colour") for mode in ("nearest", "bilinear")]
    for source in sources:
        kept = features_of(source, images, 64, tmp_path / "cache")
        assert kept.batch([2, 0]).shape == (2, 3, 8, 8)
        direct = torch.stack([source.features(centre_crop(path, 64)[None])[0] for path in images])
        assert torch.allclose(kept.batch([0, 1, 2]), direct, atol=2e-3)  # float16
    assert len(calls) == 3 + 2 * 3
    images[0].write_bytes(images[1].read_bytes())  # another image under the same name
    again = features_of(sources[0], images, 64, tmp_path / "cache")
    assert torch.equal(again[0], again[1])
    assert len(calls) == 9


def test_without_an_identity_nothing_is_written(images, tmp_path):
    kept = features_of(FeatureSource("mine", mean_colour, 8), images, 64, tmp_path / "cache")
    assert len(kept) == 3
    assert not (tmp_path / "cache").exists()


def test_a_run_that_was_killed_goes_on(images, tmp_path):
    done = []

    def dies(pixels):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return mean_colour(pixels)

    with pytest.raises(KeyboardInterrupt):
        features_of(FeatureSource("x", dies, 8, identity="x"), images, 64, tmp_path / "cache")
    done[1:] = []  # room for one more
    assert len(features_of(FeatureSource("x", dies, 8, identity="x"), images, 64, tmp_path / "cache")) == 3


def test_features_that_float16_cannot_hold_are_refused(images):
    with pytest.raises(BrixelError, match=r"'x' on .*0\.png are not finite, or too large"):
        features_of(FeatureSource("x", lambda pixels: mean_colour(pixels) + 1e6, 8), images, 64)


def counted(calls):
    def maps(pixels):
        calls.append(len(pixels))
        return mean_colour(pixels)

    return maps


MAP_BYTES = 2 * 3 * 2 * 2  # of a crop of 64 px: float16, three channels, 2 x 2 cells


def test_maps_for_which_memory_is_too_small_are_refused_at_the_first(images, monkeypatch):
    calls = []
    monkeypatch.setattr(feature_cache, "free_bytes", lambda device: 3 * MAP_BYTES)
    with pytest.raises(BrixelError, match=r"^3 maps of source 'x' at 64 px need 1 MiB of memory, .*--cache.*--limit"):
        features_of(FeatureSource("x", counted(calls), 8), images, 64)
    assert len(calls) == 1
    for free in (4 * MAP_BYTES, None):  # a tenth is left to others; not every system tells
        monkeypatch.setattr(feature_cache, "free_bytes", lambda device, free=free: free)
        assert len(features_of(FeatureSource("x", mean_colour, 8), images, 64)) == 3


def test_a_disk_must_hold_what_is_not_there_yet(images, tmp_path, monkeypatch):
    calls, free = [], [10 * MAP_BYTES]
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free[0]))
    source = FeatureSource("x", counted(calls), 8, identity="x")
    features_of(source, images[:1], 64, tmp_path / "cache")
    free[0] = 2 * MAP_BYTES - 1
    with pytest.raises(
        BrixelError, match=r"^2 maps of source 'x' at 64 px need 1 MiB in .*cache.*larger disk \(--cache"
    ):
        features_of(source, images, 64, tmp_path / "cache")
    assert len(calls) == 2
    free[0] += 1
    features_of(source, images, 64, tmp_path / "cache")
    free[0] = 0
    assert len(features_of(source, images, 64, tmp_path / "cache")) == 3  # all are there
    assert len(calls) == 4


def test_maps_that_are_not_kept_are_computed_when_they_are_asked_for(images):
    calls = []
    kept, other = features_of(FeatureSource("x", counted(calls), 8), images, 64, keep=1).split(1)
    assert (len(kept), len(other), len(calls)) == (1, 2, 1)
    direct = [FeatureSource("x", mean_colour, 8).features(centre_crop(path, 64)[None])[0] for path in images]
    for _ in range(2):
        assert torch.equal(kept[0], direct[0].half().float())
        assert torch.equal(other[1], direct[2].half().float())
    assert len(calls) == 3
