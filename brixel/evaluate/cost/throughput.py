"""Images per second of the whole pipeline, compared with the model alone on pixels in memory."""

import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from brixel.brixel_features import BrixelFeatures
from brixel.evaluate.cost.timing import seconds_of
from brixel.evaluate.report import Report
from brixel.extraction import extract_files
from brixel.images.find_images import SCENE, find_images
from brixel.utils.devices import describe_machine, dtype_name

BARE, STREAM, EXTRACT = "bare model, pixels in memory", "stream, from files", "extract, files to files"
_COLUMNS = {
    **{"backbone": ("backbone", ""), "what": ("what", ""), "per_second": ("images/s, median", ".2f")},
    **{"per_second_range": ("min to max", ".2f"), "ratio": ("of the bare model's", ".1%")},
}


def draw_images(folder: Path, count: int, image_hw: tuple[int, int]) -> None:
    """Write JPEG files of one size, all different, cut from the drawing in the package."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = image_hw
    with Image.open(SCENE) as scene:
        drawing = scene.convert("RGB").resize((width + 64, height + 64))
    for number in range(count):
        left, top = number * 7 % 64, number * 13 % 64
        drawing.crop((left, top, left + width, top + height)).save(folder / f"{number:05}.jpg", quality=90)


def throughput(
    models: Iterable[BrixelFeatures], images: Path, *, rounds: int = 7, batch_size: int = 1, workers: int = 2
) -> Report:
    """Measure how much of a model's speed is left when images are read from files and maps are written to files.

    Args:
        models: Models on their devices.
        images: A folder of images.
        rounds: Timed passes over all images, after one that is not counted.
        batch_size: Images per call of the model.
        workers: Threads that decode images.

    Returns:
        Three rows per model: images per second, and their ratio to the bare model's (medians over the rounds).
    """
    rows: list[dict[str, Any]] = []
    recipes: list[str] = []
    for model in models:
        seconds, count, shapes = _measure(model, images, rounds, batch_size, workers)
        for name, own in seconds.items():
            speeds = [count / elapsed for elapsed in own]
            ratio = statistics.median(bare / elapsed for bare, elapsed in zip(seconds[BARE], own, strict=True))
            row = {"backbone": model.config.backbone.title, "what": name, "per_second": statistics.median(speeds)}
            rows.append({**row, "ratio": ratio, "per_second_range": (min(speeds), max(speeds)), "seconds": own})
        recipes.append(
            f"{count} images, the first of {shapes}, {dtype_name(model.dtype)}, batches of {batch_size}, {workers} "
            f"threads that decode, {rounds} rounds in turn; {describe_machine(model.device)}."
        )
    return Report("throughput", "Throughput", _COLUMNS, rows, "\n".join(dict.fromkeys(recipes)))


def _measure(
    model: BrixelFeatures, images: Path, rounds: int, batch_size: int, workers: int
) -> tuple[dict[str, list[float]], int, str]:
    """Seconds of every round by what was done, in turn; the number of images; sizes of the first, in words."""
    found = find_images([images])
    paths = [path for path, _ in found]
    prepared = list(map(model.preparation(), paths))
    pixels = [tensor for tensor, _ in prepared]
    batches = [torch.stack(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(model.device, model.dtype)).cpu()

    calls: dict[str, Callable[[], object]] = {
        BARE: bare,
        STREAM: lambda: deque(model.stream(paths, batch_size=batch_size, workers=workers), maxlen=0),
        EXTRACT: lambda: extract_files(model, found, folder, batch_size=batch_size, workers=workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            with tempfile.TemporaryDirectory() as temporary:  # emptied after the clock has stopped
                folder = Path(temporary)
                elapsed = seconds_of(call, model.device)
            if turn >= 0:
                seconds[name].append(elapsed)
    stored, seen = ("{} x {} px".format(*hw) for hw in (prepared[0][1].patch_grid.image_hw, pixels[0].shape[-2:]))
    return seconds, len(paths), f"{stored}, {seen} as the model sees it"
