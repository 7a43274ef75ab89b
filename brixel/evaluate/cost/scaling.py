"""The cost of student, backbone and teacher as images and batches grow, with random weights.

Operations are counted on the meta device, without computing. Times are of one process, all variants of a size in turn;
peak memory is of a new process for every variant (see `brixel.evaluate.cost.timing`).
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from brixel.errors import BrixelError
from brixel.evaluate.cost.timing import (
    BACKBONE,
    LARGE,
    SLOW_EVERY,
    STUDENT,
    UNIVERSAL,
    flops_of,
    peak_bytes_of,
    random_student,
    seconds_in_turn,
    torch_threads,
    variants,
)
from brixel.evaluate.report import Report
from brixel.images.patch_grid import whole_patches
from brixel.model.universal import UniversalUpsampler
from brixel.model.upsampler import UPSCALE
from brixel.utils.devices import choose_device, choose_dtype, describe_machine, dtype_name

_LARGEST = 4096 * 4096  # pixels of a teacher's image

_COLUMNS = {
    **{"architecture": ("architecture", ""), "image_px": ("image, px", "d"), "output_cells": ("map", "")},
    **{"variant": ("variant", ""), "parameters": ("parameters, M", ".1f"), "gflop": ("GFLOP", ".1f")},
}
_TIMED_COLUMNS = {
    **{"batch": ("batch", "d"), "ms": ("ms, median", ".1f"), "ms_range": ("min to max", ".1f")},
    **{"ms_p90": ("p90", ".1f"), "ratio": ("of its backbone's", ".2f"), "per_second": ("images/s", ".2f")},
    "peak_mib": ("peak memory of one, MiB", ".0f"),
}


def cost(
    architectures: Sequence[str],
    image_px: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 10,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Report:
    """Measure what students, their backbones and their teachers cost.

    Args:
        architectures: Names of known backbones.
        image_px: Sides of the student's square image in pixels; one that is not a multiple of the patch size is
            rounded to the nearest that is. Teachers on more than 4096 x 4096 px are left out.
        batch_sizes: Images per call.
        rounds: Timed calls of each variant; 0 counts parameters and operations alone.
        threads: Threads of torch; None for its own choice.
        device: As for :meth:`brixel.BrixelFeatures.from_pretrained`.
        dtype: As ``device``.

    Returns:
        A row per architecture, size, variant and batch size: parameters in millions, GFLOP of one image; milliseconds
        of a batch, their ratio to the backbone's (the median over the rounds), images per second, and the peak memory
        in MiB of a process that runs one image.

    Raises:
        BrixelError: An architecture is unknown, ``rounds`` is negative, or there is nothing to measure.
    """
    if rounds < 0:
        raise BrixelError(f"rounds is {rounds}; expected 0, to count operations alone, or more")
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    counted = {name: _count(name, image_px) for name in architectures}  # an unknown name fails before the first timing
    rows = [row for name in architectures for row in counted[name]]
    if not rows:
        raise BrixelError("nothing to measure; expected at least one architecture and one size")
    timing = f"torch {torch.__version__}"
    if rounds:
        with torch_threads(threads):
            rows = [row for name in architectures for row in _time(counted[name], batch_sizes, rounds, where, kind)]
            slow = f" (x 4: one of {SLOW_EVERY})" if where.type == "cpu" else ""
            timing = f"{dtype_name(kind)}, {rounds} rounds in turn{slow}; {describe_machine(where)}"
    recipe = f"Random weights; operations of products, convolutions and attention, two for a multiply-add; {timing}."
    notes = [_describe_upsampler(own) for own in counted.values()]
    return Report("cost", "Cost", _COLUMNS | (_TIMED_COLUMNS if rounds else {}), rows, recipe, notes)


def _count(name: str, image_px: Sequence[int]) -> list[dict[str, Any]]:
    """A row per size and variant, with what needs no computing."""
    with torch.device("meta"):
        student = random_student(name)
    with torch.device("meta"):
        universal = UniversalUpsampler()
    backbone, added, upsampler = (
        sum(weight.numel() for weight in part.parameters()) for part in (student.backbone, universal, student.upsampler)
    )
    parameters = {BACKBONE: backbone, LARGE: backbone, UNIVERSAL: backbone + added, STUDENT: backbone + upsampler}
    patch_px = student.patch_px
    rows = []
    for side in (whole_patches(wanted, patch_px) for wanted in image_px):
        for variant, call in variants(student, side).items():
            if variant == LARGE and (UPSCALE * side) ** 2 > _LARGEST:
                continue
            cells = side // patch_px * (1 if variant == BACKBONE else UPSCALE)
            with torch.no_grad():
                gflop = flops_of(call) / 1e9
            rows.append(
                {
                    **{"architecture": name, "student_px": side, "variant": variant},
                    **{"image_px": side * (UPSCALE if variant == LARGE else 1), "output_cells": f"{cells} x {cells}"},
                    "parameters": parameters[variant] / 1e6,
                    "gflop": gflop,
                }
            )
    return rows


def _describe_upsampler(rows: Sequence[dict[str, Any]]) -> str:
    """The parameters of both parts of a student, and the operations that its upsampler adds, by size."""
    by_variant = {(row["student_px"], row["variant"]): row for row in rows}
    pairs = [(side, row, by_variant[side, BACKBONE]) for (side, name), row in by_variant.items() if name == STUDENT]
    _, student, backbone = pairs[0]
    upsampler = student["parameters"] - backbone["parameters"]
    added = ", ".join(f"{own['gflop'] - base['gflop']:.2f} at {side} px" for side, own, base in pairs)
    return (
        f"{student['architecture']}: parameters: backbone {backbone['parameters']:.2f} M, upsampler {upsampler:.2f} M; "
        f"GFLOP of the upsampler: {added}."
    )


def _time(
    counted: Sequence[dict[str, Any]], batch_sizes: Sequence[int], rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """The counted rows of an architecture with times and memory, one per batch size."""
    name = counted[0]["architecture"]
    peaks = [peak_bytes_of(name, row["variant"], row["student_px"], device, dtype) for row in counted]
    student = random_student(name).to(device, dtype)
    wanted = {(row["student_px"], row["variant"]) for row in counted}
    seconds: dict[tuple[int, str, int], list[float]] = {}
    for side in dict.fromkeys(row["student_px"] for row in counted):  # all variants of a size in turn
        calls = {
            (side, variant, batch): call
            for batch in batch_sizes
            for variant, call in variants(student, side, batch).items()
            if (side, variant) in wanted
        }
        seconds |= seconds_in_turn(calls, rounds, device, [key for key in calls if key[1] == LARGE])
    rows = []
    for (row, peak), batch in itertools.product(zip(counted, peaks, strict=True), batch_sizes):
        own, base = (seconds[row["student_px"], variant, batch] for variant in (row["variant"], BACKBONE))
        rows.append({**row, "peak_mib": None if peak is None else peak / 2**20, **_summary(own, base, batch)})
    return rows


def _summary(seconds: Sequence[float], base: Sequence[float], batch: int) -> dict[str, Any]:
    """Times of a batch, and the median over the rounds of the time over the backbone's in the same round."""
    step = SLOW_EVERY if len(seconds) < len(base) else 1
    ratio = statistics.median(own / other for own, other in zip(seconds, base[::step], strict=True))
    median = statistics.median(seconds)
    p90 = torch.quantile(torch.tensor(seconds, dtype=torch.float64), 0.9).item()
    ends = (min(seconds) * 1e3, max(seconds) * 1e3)
    times = {"ms": median * 1e3, "ms_range": ends, "ms_p90": p90 * 1e3, "per_second": batch / median}
    return {"batch": batch, **times, "ratio": ratio}
