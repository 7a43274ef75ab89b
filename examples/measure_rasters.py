"""Measures feature rasters: seams, what windows cost, and memory. Prints the tables of docs/results/rasters.md.

python examples/measure_rasters.py PHOTOGRAPH [MODEL ...]
"""

import gc
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image

from brixel import BrixelFeatures
from brixel.inference.memory.allocation_tracker import storage_bytes
from brixel.inference.rasters.windows import plan_windows
from brixel.utils.markdown import markdown_table
from brixel.utils.memory import format_bytes, parse_bytes, status_bytes

SIDE, WINDOW, OVERLAPS = 768, 384, (0, 128)
ROUNDS = 3
LIMIT, RASTER_SIDES = "200MiB", (1024, 2048, 4096)


def show(heads: tuple[str, ...], rows: list[list[object]]) -> None:
    print("\n".join(markdown_table(heads, [[str(cell) for cell in row] for row in rows])), end="\n\n", flush=True)


def features_of(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def steps(features: np.ndarray) -> np.ndarray:
    """Mean distance of neighbouring rows of cells."""
    return np.linalg.norm(np.diff(features, axis=1), axis=0).mean(axis=-1)


def turned(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features, features.transpose(0, 2, 1)


def seams(name: str, image: Path, folder: Path) -> list[list[object]]:
    """By overlap: the largest steps where windows end and inside, and the mean ratios to the whole map's."""
    model = BrixelFeatures.from_pretrained(name, device="cpu")
    whole = model.extract(image, short_side_px="native").features.numpy()
    rows = []
    for overlap in OVERLAPS:
        out = folder / f"{name}-{overlap}.tif"
        summary = model.extract_raster(image, out, window=WINDOW, overlap=overlap)
        features = features_of(out)
        starts = plan_windows((SIDE, SIDE), model.patch_px, model.scale, WINDOW, overlap).tiling.tops
        length = model.scale * summary.window_px[0] // model.patch_px
        firsts = [model.scale * start for start in starts]
        ends = sorted({first - 1 for first in firsts[1:]} | {first + length - 1 for first in firsts[:-1]})
        both = [(steps(cells), steps(ours)) for cells, ours in zip(turned(features), turned(whole), strict=True)]
        largest = (
            max(float(one[ends].max()) for one, _ in both),
            max(float(np.delete(one, ends).max()) for one, _ in both),
        )
        ratios = [one / ours for one, ours in both]
        at_ends = float(np.mean([one[ends] for one in ratios]))
        inside = float(np.mean([np.delete(one, ends) for one in ratios]))
        cosine = (features * whole).sum(0) / np.linalg.norm(features, axis=0) / np.linalg.norm(whole, axis=0)
        numbers = (*largest, at_ends, inside, 1 - float(cosine.mean()))
        rows.append([name, summary.overlap_px, summary.windows, *(f"{number:.4g}" for number in numbers)])
    return rows


def seconds(name: str, image: Path, folder: Path) -> list[list[object]]:
    """Median time of the whole map, and of feature rasters in windows, with reading and writing."""
    model = BrixelFeatures.from_pretrained(name, device="cpu")
    calls = {"whole, one call of extract()": lambda: model.extract(image, short_side_px="native")}
    for window in (SIDE, WINDOW, WINDOW // 2):
        options = {"window": window, "overlap": window // 8, "overwrite": True}
        calls[f"windows of {window} px, overlap {window // 8} px"] = lambda options=options: model.extract_raster(
            image, folder / "timed.tif", **options
        )
    times: dict[str, list[float]] = {what: [] for what in calls}
    for _, (what, call) in itertools.product(range(ROUNDS), calls.items()):
        start = time.perf_counter()
        call()
        times[what].append(time.perf_counter() - start)
    medians = {what: statistics.median(found) for what, found in times.items()}
    first = next(iter(medians.values()))
    return [[name, what, f"{median:.1f}", f"{median / first:.2f}"] for what, median in medians.items()]


def resident(side: int, folder: str) -> tuple[int, int]:
    """Peak of resident memory with the weights, files not counted, and number of windows; in a process of its own."""
    torch.set_num_threads(1)
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    path = Path(folder, f"{side}.tif")
    profile = {"count": 3, "height": side, "width": side, "dtype": "uint8", "crs": "EPSG:32633"}
    blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256}
    place = {"transform": rasterio.Affine.scale(1, -1)}
    with rasterio.open(path, "w", driver="GTiff", **profile, **blocks, **place) as file:
        generator = np.random.default_rng(0)
        for _, window in file.block_windows(1):
            file.write(generator.integers(0, 256, (3, window.height, window.width), np.uint8), window=window)
    Image.new("RGB", (160, 160)).save(Path(folder, "small.png"))
    model.extract_raster(Path(folder, "small.png"), Path(folder, "small.tif"), overwrite=True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, files = status_bytes("VmRSS"), status_bytes("RssFile")
    options = {"window": 512, "overlap": 64, "scale": 1, "memory_limit": LIMIT}
    windows = model.extract_raster(path, Path(folder, f"{side}-features.tif"), **options).windows
    growth = status_bytes("VmHWM") - before - (status_bytes("RssFile") - files)
    return growth + storage_bytes(model), windows


def main() -> None:
    photograph, *names = sys.argv[1:]
    names = names or ["brixel-tiny"]
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder, image = Path(name), Path(name, "image.png")
        Image.open(photograph).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(image)
        heads = (
            "model",
            "overlap, px",
            "windows",
            "largest step at ends",
            "inside",
            "ratio at ends",
            "inside ",
            "1 - cos",
        )
        show(heads, [row for model in names for row in seams(model, image, folder)])
        heads = ("model", "how", "s", "of the whole")
        show(heads, [row for model in names for row in seconds(model, image, folder)])
        rows = []
        for side in RASTER_SIDES:
            with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
                used, windows = pool.submit(resident, side, name).result()
            rows.append([f"{side} x {side}", windows, format_bytes(used), f"{used / parse_bytes(LIMIT):.0%}"])
        show(("raster, px", "windows", "resident growth and weights", f"of {LIMIT}"), rows)


if __name__ == "__main__":
    main()
