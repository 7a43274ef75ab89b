"""`brixel throughput`: how much of the model's speed is left from files to files."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import (
    REPORT_HELP,
    add_device_options,
    check_report,
    command,
    height_by_width,
    positive,
    tell,
    whole,
)
from brixel.evaluate.cost.throughput import draw_images, measure, random_model, report
from brixel.utils.devices import choose_device, choose_dtype

TINY = "brixel-tiny"


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    one = command(commands, "throughput", _throughput, "images per second from files to files, beside the bare model")
    one.add_argument(
        "--models", nargs="+", default=(TINY,), metavar="NAME", help="known backbones, with random weights; brixel-tiny"
    )
    one.add_argument("--images", type=Path, metavar="DIR", help="images; default: drawn ones")
    one.add_argument(
        "--size", type=height_by_width, default=(480, 640), metavar="HEIGHTxWIDTH", help="of those; default: 480x640 px"
    )
    one.add_argument("--count", type=positive, default=48, help="how many are drawn; default: %(default)s")
    one.add_argument("--rounds", type=positive, default=7, help="default: %(default)s")
    one.add_argument("--batch-size", type=positive, default=1, help="default: 1")
    one.add_argument("--workers", type=whole, default=2, help="threads that decode ahead; default: %(default)s")
    one.add_argument("--threads", type=positive, help="of torch; default: its own choice")
    one.add_argument("-o", "--output", type=Path, help=REPORT_HELP)
    add_device_options(one)


def _throughput(options: argparse.Namespace) -> int:
    check_report(options.output)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        images = options.images
        if images is None:
            images = Path(folder)
            draw_images(images, options.count, options.size)
        results = []
        for model in _models(options.models):
            moved = model.to(device, dtype)
            results.append(
                measure(moved, images, rounds=options.rounds, batch_size=options.batch_size, workers=options.workers)
            )
    tell(report(results, options.command), options.output)
    return 0


def _models(names: Sequence[str]) -> list[BrixelFeatures]:
    return [BrixelFeatures.from_pretrained(device="cpu") if name == TINY else random_model(name) for name in names]
