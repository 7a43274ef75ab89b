"""Feature rasters against the model on the whole image, against rasterio's own arithmetic, and after interruptions."""

import json
import signal
import sys

import numpy as np
import pytest
import rasterio
import torch
import zarr
from PIL import Image
from rasterio import Affine
from rasterio.control import GroundControlPoint

from brixel import BrixelError
from brixel.backbones.registry import SATELLITE_MEAN, SATELLITE_STD
from brixel.errors import ImageError, MemoryLimitError, MissingFileError
from brixel.inference.memory.strategies import Tiles
from brixel.inference.rasters import extract_raster as module
from brixel.inference.rasters import geotiff

UTM = Affine(0.6, 0.0, 500_000.3, 0.0, -0.6, 4_649_776.7)
GEOGRAPHIC = Affine(1 / 10_800, 0.0, 13.37, 0.0, -1 / 10_800, 52.52)
ROTATED = UTM @ Affine.rotation(27.5) @ Affine.shear(3, 1)


def features_of(path):
    with rasterio.open(path) as file:
        return file.read()


def whole_map(model, rgb, **options):
    return model.extract(torch.tensor(rgb), short_side_px="native", **options).features.numpy()


def content(path):
    """All bytes of a file, or of the files in a folder."""
    if path.is_file():
        return path.read_bytes()
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- numbers


def test_one_window_is_the_whole_map(guided, rgb, draw, tmp_path):
    path = draw(rgb)
    summary = guided.extract_raster(path, tmp_path / "f.tif")
    assert (summary.windows, summary.computed, summary.shape) == (1, 1, (64, 38, 75))
    assert summary.window_px == (140, 266)
    assert np.array_equal(features_of(tmp_path / "f.tif"), whole_map(guided, rgb))


@pytest.mark.parametrize("model", ["guided", pytest.param("second", marks=pytest.mark.slow)])
def test_windows_are_blended_as_tiles_in_memory(model, rgb, draw, tmp_path, request):
    """To the bit, in both formats."""
    model = request.getfixturevalue(model)
    pixels, placement = model.prepare(torch.tensor(rgb), short_side_px="native")
    tiles = Tiles(8)
    (tiled,) = tiles.run(model, pixels[None])
    expected = placement.feature_map(tiled).features.numpy()
    windows = {"window": 8 * model.patch_px, "overlap": tiles.overlap * model.patch_px}
    for name in ("f.tif", "f.zarr"):
        summary = model.extract_raster(draw(rgb), tmp_path / name, **windows)
        assert (
            summary.windows
            == tiles.tiling((pixels.shape[1] // model.patch_px, pixels.shape[2] // model.patch_px)).count
        )
        assert summary.windows > 2
    assert np.array_equal(features_of(tmp_path / "f.tif"), expected)
    assert np.array_equal(zarr.open(tmp_path / "f.zarr", mode="r")[:], expected)


def test_the_satellite_models_have_their_own_normalisation(random_model, rgb, draw, tmp_path):
    model = random_model("dinov3-vitl16-sat493m", kind="universal").eval()
    model.extract_raster(draw(rgb[:, :32, :64]), tmp_path / "f.tif")
    mean, std = (torch.tensor(values)[:, None, None] for values in (SATELLITE_MEAN, SATELLITE_STD))
    with torch.no_grad():
        (expected,) = model(((torch.tensor(rgb[:, :32, :64]) / 255 - mean) / std)[None])
    torch.testing.assert_close(torch.tensor(features_of(tmp_path / "f.tif")), expected, rtol=1e-5, atol=1e-5)


def test_bands_are_chosen_and_stretched(guided, rgb, draw, tmp_path):
    """Four bands of 16 bits, of which the last three in reverse are red, green and blue, stretched over their range."""
    deep = np.stack([np.full_like(rgb[0], 9), *rgb[::-1]]).astype(np.uint16) * 40 + 100
    path = draw(deep, descriptions=["coastal", "blue", "green", "red"])
    summary = guided.extract_raster(path, tmp_path / "f.tif", bands=(4, 3, 2), value_range=(100, 100 + 255 * 40))
    assert summary.bands == "4 (red), 3 (green), 2 (blue)"
    np.testing.assert_allclose(features_of(tmp_path / "f.tif"), whole_map(guided, rgb), rtol=1e-4, atol=1e-5)
    with rasterio.open(tmp_path / "f.tif") as file:
        tags = file.tags()
    assert tags["BRIXEL_BANDS"] == summary.bands
    assert tags["BRIXEL_SCALING"] == summary.scaling == "the given range: " + ", ".join(["100 to 10300"] * 3)
    assert tags["BRIXEL_STRIDE_PX"] == "3.5"


def test_one_band_is_grey(guided, rgb, draw, tmp_path):
    guided.extract_raster(draw(rgb[:1]), tmp_path / "f.tif")
    assert np.array_equal(features_of(tmp_path / "f.tif"), whole_map(guided, rgb[[0, 0, 0]]))


def test_another_scale_and_half_precision(guided, rgb, draw, tmp_path):
    summary = guided.extract_raster(draw(rgb), tmp_path / "f.zarr", scale=2, save_dtype="float16")
    array = zarr.open(tmp_path / "f.zarr", mode="r")
    assert (array.dtype, array.shape, summary.stride_px) == (np.float16, (64, 19, 38), 7.0)
    assert array.metadata.dimension_names == ("feature", "y", "x")
    np.testing.assert_array_equal(array[:], whole_map(guided, rgb, scale=2).astype(np.float16))


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("crs", "transform"), [("EPSG:32633", UTM), ("EPSG:4326", GEOGRAPHIC), ("EPSG:32633", ROTATED), (None, UTM)]
)
def test_cells_lie_where_their_pixels_do(crs, transform, guided, rgb, draw, tmp_path):
    path = draw(rgb[:, :71, :101], crs=crs, transform=transform)
    summary = guided.extract_raster(path, tmp_path / "f.tif", window=56, overlap=14)
    guided.extract_raster(path, tmp_path / "f.zarr", window=56, overlap=14)
    array = zarr.open(tmp_path / "f.zarr", mode="r")
    rows, columns = np.mgrid[: summary.shape[1], : summary.shape[2]].reshape(2, -1)
    with rasterio.open(path) as source, rasterio.open(tmp_path / "f.tif") as cells:
        x, y = map(np.asarray, cells.xy(rows, columns))  # centres of cells, by rasterio
        column_px, row_px = ~source.transform @ (x, y)
        np.testing.assert_allclose(column_px, (columns + 0.5) * 3.5, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row_px, (rows + 0.5) * 3.5, rtol=0, atol=1e-6)
        assert cells.crs == source.crs
        assert tuple(cells.transform)[:6] == tuple(array.attrs["transform"])
        if crs is not None:
            assert rasterio.CRS.from_wkt(array.attrs["crs_wkt"]) == source.crs
        # the first cell's corner is the raster's, and the last cell covers its last pixel
        assert cells.transform @ (0, 0) == source.transform @ (0, 0)
        assert 0 <= summary.shape[1] * 3.5 - source.height < 3.5
        assert 0 <= summary.shape[2] * 3.5 - source.width < 3.5


def test_control_points_are_kept(guided, rgb, draw, tmp_path):
    points = [
        GroundControlPoint(row, column, 10 + column / 7, 50 - row / 9) for row, column in ((0, 0), (0, 70), (35, 7))
    ]
    path = draw(rgb, gcps=points, transform=None)
    guided.extract_raster(path, tmp_path / "f.tif")
    with rasterio.open(tmp_path / "f.tif") as cells:
        found, crs = cells.gcps
    assert crs == rasterio.CRS.from_epsg(32633)
    assert [(point.row * 3.5, point.col * 3.5, point.x, point.y) for point in found] == [
        (point.row, point.col, point.x, point.y) for point in points
    ]


def test_an_image_without_coordinates(guided, rgb, tmp_path):
    """Coordinates are then pixels of the image."""
    path = tmp_path / "scene.png"
    Image.fromarray(rgb.transpose(1, 2, 0)).save(path)
    guided.extract_raster(path, tmp_path / "f.tif")
    with rasterio.open(tmp_path / "f.tif") as cells:
        assert (cells.crs, cells.transform) == (None, Affine.scale(3.5))


# ---------------------------------------------------------------- no data


def naive_has_data(valid, stride, map_hw):
    """Whether at least half of each cell's part of the raster holds data, by sampling it finely."""
    fine = np.kron(valid, np.ones((2, 2)))  # strides are multiples of half a pixel
    side, found = round(2 * stride), np.zeros(map_hw, bool)
    for row, column in np.ndindex(*map_hw):
        found[row, column] = fine[row * side : (row + 1) * side, column * side : (column + 1) * side].mean() >= 0.5
    return found


@pytest.fixture
def valid():
    """Where the waves hold data: not in a corner, along a ragged line, nor in single pixels."""
    valid = np.ones((80, 120), bool)
    valid[50:, :43] = False
    valid[np.arange(80), 90 + np.arange(80) % 7] = False
    valid[3:40:10, 3:70:10] = False
    return valid


@pytest.mark.slow
def test_cells_without_data_are_kept(guided, rgb, draw, tmp_path, valid):
    deep = rgb[:, :80, :120].astype(np.uint16) + 1
    marked = {
        "nodata": draw(np.where(valid, deep, 0), "a.tif", nodata=0),
        "another": draw(np.where(valid, deep, 65535), "b.tif", nodata=65535),
        "a mask": draw(np.where(valid, deep, 777), "c.tif", mask=valid),
        "opacity": draw(
            np.concatenate([np.where(valid, deep, 5), valid[None] * np.uint16(65535)]),
            "d.tif",
            colours=("red", "green", "blue", "alpha"),
        ),
        "NaN": draw(np.where(valid, deep, np.nan).astype(np.float32), "e.tif"),
        "infinity": draw(np.where(valid, deep, np.inf).astype(np.float32), "f.tif"),
        "the user": draw(np.where(valid, deep, 999), "g.tif"),
    }
    maps = {}
    for name, path in marked.items():
        out = tmp_path / f"{path.stem}-features.tif"
        nodata = 999 if name == "the user" else None
        guided.extract_raster(path, out, window=56, overlap=14, value_range=(1, 256), nodata=nodata)
        maps[name] = features_of(out)
    first = maps["nodata"]
    assert np.array_equal(~np.isnan(first[0]), naive_has_data(valid, 3.5, first.shape[1:]))
    assert all(np.array_equal(np.isnan(band), np.isnan(first[0])) for band in first)
    for name, features in maps.items():  # what lies there otherwise does not matter
        assert np.array_equal(features, first, equal_nan=True), name


def test_windows_without_data_are_not_computed(guided, rgb, draw, tmp_path, monkeypatch):
    values = np.zeros((3, 300, 500), np.uint8)
    values[:, 20:50, 400:450] = 7
    path = draw(values, nodata=0, sparse_ok=True, tiled=True, blockxsize=64, blockysize=64)
    calls = []
    run = module._Run._pixels
    monkeypatch.setattr(module._Run, "_pixels", lambda *arguments: calls.append(1) or run(*arguments))
    summary = guided.extract_raster(path, tmp_path / "f.tif", window=112, overlap=28)
    assert (summary.windows, summary.computed, summary.empty, len(calls)) == (24, 2, 22, 2)
    cells = features_of(tmp_path / "f.tif")[0]
    assert np.array_equal(~np.isnan(cells), naive_has_data(values[0] > 0, 3.5, cells.shape))


def test_a_raster_without_data_has_features_without_data(guided, draw, tmp_path, caplog):
    path = draw(np.zeros((3, 60, 60), np.uint8), nodata=0)
    assert guided.extract_raster(path, tmp_path / "f.zarr").empty == 1
    assert np.isnan(zarr.open(tmp_path / "f.zarr", mode="r")[:]).all()
    assert "has no data in its bands" in caplog.text
    deep = draw(np.zeros((3, 60, 60), np.uint16), "deep.tif", nodata=0)
    with pytest.raises(BrixelError, match=r"has no pixel with data in its bands 1, 2, 3"):
        guided.extract_raster(deep, tmp_path / "g.tif")


# ---------------------------------------------------------------- runs that stop


WINDOWS = {"window": 112, "overlap": 28}


@pytest.fixture
def stop_after(monkeypatch):
    """Make the reading of window number N raise KeyboardInterrupt, once."""

    def arm(count):
        read, left = geotiff._GeoTiff.read, [count]

        def interrupted(*arguments):
            left[0] -= 1
            if left[0] < 0:
                monkeypatch.setattr(geotiff._GeoTiff, "read", read)
                raise KeyboardInterrupt
            return read(*arguments)

        monkeypatch.setattr(geotiff._GeoTiff, "read", interrupted)

    return arm


@pytest.mark.parametrize("ending", [".tif", ".zarr"])
def test_a_stopped_run_goes_on_to_the_same_bytes(ending, guided, rgb, draw, tmp_path, stop_after):
    path, out = draw(rgb), tmp_path / f"stopped{ending}"
    for count in (1, 2):
        stop_after(count)
        with pytest.raises(KeyboardInterrupt):
            guided.extract_raster(path, out, **WINDOWS)
        assert not out.exists()
    (tmp_path / f"stopped{ending}.partial" / ".0123456789abcdef0123456789abcdef.part.npy").write_bytes(b"cut off")
    summary = guided.extract_raster(path, out, **WINDOWS)
    assert (summary.windows, summary.resumed, summary.computed) == (6, 3, 3)
    at_once = tmp_path / f"at-once{ending}"
    assert guided.extract_raster(path, at_once, **WINDOWS).resumed == 0
    assert content(out) == content(at_once)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_stopped_while_blending_goes_on(guided, rgb, draw, tmp_path, monkeypatch):
    path = draw(rgb)
    for name in ("f.tif", "f.zarr"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "put_in_place", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(BrixelError, match=r"windows that were finished are kept: free some space"):
                guided.extract_raster(path, tmp_path / name, **WINDOWS)
        assert guided.extract_raster(path, tmp_path / name, **WINDOWS).resumed == 6
    assert np.array_equal(zarr.open(tmp_path / "f.zarr", mode="r")[:], features_of(tmp_path / "f.tif"))


@pytest.mark.skipif(sys.platform == "win32", reason="sizes of files cannot be limited there")
def test_a_full_disk_leaves_what_is_finished(guided, rgb, draw, tmp_path):
    """Files cannot grow beyond 600 kB: windows fit into that, the GeoTIFF does not."""
    import resource

    path, limits = draw(rgb), resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for most, finished in ((200_000, 0), (600_000, 6)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            with pytest.raises(BrixelError, match=r"windows that were finished are kept: free some space"):
                guided.extract_raster(path, tmp_path / "f.tif", **WINDOWS)
            assert len(list((tmp_path / "f.tif.partial").glob("window-*.npy"))) == finished
            assert not (tmp_path / "f.tif").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert guided.extract_raster(path, tmp_path / "f.tif", **WINDOWS).resumed == 6


def test_a_cut_off_window_is_computed_again(guided, rgb, draw, tmp_path, stop_after):
    path, out = draw(rgb), tmp_path / "f.tif"
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        guided.extract_raster(path, out, **WINDOWS)
    first = tmp_path / "f.tif.partial" / "window-00000-00000.npy"
    first.write_bytes(first.read_bytes()[:-8])
    assert guided.extract_raster(path, out, **WINDOWS).resumed == 2


def test_other_settings_do_not_go_on(guided, rgb, draw, tmp_path, stop_after):
    path, out = draw(rgb), tmp_path / "f.tif"
    stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        guided.extract_raster(path, out, **WINDOWS)
    for options, name in (
        ({"overlap": 42}, "windows: "),
        ({"bands": 1}, "bands: 1"),
        ({"stretch": (0, 100)}, "scaling: "),
    ):
        with pytest.raises(BrixelError, match=rf"windows of a run with other settings \({name}.*--overwrite to forget"):
            guided.extract_raster(path, out, **{**WINDOWS, **options})
    (tmp_path / "f.tif.partial" / "run.json").write_text("{")
    with pytest.raises(BrixelError, match="run.json"):
        guided.extract_raster(path, out, **WINDOWS)
    summary = guided.extract_raster(path, out, **WINDOWS, bands=1, overwrite=True)
    assert (summary.resumed, summary.computed) == (0, 6)


@pytest.mark.slow
def test_an_output_is_replaced_only_when_asked(guided, rgb, draw, tmp_path):
    path = draw(rgb)
    for name in ("f.tif", "f.zarr"):
        out = tmp_path / name
        guided.extract_raster(path, out)
        before = content(out)
        with pytest.raises(BrixelError, match=r"exists: give another name, or --overwrite"):
            guided.extract_raster(path, out, bands=1)
        assert content(out) == before
        guided.extract_raster(path, out, bands=1, overwrite=True)
        assert content(out) != before
        assert sorted(file.name for file in tmp_path.iterdir() if "partial" in file.name) == []
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "zarr.json").write_text(json.dumps({"attributes": {}}))
    with pytest.raises(BrixelError, match="no feature raster of brixel, so it is not replaced"):
        guided.extract_raster(path, tmp_path / "mine.zarr", overwrite=True)


def test_two_runs_do_not_write_one_output(guided, rgb, draw, tmp_path):
    from filelock import FileLock

    (tmp_path / "f.tif.partial").mkdir()
    with FileLock(tmp_path / "f.tif.partial" / ".lock"), pytest.raises(BrixelError, match="another run writes to"):
        guided.extract_raster(draw(rgb), tmp_path / "f.tif")


# ---------------------------------------------------------------- what is refused


def test_bands_have_to_be_chosen(guided, rgb, draw, tmp_path):
    four = draw(np.concatenate([rgb, rgb[:1]]).astype(np.uint16), descriptions=["B2", "B3", "B4", "B8 at 842 nm"])
    with pytest.raises(
        BrixelError, match=r"has 4 bands, .* bands=3,2,1: 1 \(B2\), 2 \(B3\), 3 \(B4\), 4 \(B8 at 842 nm\)"
    ):
        guided.extract_raster(four, tmp_path / "f.tif")
    for bands in ((1, 2), (1, 2, 5), (1, 2, 3, 4)):
        with pytest.raises(BrixelError, match=r"expected one, which becomes grey, or three"):
            guided.extract_raster(four, tmp_path / "f.tif", bands=bands)
    for bands in ((0, 1, 2), "red", (1.5,), ()):
        with pytest.raises(BrixelError, match="bands is"):
            guided.extract_raster(four, tmp_path / "f.tif", bands=bands)


def test_kinds_of_rasters_that_have_no_brightness(guided, rgb, draw, tmp_path):
    with pytest.raises(BrixelError, match="numbers of type complex64"):
        guided.extract_raster(draw(rgb[:1].astype(np.complex64)), tmp_path / "f.tif")
    palette = draw(rgb[:1] % 4, "palette.tif")
    with rasterio.open(palette, "r+") as file:
        file.write_colormap(1, {number: (number, 0, 9, 255) for number in range(4)})
    with pytest.raises(BrixelError, match="gdal_translate -expand rgb"):
        guided.extract_raster(palette, tmp_path / "f.tif")


def test_wrong_arguments(guided, rgb, draw, tmp_path):
    path, out = draw(rgb), tmp_path / "f.tif"
    for options, message in (
        ({"window": 100, "overlap": 100}, r"overlap is 100 px \(8 patches of 14 px\) and window is 100 px \(7 patches"),
        ({"window": 0}, "window is 0"),
        ({"overlap": -1}, "overlap is -1"),
        ({"stretch": (98, 2)}, r"stretch is \(98.0, 2.0\); expected two percentiles"),
        ({"value_range": (5, 5)}, "expected two numbers, the smaller first"),
        ({"value_range": (0, 5), "stretch": (2, 98)}, "two answers to one question"),
        ({"level": 0, "um_per_px": 0.5}, "two answers to one question"),
        ({"save_dtype": "float16"}, "GDAL has no float16 before 3.11; write .zarr"),
        ({"save_dtype": "int8"}, "save_dtype is 'int8'"),
        ({"scale": 0}, "scale"),
        ({"memory_limit": "lots"}, "no amount of memory"),
    ):
        with pytest.raises(BrixelError, match=message):
            guided.extract_raster(path, out, **options)
    with pytest.raises(BrixelError, match=r"ends in '\.npy'; a feature raster is .* in \.tif, \.tiff, \.zarr"):
        guided.extract_raster(path, tmp_path / "f.npy")
    with pytest.raises(BrixelError, match="its folder does not exist"):
        guided.extract_raster(path, tmp_path / "no" / "f.tif")
    with pytest.raises(BrixelError, match="is the raster itself"):
        guided.extract_raster(path, path, overwrite=True)
    for missing in (tmp_path / "none.tif", tmp_path, "https://example.com/scene.tif", "/vsicurl/x"):
        with pytest.raises(MissingFileError, match="expected the file of a raster on this machine"):
            guided.extract_raster(missing, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scene.tif"]


def test_damaged_files(guided, rgb, draw, tmp_path):
    path = draw(rgb, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    whole = path.read_bytes()
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ImageError, match="cannot be read as a raster"):
        guided.extract_raster(tmp_path / "text.tif", tmp_path / "f.tif")
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ImageError, match=r"cannot be read (as a raster|in rows 0 to)"):
        guided.extract_raster(path, tmp_path / "f.tif")
    assert not (tmp_path / "f.tif").exists()


def test_a_window_that_does_not_fit_names_a_smaller_one(guided, rgb, draw, tmp_path):
    with pytest.raises(MemoryLimitError, match=r"140x266 px does not fit .* give a smaller window=, such as 133"):
        guided.extract_raster(draw(rgb), tmp_path / "f.tif", memory_limit="33MiB")


@pytest.mark.parametrize(
    ("module_name", "out", "message"),
    [
        ("rasterio", "f.tif", r"rasters need 'rasterio': pip install 'brixel\[geo\]'"),
        ("zarr", "f.zarr", r"'brixel\[geo\]'"),
    ],
)
def test_a_missing_extra_is_named(module_name, out, message, guided, rgb, draw, tmp_path, monkeypatch):
    path = draw(rgb)
    monkeypatch.setitem(sys.modules, module_name, None)
    with pytest.raises(BrixelError, match=message):
        guided.extract_raster(path, tmp_path / out)
