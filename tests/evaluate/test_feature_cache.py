"""Features of images, kept in memory or in files."""

import shutil

import numpy as np
import pytest
import torch
from helpers import mean_colour
from PIL import Image

from brixel import BrixelError
from brixel.errors import DamagedFileError, MissingFileError
from brixel.evaluate import feature_cache
from brixel.evaluate.feature_cache import centre_crop, features_of
from brixel.evaluate.feature_sources import FeatureSource

MAP_BYTES = 2 * 3 * 2 * 2  # of a crop of 64 px: float16, three channels, 2 x 2 cells


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        colours = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(colours).save(path)
    return paths


def counted(calls):
    def maps(pixels):
        calls.append(len(pixels))
        return mean_colour(pixels)

    return maps


def test_kept_features_are_read_again_and_serve_several_sources(images, tmp_path):
    calls = []
    maps = counted(calls)
    sources = [FeatureSource(mode, maps, 8, resize=mode, identity="colour") for mode in ("nearest", "bilinear")]
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not start like one"),
        (None, "makes 152 bytes, and the file has 151"),
        (np.zeros((3, 2, 2), np.float64), "holds float64"),
        (np.zeros((12,), np.float16), r"holds float16 .12,., expected"),
        (np.zeros((3, 4, 4), np.float16), r"holds a map of .3, 4, 4., another file one of .3, 2, 2."),
    ],
)
def test_a_damaged_map_is_named(images, tmp_path, content, message):
    kept = features_of(FeatureSource("x", mean_colour, 8, identity="x"), images, 64, tmp_path / "cache")
    path = kept._kept[1]
    if content is None:
        path.write_bytes(path.read_bytes()[:-1])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DamagedFileError, match=rf"{path.name} .*{message}.*delete it, and it is computed again"):
        kept.batch([0, 1])
    path.unlink()
    with pytest.raises(MissingFileError, match=path.name):
        kept[1]
