"""Rasters that are larger than memory, processes that are killed, and seams on a drawing."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio import Affine

from brixel import BrixelFeatures
from brixel.images.find_images import SCENE
from brixel.inference.rasters.windows import plan_windows
from brixel.utils.memory import parse_bytes

pytestmark = pytest.mark.slow
BLOCKS = {"tiled": True, "blockxsize": 512, "blockysize": 512}

# what was resident before, files not counted, is what the process had after it computed a small raster
WITHIN_A_LIMIT = """
import gc, json, sys
import torch
from brixel import BrixelFeatures
from brixel.inference.memory.allocation_tracker import storage_bytes
from brixel.utils.memory import status_bytes
torch.set_num_threads(1)
small, large, out, limit = sys.argv[1:]
model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
model.extract_raster(small, out + "-small.tif", window=140, overlap=28)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
resident, files = status_bytes("VmRSS"), status_bytes("RssFile")
summary = model.extract_raster(large, out, window=512, overlap=64, scale=1, memory_limit=limit)
growth = status_bytes("VmHWM") - resident - (status_bytes("RssFile") - files)
print(json.dumps({"used": growth + storage_bytes(model), "windows": summary.windows, "empty": summary.empty}))
"""


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """20,000 x 20,000 pixels of four bands of 16 bits, 3.2 GB if they were written, with data in two places."""
    path = tmp_path_factory.mktemp("sparse") / "scene.tif"
    profile = {"count": 4, "height": 20_000, "width": 20_000, "dtype": "uint16", "nodata": 0, "crs": "EPSG:32633"}
    profile |= {"transform": Affine(10, 0, 300_000, 0, -10, 5_000_000), "sparse_ok": True, "compress": "deflate"}
    generator = np.random.default_rng(0)
    with rasterio.open(path, "w", driver="GTiff", **profile, **BLOCKS) as file:
        for top, left in ((512, 1024), (19_400, 18_900)):
            values = generator.integers(1, 4000, (4, 600, 1100), dtype=np.uint16)
            file.write(values, window=rasterio.windows.Window(left, top, 1100, 600))
    assert path.stat().st_size < 20_000_000
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_raster_larger_than_memory_stays_within_the_limit(sparse, draw, rgb, tmp_path):
    small, limit = draw(rgb), "200MiB"
    # the bands of the large raster are chosen by their order
    with rasterio.open(sparse, "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp[name] for name in ("blue", "green", "red", "undefined")]
    command = [sys.executable, "-c", WITHIN_A_LIMIT, small, sparse, tmp_path / "f.tif", limit]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["used"] <= parse_bytes(limit), found
    assert found["windows"] == 45**2
    assert 0 < found["windows"] - found["empty"] < 40
    with rasterio.open(tmp_path / "f.tif") as cells, rasterio.open(sparse) as source:
        assert (cells.count, cells.shape) == (192, (1250, 1250))
        assert (tmp_path / "f.tif").stat().st_size < 500_000_000  # 1.2 GB if it were full
        for row, column in ((50, 90), (1230, 1200)):
            x, y = cells.xy(row, column)
            value = cells.read(1, window=rasterio.windows.Window(column, row, 1, 1))
            data = source.read(1, window=rasterio.windows.Window(*(~source.transform @ (x, y)), 1, 1))
            assert np.isfinite(value).all()
            assert data.any()
        assert np.isnan(cells.read(1, window=rasterio.windows.Window(600, 600, 100, 100))).all()


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    """Killed twice between two windows, wherever that falls."""
    scene = np.asarray(Image.open(SCENE).convert("RGB").resize((800, 600))).transpose(2, 0, 1)
    path = tmp_path / "scene.tif"
    size = {"count": 3, "height": 600, "width": 800, "dtype": "uint8", "crs": "EPSG:4326"}
    with rasterio.open(path, "w", driver="GTiff", transform=Affine.scale(1e-4), **size) as file:
        file.write(scene)
    command = [sys.executable, "-m", "brixel", "extract", str(path), "--model", "brixel-tiny", "--window", "224"]
    command += ["--overlap", "56", "--stretch", "2,98", "-o"]
    out = tmp_path / "killed.tif"
    for finished in (2, 6):
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
        try:
            while len(list((tmp_path / "killed.tif.partial").glob("window-*.npy"))) < finished:
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not out.exists()
    done = subprocess.run([*command, str(out), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["resumed"] >= 6
    subprocess.run([*command, str(tmp_path / "at-once.tif")], capture_output=True, check=True)
    assert out.read_bytes() == (tmp_path / "at-once.tif").read_bytes()
    assert not (tmp_path / "killed.tif.partial").exists()


def features_of(path):
    with rasterio.open(path) as file:
        return file.read()


def jumps(features):
    """Mean distance of neighbouring rows, one for each border between rows: (H - 1,)."""
    return np.linalg.norm(features[:, 1:] - features[:, :-1], axis=0).mean(axis=-1)


def test_seams_are_no_larger_than_what_is_inside(tmp_path):
    """Where windows begin and end, the step from cell to cell is no larger than elsewhere."""
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    Image.open(SCENE).convert("RGB").resize((560, 560)).save(tmp_path / "scene.png")
    model.extract_raster(tmp_path / "scene.png", tmp_path / "f.tif", window=224, overlap=64)
    starts = plan_windows((560, 560), 16, 4, 224, 64).tiling.tops
    borders = sorted({4 * top - 1 for top in starts[1:]} | {4 * (top + 14) - 1 for top in starts[:-1]})
    for cells in (features_of(tmp_path / "f.tif"), features_of(tmp_path / "f.tif").transpose(0, 2, 1)):
        steps = jumps(cells)
        assert steps[borders].max() <= np.delete(steps, borders).max()


def test_blending_takes_away_what_a_cut_would_show(tmp_path):
    """Two windows: a cut between them adds their difference to the step there; blended, a small part of it is added."""
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    scene = Image.open(SCENE).convert("RGB").resize((224, 384))
    scene.save(tmp_path / "scene.png")
    assert model.extract_raster(tmp_path / "scene.png", tmp_path / "f.tif", window=224, overlap=64).windows == 2
    blended = features_of(tmp_path / "f.tif")
    upper, lower = (
        model.extract(scene.crop((0, top, 224, top + 224)), short_side_px="native").features.numpy() for top in (0, 160)
    )
    between = slice(40, 56)  # the rows of cells that both have
    difference = np.linalg.norm(upper[:, between] - lower[:, :16], axis=0).mean(axis=-1)
    added = [
        np.linalg.norm((blended[:, row] - blended[:, row - 1]) - (own[:, at] - own[:, at - 1]), axis=0).mean()
        for row, own, at in ((40, upper, 40), (56, lower, 16))
    ]
    assert np.array_equal(blended[:, :40], upper[:, :40])
    assert np.array_equal(blended[:, 56:], lower[:, 16:])
    assert max(added) < difference.mean() / 8
