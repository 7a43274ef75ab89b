"""Slides that tifffile writes: which level is read, which of its tiles, and where the cells lie."""

import sys

import numpy as np
import pytest
import rasterio
import tifffile
import torch

from brixel import BrixelError
from brixel.errors import ImageError
from brixel.inference.rasters.slide import open_slide

APERIO = "Aperio Image Library v12\r\n520x384 [0,0 520x384] (128x128) JPEG/RGB Q=70|AppMag = 40|MPP = {}"


@pytest.fixture(scope="module")
def tissue():
    """(384, 520, 3) bytes with structure at all sizes."""
    y, x = np.mgrid[:384, :520]
    waves = [128 + 60 * np.sin(x / k) * np.cos(y / (k + 2)) + 50 * np.sin((x + y) / (9 * k)) for k in (3, 5, 8)]
    return np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)


def levels(image):
    return [image, image[::2, ::2], image[::4, ::4]]


def write_ome(path, image, um=0.25, compression=None):
    full, *smaller = levels(image)
    options = {"tile": (64, 64), "photometric": "rgb", "compression": compression}
    facts = {"axes": "YXS", "PhysicalSizeX": um, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": um}
    with tifffile.TiffWriter(path) as writer:
        writer.write(full, subifds=len(smaller), metadata=facts, **options)
        for level in smaller:
            writer.write(level, subfiletype=1, **options)
    return path


def write_aperio(path, image, um=0.25):
    full, *smaller = levels(image)
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(full, description=APERIO.format(um), **options)
        writer.write(image[::8, ::8], photometric="rgb", description="Aperio thumbnail", metadata=None)
        for level in smaller:
            writer.write(level, description=APERIO.format(um), **options)
    return path


def write_generic(path, image, um=0.25):
    full, *smaller = levels(image)
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(full, resolution=(1e4 / um, 1e4 / um), resolutionunit="CENTIMETER", **options)
        for level in smaller:
            writer.write(level, subfiletype=1, **options)
    return path


KINDS = {"a.ome.tif": write_ome, "a.svs": write_aperio, "a.tif": write_generic}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("um_per_px", "level"), [(0.25, 0), (0.3, 0), (0.5, 1), (0.497, 1), (0.9, 1), (1.0, 2), (9.0, 2)]
)
def test_the_coarsest_level_that_is_fine_enough(name, um_per_px, level, tissue, tmp_path):
    path = KINDS[name](tmp_path / name, tissue)
    with open_slide(path, um_per_px=um_per_px) as slide:
        expected = levels(tissue)[level]
        assert slide.facts.image_hw == expected.shape[:2]
        assert slide.facts.notes["level"] == str(level)
        assert slide.facts.um_per_px == pytest.approx(0.25 * (1, 2, 4)[level], rel=0.01)
        values, valid = slide.read(10, 20, 25, 30, (3, 1, 2))
    assert np.array_equal(values, expected[10:35, 20:50, [2, 0, 1]].transpose(2, 0, 1))
    assert valid.all()


def test_only_the_tiles_of_a_window_are_read(tissue, tmp_path, monkeypatch):
    path = write_ome(tmp_path / "a.ome.tif", tissue)
    decoded = []
    read = tifffile.FileHandle.read
    with open_slide(path) as slide:
        monkeypatch.setattr(
            tifffile.FileHandle, "read", lambda *arguments: decoded.append(len(data := read(*arguments))) or data
        )
        slide.read(130, 130, 60, 120, (1, 2, 3))
    assert 0 < sum(decoded) <= 2 * 64 * 64 * 3  # of 54 tiles, those in row 2 and columns 2 and 3
    assert path.stat().st_size > 20 * sum(decoded)


@pytest.mark.slow
@pytest.mark.parametrize("um_per_px", [0.5, 0.6])
def test_features_of_a_slide(um_per_px, guided, tissue, tmp_path):
    """Of a level as it is, and of one that is averaged: 0.6 micrometres are 1.2 pixels of level 1."""
    path = write_aperio(tmp_path / "a.svs", tissue)
    summary = guided.extract_raster(path, tmp_path / "f.tif", um_per_px=um_per_px, window=112, overlap=28)
    pixels = um_per_px / 0.25  # of level 0, per pixel that the model sees
    with rasterio.open(tmp_path / "f.tif") as cells:
        assert tuple(cells.transform)[:6] == pytest.approx((3.5 * pixels, 0, 0, 0, 3.5 * pixels, 0))
        assert cells.crs is None
        tags = cells.tags()
        assert tags["BRIXEL_COORDINATES"] == "pixels of level 0"
        assert (tags["BRIXEL_LEVEL"], "BRIXEL_RESAMPLED" in tags) == ("1", um_per_px == 0.6)
        assert float(tags["BRIXEL_UM_PER_PX"]) == um_per_px
        features = cells.read()
    assert summary.bands == "1 (red), 2 (green), 3 (blue)"
    if um_per_px == 0.5:
        guided.extract_raster(path, tmp_path / "whole.tif", level=1)
        with rasterio.open(tmp_path / "whole.tif") as cells:
            whole = cells.read()
        level = torch.tensor(tissue[::2, ::2]).permute(2, 0, 1)
        expected = guided.extract(level, short_side_px="native").features.numpy()
        assert np.array_equal(whole, expected)
        assert features.shape == whole.shape


def test_channels_of_a_fluorescence_image(tissue, tmp_path):
    deep = tissue.transpose(2, 0, 1).astype(np.uint16) * 100
    path = tmp_path / "stain.ome.tif"
    tifffile.imwrite(path, deep, tile=(64, 64), photometric="minisblack", metadata={"axes": "CYX"})
    with open_slide(path) as slide:
        values, _ = slide.read(5, 6, 70, 80, (3,))
    assert np.array_equal(values, deep[2:, 5:75, 6:86])


def test_compressed_tiles(tissue, tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", tissue, compression="jpeg")
    with open_slide(path) as slide:
        values, _ = slide.read(0, 0, 384, 520, (1, 2, 3))
    assert np.abs(values.astype(int) - tissue.transpose(2, 0, 1)).mean() < 6  # JPEG, with colours of half the size


def test_what_a_slide_does_not_say(guided, tissue, tmp_path):
    silent = tmp_path / "silent.tif"
    tifffile.imwrite(silent, tissue, tile=(64, 64), photometric="rgb", metadata=None)
    with pytest.raises(BrixelError, match=r"does not say its micrometres per pixel .* give level= one of 0 to 0"):
        guided.extract_raster(silent, tmp_path / "f.tif", um_per_px=0.5)
    path = write_generic(tmp_path / "a.tif", tissue)
    with pytest.raises(BrixelError, match=r"um_per_px is 0.1, finer than .*, whose finest level has 0.25 micro"):
        guided.extract_raster(path, tmp_path / "f.tif", um_per_px=0.1)
    with pytest.raises(BrixelError, match=r"level is 3; .* has the levels 0 to 2"):
        guided.extract_raster(path, tmp_path / "f.tif", level=3)
    with pytest.raises(BrixelError, match="um_per_px is 0; expected a finite number above 0"):
        guided.extract_raster(path, tmp_path / "f.tif", um_per_px=0)
    stack = tmp_path / "stack.ome.tif"
    tifffile.imwrite(stack, np.zeros((2, 3, 64, 64), np.uint8), photometric="minisblack", metadata={"axes": "ZCYX"})
    with pytest.raises(BrixelError, match="has the axes ZCYX of sizes .2, 3, 64, 64.; expected rows and columns"):
        guided.extract_raster(stack, tmp_path / "f.tif")
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(ImageError, match="cannot be read as a slide"):
        guided.extract_raster(tmp_path / "text.svs", tmp_path / "f.tif")


def test_a_missing_reader_is_named(guided, tissue, tmp_path, monkeypatch):
    path = write_generic(tmp_path / "a.svs", tissue)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BrixelError, match=r"slides need 'tifffile': pip install 'brixel\[microscopy\]'"):
        guided.extract_raster(path, tmp_path / "f.tif")
