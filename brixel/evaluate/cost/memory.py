"""Memory that students with random weights need on a CPU, predicted and measured, in two tables.

`memory_table` gives the smallest limits that work, `limit_table` what is done within given limits.
"""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from brixel.errors import BrixelError, MemoryLimitError
from brixel.evaluate.cost.timing import check_side, random_student
from brixel.evaluate.report import Report
from brixel.inference.memory.allocation_tracker import AllocationTracker, weights_and_buffers
from brixel.inference.memory.planner import TileMode, choose_strategy, strategies_by_cost
from brixel.inference.memory.prediction import Job, predict_peak, run_job
from brixel.inference.memory.strategies import Strategy, new_outputs
from brixel.model.student import Student
from brixel.utils.devices import describe_machine, dtype_name
from brixel.utils.memory import format_bytes

ARCHITECTURES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16", "dinov3-vith16plus")
SIDES = (256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16)
_HOST = torch.device("cpu")
_STRATEGIES = {"whole": "whole", "row_chunks": "row chunks", "tiles": "tiles"}
_IMAGE_COLUMNS = {"architecture": ("architecture", ""), "dtype": ("dtype", ""), "image_px": ("image, px", "d")}
_NOTES = (
    "One image, random weights. Bytes of tensors, weights included; the map goes to a file.",
    "Predicted on tensors without data, with pixels in float32; measured on real ones, one run each.",
)


def memory_table(
    architectures: Sequence[str], image_px: Sequence[int], *, measured: Mapping[str, int] | None = None
) -> Report:
    """The least memory of each strategy for square images in float32 and bfloat16, predicted.

    ``measured``: by architecture, the side up to which images are computed as well; no weights are made for others.
    Raises BrixelError for an unknown architecture, or a side that does not fit it.
    """
    measured = measured or {}
    _check((*architectures, *measured), image_px)
    if extra := [name for name in measured if name not in architectures]:
        known = ", ".join(architectures)
        raise BrixelError(f"{extra[0]} is to be measured, but is not among the architectures of the table: {known}")
    rows = []
    for architecture, dtype in itertools.product(architectures, DTYPES):
        largest_px = measured.get(architecture, 0)
        with torch.device("cpu" if largest_px else "meta"):
            student = random_student(architecture).to(dtype)
        for side in image_px:
            row = {"architecture": architecture, "dtype": dtype_name(dtype), "image_px": side}
            rows.append(row | _least(student, Job(1, (side, side), to_file=True), run=side <= largest_px))
    columns = {
        **_IMAGE_COLUMNS,
        **{kind: (name, "bytes") for kind, name in _STRATEGIES.items()},
        "measured": ("measured: whole, row chunks, tiles", ""),
    }
    smallest = "Row chunks of one row of patches, tiles of 8 x 8. A dash: not run, or too large for the kernels."
    title, recipe = "Smallest limits of memory that work", describe_machine(_HOST) + "."
    return Report("memory", title, columns, rows, recipe, (*_NOTES, smallest))


def _least(student: Student, job: Job, *, run: bool) -> dict[str, Any]:
    """Predicted bytes by strategy, and where ``run`` those measured, with seconds."""
    row: dict[str, Any] = {"measured_bytes": {}, "seconds": {}, "measured": None}
    for strategies in strategies_by_cost(student, job, "auto"):
        strategy = strategies[-1]
        row[strategy.name] = predict_peak(student, strategy, job, _HOST)
        if run:
            row["measured_bytes"][strategy.name], row["seconds"][strategy.name] = measure_peak(student, strategy, job)
    if run:
        pairs = zip(row["measured_bytes"].values(), row["seconds"].values(), strict=True)
        row["measured"] = ", ".join(f"{format_bytes(count)} in {seconds:.1f} s" for count, seconds in pairs)
    return row


def limit_table(
    architectures: Sequence[str],
    image_px: Sequence[int],
    limits: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    tiles: TileMode = "auto",
) -> Report:
    """Choose a strategy for every architecture, side and limit (bytes), compute a square image with it, and measure.

    A strategy that several limits lead to is run once. Raises BrixelError as :func:`memory_table`.
    """
    _check(architectures, image_px)
    rows = []
    for architecture in architectures:
        student = random_student(architecture).to(dtype)
        for side in image_px:
            job, measured = Job(1, (side, side), to_file=True), dict[Strategy, tuple[int, float]]()
            for limit in limits:
                row = {"architecture": architecture, "dtype": dtype_name(dtype), "image_px": side, "limit_bytes": limit}
                rows.append(row | _within(student, job, limit, tiles, measured))
    columns = {
        **_IMAGE_COLUMNS,
        **{"limit_bytes": ("limit", "bytes"), "strategy": ("strategy", "")},
        **{"predicted_bytes": ("predicted peak", "bytes"), "measured_bytes": ("measured", "bytes")},
        **{"share": ("of the prediction", ".1%"), "seconds": ("seconds", ".1f")},
    }
    return Report("limits", "Limits of memory kept", columns, rows, describe_machine(_HOST) + ".", _NOTES)


def _within(
    student: Student, job: Job, limit: int, tiles: TileMode, measured: dict[Strategy, tuple[int, float]]
) -> dict[str, Any]:
    """The strategy for a limit, and its predicted and measured peaks; ``measured`` keeps those that were run."""
    try:
        strategy = choose_strategy(student, job, limit, tiles, _HOST)
    except MemoryLimitError:
        return {"strategy": "refused: nothing fits"}
    if strategy not in measured:
        measured[strategy] = measure_peak(student, strategy, job)
    (peak, seconds), predicted = measured[strategy], predict_peak(student, strategy, job, _HOST)
    text = strategy.describe(job.grid_hw(student), student.patch_px)
    return {
        **{"strategy": text if strategy.exact else f"tiles, {text}", "kind": strategy.name},
        **{"predicted_bytes": predicted, "measured_bytes": peak},
        **{"share": peak / predicted, "seconds": seconds},
    }


def measure_peak(student: Student, strategy: Strategy, job: Job) -> tuple[int, float]:
    """Peak bytes and seconds of computing an image of noise on the CPU, counted as :func:`predict_peak` counts."""
    images = [torch.randn(3, *job.padded_hw)]
    tracker = AllocationTracker("cpu")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [  # memory-mapped files, as when maps are written to files
            torch.from_file(f"{folder}/{number}", shared=True, size=out.numel(), dtype=out.dtype).view(out.shape)
            for number, out in enumerate(new_outputs(student, images[0][None]))
        ]
        with tracker:
            tracker.track(weights_and_buffers(student))
            tracker.track(images)
            tracker.leave_out(outputs)
            start = time.perf_counter()
            run_job(student, strategy, images, outputs)
            return tracker.peak, time.perf_counter() - start


def _check(architectures: Sequence[str], image_px: Sequence[int]) -> None:
    """Check all architectures and sides before the first is measured."""
    for architecture, side in itertools.product(architectures, image_px):
        check_side(architecture, side)
