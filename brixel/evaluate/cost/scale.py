"""Images per second of `brixel extract` by one process, and by the actors of Ray on the same machine."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.distributed.cluster import connected
from brixel.distributed.ray import extract_dataset
from brixel.evaluate.cost.throughput import draw_images
from brixel.evaluate.cost.timing import seconds_of
from brixel.evaluate.report import Report
from brixel.extraction import extract_files
from brixel.images.find_images import find_images
from brixel.utils.devices import describe_machine, dtype_name

LOCAL = "one process"
_LONGER = 3  # times as many images in the longer of two runs
_COLUMNS = {
    **{"what": ("engine", ""), "per_second": ("images/s, median", ".2f"), "per_second_range": ("min to max", ".2f")},
    **{"ratio": ("of one process", ".1%"), "start_s": ("s before and after", ".1f")},
}


def scale_table(
    name: str, *, actors: Sequence[int] = (1, 2), count: int = 64, image_hw: tuple[int, int], rounds: int = 3
) -> Report:
    """Measure what Ray costs, and what it gains, on drawings and this machine's CPU.

    Every engine extracts ``count`` images, and three times as many. What the difference takes is the speed; what a run
    takes beside, such as for starting processes and loading the model, is a column of its own.

    Args:
        name: The model, as :meth:`brixel.BrixelFeatures.from_pretrained` takes it.
        actors: Numbers of actors, with a core each.
        count: Images in the shorter run.
        image_hw: Size of the drawings in pixels.
        rounds: Rounds in which all engines run in turn.

    Returns:
        A row for one process, and for every number of actors.
    """
    model = BrixelFeatures.from_pretrained(name, device="cpu")
    runs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, connected("local") as ray:
        folder = Path(temporary)
        cpus = int(ray.cluster_resources()["CPU"])
        for images in (count, _LONGER * count):
            draw_images(folder / str(images), images, image_hw)
        calls: dict[str, Callable[[Path, Path], object]] = {
            LOCAL: lambda images, out: extract_files(model, find_images([images]), out),
            **{f"Ray, {number} actor{'s' * (number > 1)}": _by_ray(name, number) for number in actors},
        }
        for _ in range(rounds):
            for what, call in calls.items():
                short, long = (_seconds(call, folder / str(images)) for images in (count, _LONGER * count))
                runs.setdefault(what, []).append((short, long))
    rows = [_row(what, seconds, runs[LOCAL], count) for what, seconds in runs.items()]
    recipe = (
        f"{name}, {dtype_name(model.dtype)}; drawings of {image_hw[0]} x {image_hw[1]} px, {count} and "
        f"{_LONGER * count} in a run, a file for each map; {rounds} rounds in turn; a thread of torch in each "
        f"actor; {cpus} CPUs; {describe_machine(model.device)}."
    )
    return Report("scale", "Scale", _COLUMNS, rows, recipe)


def _by_ray(name: str, actors: int) -> Callable[[Path, Path], object]:
    return lambda images, out: extract_dataset(images, out, model=name, actors=actors, block_images=8)


def _seconds(call: Callable[[Path, Path], object], images: Path) -> float:
    with tempfile.TemporaryDirectory() as out:
        return seconds_of(lambda: call(images, Path(out)), torch.device("cpu"))


def _row(
    what: str, seconds: Sequence[tuple[float, float]], local: Sequence[tuple[float, float]], count: int
) -> dict[str, Any]:
    more = (_LONGER - 1) * count
    speeds = [more / (long - short) for short, long in seconds]
    ratios = [(there[1] - there[0]) / (here[1] - here[0]) for there, here in zip(local, seconds, strict=True)]
    return {
        "what": what,
        "per_second": statistics.median(speeds),
        "per_second_range": (min(speeds), max(speeds)),
        "ratio": statistics.median(ratios),
        "start_s": statistics.median(short - (long - short) / (_LONGER - 1) for short, long in seconds),
        "seconds": list(seconds),
    }
