"""Whether limits of memory hold in fact: the resident memory of new processes that compute an image within a limit."""

import gc
import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brixel.backbones.registry import BUNDLED_BACKBONES
from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError, MemoryLimitError
from brixel.evaluate.cost.timing import check_side, random_model
from brixel.evaluate.report import Report
from brixel.images.patch_grid import NATIVE
from brixel.inference.memory.allocation_tracker import storage_bytes
from brixel.utils.devices import describe_machine, dtype_name
from brixel.utils.memory import status_bytes

SHARES = (1.0, 0.6, 0.4)
_HOST = torch.device("cpu")
_WARM_UP_PATCHES = 10
_AMPLE = 2**60
_CLEAR = Path("/proc/self/clear_refs")


def resident_table(names: Sequence[str], image_px: Sequence[int], dtype: torch.dtype) -> Report:
    """Compute square images within limits, each in a new process, and compare its memory with the limit.

    Args:
        names: Models of the package, and architectures, which get random weights.
        image_px: Sides of the images.
        dtype: Of the weights.

    Returns:
        A row per model, side and limit. The limits leave the weights and some share of what a whole pass needs.

    Raises:
        BrixelError: A name is not known, a side does not fit it, or this system does not report resident memory.
    """
    if not _CLEAR.exists():
        raise BrixelError("resident memory is read from /proc/self, which this system does not have; use Linux")
    for name, side in itertools.product(names, image_px):
        if name not in BUNDLED_BACKBONES:
            check_side(name, side)
    rows = []
    for name, side, share in itertools.product(names, image_px, SHARES):
        arguments = (name, side, share, dtype, torch.get_num_threads())
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(_measure, *arguments).result())
    columns = {
        "model": ("model", ""),
        "dtype": ("dtype", ""),
        "image_px": ("image, px", "d"),
        "limit_bytes": ("limit", "bytes"),
        "weight_bytes": ("of it weights", "bytes"),
        "strategy": ("strategy", ""),
        "planned_bytes": ("planned", "bytes"),
        "resident_bytes": ("resident growth and weights", "bytes"),
        "share": ("of the limit", ".1%"),
    }
    note = (
        "Each row is a new process that has loaded the model and computed a small image. Growth is the peak of "
        "resident memory, files not counted, less what was resident before."
    )
    title, recipe = "Limits of memory and resident memory", describe_machine(_HOST) + "."
    return Report("resident", title, columns, rows, recipe, (note,))


def _measure(name: str, side_px: int, share: float, dtype: torch.dtype, threads: int) -> dict[str, Any]:
    """The row of one case; runs in a process of its own."""
    torch.set_num_threads(threads)
    if name in BUNDLED_BACKBONES:
        model = BrixelFeatures.from_pretrained(name, device="cpu", dtype=dtype)
    else:
        model = random_model(name).to(dtype)
    warm_up_px = _WARM_UP_PATCHES * model.patch_px
    model.extract(np.zeros((warm_up_px, warm_up_px, 3), np.uint8), short_side_px=NATIVE)
    weights, image_hw = storage_bytes(model), (side_px, side_px)
    whole = model.plan(image_hw, short_side_px=NATIVE, memory_limit=_AMPLE).peak_bytes
    limit = weights + int(share * (whole - weights))
    row = {
        "model": name,
        "dtype": dtype_name(dtype),
        "image_px": side_px,
        "limit_bytes": limit,
        "weight_bytes": weights,
    }
    try:
        plan = model.plan(image_hw, short_side_px=NATIVE, memory_limit=limit)
    except MemoryLimitError:
        return {**row, "strategy": "refused: nothing fits"}
    image = np.random.default_rng(0).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    gc.collect()
    _CLEAR.write_text("5", encoding="ascii")  # the peak starts anew
    resident, files = status_bytes("VmRSS"), status_bytes("RssFile")
    model.extract(image, short_side_px=NATIVE, memory_limit=limit)
    growth = status_bytes("VmHWM") - resident - (status_bytes("RssFile") - files)
    return {
        **row,
        "strategy": plan.strategy,
        "planned_bytes": plan.peak_bytes,
        "resident_bytes": weights + growth,
        "share": (weights + growth) / limit,
    }
