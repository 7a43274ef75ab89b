"""The smallest limits of memory that work, by architecture, size and dtype; random weights, predicted and measured."""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.cost.timing import check_side, random_student
from brixel.inference.memory.allocation_tracker import AllocationTracker, weights_and_buffers
from brixel.inference.memory.planner import Job, predict_peak, run_job, strategies_by_cost
from brixel.inference.memory.strategies import Strategy, new_outputs
from brixel.model.student import Student
from brixel.utils.devices import describe_machine, dtype_name
from brixel.utils.memory import format_bytes

ARCHITECTURES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16", "dinov3-vith16plus")
SIDES = (256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16)
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Least bytes of one way for one square image; measured bytes and seconds are None where it was not run."""

    architecture: str
    dtype: torch.dtype
    side_px: int
    kind: str
    predicted_bytes: int
    measured_bytes: int | None
    seconds: float | None


def memory_table(
    architectures: Sequence[str], sides_px: Sequence[int], *, measured: Mapping[str, int] | None = None
) -> list[Row]:
    """Rows for whole passes, exact pieces and tiles of square images.

    ``measured``: by architecture, the side up to which images are computed as well, on the CPU, the map going to a
    file. Where nothing is computed the weights are never made. Raises BrixelError for one that is not in the table.
    """
    rows, measured = [], measured or {}
    for architecture, side_px in itertools.product((*architectures, *measured), sides_px):
        check_side(architecture, side_px)  # an error should not cost the time of those before it
    if left_out := [each for each in measured if each not in architectures]:
        among = ", ".join(architectures)
        raise BrixelError(f"{left_out[0]} is to be measured, and not among the architectures of the table: {among}")
    for architecture in architectures:
        for dtype in DTYPES:
            largest_px = measured.get(architecture, 0)
            with torch.device("cpu" if largest_px else "meta"):
                student = random_student(architecture).to(dtype)
            for side_px in sides_px:
                job = Job(1, (side_px, side_px), to_file=True)
                for strategies in strategies_by_cost(student, job, "auto"):
                    rows.append(_row(architecture, student, strategies[-1], job, run=side_px <= largest_px))
    return rows


def _row(architecture: str, student: Student, strategy: Strategy, job: Job, *, run: bool) -> Row:
    predicted = predict_peak(student, strategy, job, _HOST)
    measured, seconds = measure_peak(student, strategy, job) if run else (None, None)
    dtype = student.head.out.weight.dtype
    return Row(architecture, dtype, job.padded_hw[0], strategy.name, predicted, measured, seconds)


def measure_peak(student: Student, strategy: Strategy, job: Job) -> tuple[int, float]:
    """Peak bytes and seconds of computing a job of noise on the CPU, counted as :func:`predict_peak` counts."""
    images = [torch.randn(3, *job.padded_hw) for _ in range(job.batch)]
    counter = AllocationTracker("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rooms = _rooms_in(folder, student, job) if job.to_file else None
        with counter:
            counter.track(weights_and_buffers(student))
            counter.track(images)
            counter.leave_out(rooms or [])
            start = time.perf_counter()
            run_job(student, strategy, images, rooms)
            return counter.peak, time.perf_counter() - start


def _rooms_in(folder: str, student: Student, job: Job) -> list[Tensor]:
    """Room for the maps of a job in files, which is where it is while a map is written to one."""
    wanted = new_outputs(student, torch.empty(1, 3, *job.padded_hw).expand(job.batch, -1, -1, -1))
    paths = [f"{folder}/{number}" for number in range(job.batch)]
    return [
        torch.from_file(path, shared=True, size=room.numel(), dtype=room.dtype).view(room.shape)
        for path, room in zip(paths, wanted, strict=True)
    ]


def report(rows: Sequence[Row], command: str) -> str:
    """A table in Markdown: a line for each architecture, dtype and size, the ways side by side."""
    lines = [
        "# Smallest limits of memory that work",
        "",
        "| architecture | dtype | image, px | whole | exact pieces | tiles | measured: whole, pieces, tiles |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    keys = dict.fromkeys((row.architecture, row.dtype, row.side_px) for row in rows)
    for key in keys:
        by_kind = {row.kind: row for row in rows if (row.architecture, row.dtype, row.side_px) == key}
        predicted = [format_bytes(by_kind[kind].predicted_bytes) if kind in by_kind else "-" for kind in _KINDS]
        measured = [_measured(by_kind[kind]) for kind in _KINDS if kind in by_kind]
        shown = ", ".join(measured) if all(measured) else "-"
        lines.append(f"| {key[0]} | {dtype_name(key[1])} | {key[2]} | {' | '.join(predicted)} | {shown} |")
    return "\n".join([*lines, "", *_NOTES, "", describe_machine(_HOST) + ". Made by:", "", f"    {command}"])


_KINDS = ("whole", "row_chunks", "tiles")
_NOTES = (
    "One image, random weights, weights included. Predicted on fake tensors for the CPU: live bytes of tensors, with",
    "the pixels in float32 and without the map, which goes to a file. Pieces of one row of patches, tiles of 8 x 8",
    "patches: the least there is. A dash: a pass that is too large for what kernels count, or that was not run.",
    "Measured: by the same counter on real tensors, one run each, with its seconds, beside other work.",
)


def _measured(row: Row) -> str:
    if row.measured_bytes is None:
        return ""
    return f"{format_bytes(row.measured_bytes)} in {row.seconds:.1f} s"
