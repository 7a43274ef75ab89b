"""Images per second of the whole pipeline beside the bare model on pixels that lie in memory."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from brixel.backbones.registry import known_backbone
from brixel.backbones.vit import ViT
from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.fingerprint import fingerprint
from brixel.extraction import extract_files
from brixel.images.find_images import SCENE, find_images
from brixel.model.config import AdapterConfig, BackboneConfig, BrixelConfig, default_blocks
from brixel.model.upsampler import Upsampler
from brixel.utils.devices import describe_machine, dtype_name

BARE, STREAM, EXTRACT = "bare model, pixels in memory", "stream, from files", "extract, files to files"


@dataclass(frozen=True)
class Result:
    """Seconds of every round for all images, by what was done; the recipe."""

    title: str
    images: int
    seconds: Mapping[str, Sequence[float]]
    recipe: str


def random_model(architecture: str) -> BrixelFeatures:
    """A model of a known shape with random weights, for figures that do not depend on them."""
    torch.manual_seed(0)
    vit = ViT(known_backbone(architecture).vit).requires_grad_(False)
    adapter = AdapterConfig(default_blocks(vit.depth), residual_detour=False, short_side_px=256, blend=True)
    upsampler = Upsampler(vit.width, adapter)
    nn.init.normal_(upsampler.head.out.weight, std=0.02)
    described = BackboneConfig(architecture, (), vit.config, fingerprint(vit))
    return BrixelFeatures(vit, upsampler, BrixelConfig(described, adapter)).eval()


def draw_images(folder: Path, count: int, image_hw: tuple[int, int]) -> None:
    """JPEG files of one size, cut from the drawing that comes with brixel, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = image_hw
    with Image.open(SCENE) as scene:
        drawn = scene.convert("RGB").resize((width + 64, height + 64))
    for number in range(count):
        left, top = number * 7 % 64, number * 13 % 64
        drawn.crop((left, top, left + width, top + height)).save(folder / f"{number:05}.jpg", quality=90)


def measure(model: BrixelFeatures, images: Path, *, rounds: int, batch_size: int, workers: int) -> Result:
    """Time the three, in turn within each round and after one round that does not count, over all images below."""
    found = find_images([images])
    paths = [path for path, _ in found]
    prepare = model.preparation()
    prepared = [prepare(path) for path in paths]
    pixels = [each for each, _ in prepared]
    batches = [torch.stack(pixels[first : first + batch_size]) for first in range(0, len(pixels), batch_size)]

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(model.device, model.dtype)).cpu()

    def stream() -> None:
        for _ in model.stream(paths, batch_size=batch_size, workers=workers):
            pass

    def extract() -> None:
        extract_files(model, found, folder, batch_size=batch_size, workers=workers)

    calls = {BARE: bare, STREAM: stream, EXTRACT: extract}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            with tempfile.TemporaryDirectory() as temporary:  # emptied after the clock has stopped
                folder = Path(temporary)
                elapsed = _seconds(call)
            if turn >= 0:
                seconds[name].append(elapsed)
    stored, seen = ("{} x {} px".format(*each) for each in (prepared[0][1].geometry.image_hw, pixels[0].shape[-2:]))
    recipe = (
        f"{len(paths)} images, the first of {stored}, {seen} as the model sees it, {dtype_name(model.dtype)}, "
        f"batches of {batch_size}, {workers} threads that decode ahead, {rounds} rounds in turn; "
        f"{describe_machine(model.device)}."
    )
    return Result(model.config.backbone.title, len(paths), seconds, recipe)


def report(results: Sequence[Result], command: str) -> str:
    """The results as Markdown: medians, ranges, and medians of the ratio to the bare model of the same round."""
    lines = [
        "# What reading and writing cost beside the model",
        "",
        "| backbone | what | images/s: median (min to max) | of the bare model's |",
        "| --- | --- | ---: | ---: |",
        *(row for result in results for row in _rows(result)),
        "",
        *dict.fromkeys(result.recipe for result in results),
        "Ratios are medians over the rounds. Made by:",
        "",
        f"    {command}",
    ]
    return "\n".join(lines)


def _rows(result: Result) -> Iterator[str]:
    for name, seconds in result.seconds.items():
        speeds = sorted(result.images / each for each in seconds)
        ratio = statistics.median(a / b for a, b in zip(result.seconds[BARE], seconds, strict=True))
        middle = statistics.median(speeds)
        yield f"| {result.title} | {name} | {middle:.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f}) | {100 * ratio:.1f} % |"


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
