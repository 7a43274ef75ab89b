"""`brixel extract` of one raster: when it is one, what the flags do, and what is refused."""

import json

import numpy as np
import pytest
import rasterio
import zarr
from PIL import Image
from rasterio import Affine

from brixel import MapFolder


@pytest.fixture
def scene(tmp_path):
    """Four bands of 16 bits, 60 x 90 pixels."""
    path = tmp_path / "scene.tif"
    y, x = np.mgrid[:60, :90]
    values = np.stack([x, y, x + y, x * y]).astype(np.uint16) + 1
    size = {"count": 4, "height": 60, "width": 90, "dtype": "uint16"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", transform=Affine.scale(0.5), **size) as file:
        file.write(values)
    return path


@pytest.mark.slow
def test_a_raster_becomes_a_feature_raster(run, model_folder, scene, tmp_path, capsys):
    arguments = ("extract", scene, "--model", model_folder, "--bands", "4,3,2", "--stretch", "1,99")
    arguments += ("--window", 56, "--overlap", 14)
    assert run(*arguments, "-o", tmp_path / "f.tif") == 0
    printed = capsys.readouterr().out
    assert "64 features, 18x26 cells of 3.5 px; 4 windows of 56x56 px: 4 computed" in printed
    assert "bands 4, 3, 2; " in printed
    assert "percentiles 1 and 99 of 5400 sampled pixels" in printed
    assert run(*arguments, "-o", tmp_path / "f.zarr", "--json", "--save-dtype", "float16") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["shape"], facts["windows"]) == (str(tmp_path / "f.zarr"), [64, 18, 26], 4)
    with rasterio.open(tmp_path / "f.tif") as file:
        np.testing.assert_array_equal(zarr.open(tmp_path / "f.zarr")[:], file.read().astype(np.float16))
        assert file.transform == Affine.scale(1.75)


@pytest.mark.slow
def test_errors_are_one_line_in_flags(run, model_folder, scene, tmp_path, capsys):
    arguments = ("extract", scene, "--model", model_folder, "-o", tmp_path / "f.tif")
    for flags, message in (
        ((), "has 4 bands, and nothing says which are red, green and blue; give --bands"),
        (("--bands", "1,2,9"), "--bands are 1, 2, 9; expected one, which becomes grey, or three"),
        (("--bands", "a,b"), "--bands: 'a,b'; expected whole numbers, such as 4,3,2"),
        (("--stretch", "2"), "--stretch: '2'; expected 2 numbers, with a comma between them"),
        (("--bands", "1", "--window", "56", "--overlap", "56"), "expected an overlap that is smaller than the window"),
        (("--bands", "1", "--short-side-px", "64"), "--short-side-px does not go with rasters"),
        (("--bands", "1", "--shard-size", "1GiB"), "--shard-size does not go with rasters"),
        (("--bands", "1", "--save-dtype", "float16"), "write .zarr for that"),
        (("--level", "0", "--um-per-px", "0.5"), "are two answers to one question"),
    ):
        assert run(*arguments, *flags) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert run("extract", scene, scene, "--model", model_folder, "-o", tmp_path / "f.tif", "--bands", "1") == 2
    assert "a feature raster is made of one raster" in capsys.readouterr().err
    assert not list(tmp_path.glob("f.tif*"))


def test_what_is_no_raster_is_extracted_as_before(run, model_folder, scene, tmp_path):
    """A folder of TIFF photographs, and one of them into a folder."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "a.tif")
    assert run("extract", folder, "--model", model_folder, "-o", tmp_path / "maps") == 0
    assert run("extract", folder / "a.tif", "--model", model_folder, "-o", tmp_path / "one") == 0
    assert list(MapFolder(tmp_path / "maps")) == list(MapFolder(tmp_path / "one")) == ["a.tif"]
    assert run("extract", folder / "a.tif", "--model", model_folder, "-o", tmp_path / "a.zarr") == 0
    assert zarr.open(tmp_path / "a.zarr").shape[0] == 64
