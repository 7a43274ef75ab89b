"""What student, backbone and teacher cost as images and batches grow; random weights, operations counted by torch.

Counting runs no number: it works on shapes alone, for every size. Times are of one process, all variants of a size in
turn; peak memory is of a fresh one for every variant (see `brixel.evaluate.cost.timing`, whose calls these are).
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from brixel.backbones.registry import known_backbone
from brixel.errors import BrixelError
from brixel.evaluate.cost.timing import (
    BACKBONE,
    LARGE,
    STUDENT,
    flops_of,
    peak_bytes_of,
    random_student,
    seconds_in_turn,
    variants,
)
from brixel.evaluate.report import Report
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE
from brixel.utils.devices import choose_device, choose_dtype, describe_machine, dtype_name

_LARGEST = 4096 * 4096  # pixels of a teacher's image


def cost(
    architectures: Sequence[str],
    image_px: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 10,
    device: str = "auto",
    dtype: str = "auto",
) -> Report:
    """Parameters, GFLOP, and where ``rounds`` is above 0 times and memory, of every size of every architecture.

    Sides that are no whole patches go to the nearest that are. Teachers of more than 4096 x 4096 px are left out.
    Raises BrixelError for an unknown architecture.
    """
    if rounds < 0:
        raise BrixelError(f"rounds is {rounds}; expected 0, to count operations alone, or more")
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    rows: list[dict[str, Any]] = []
    for name in architectures:
        patch_px = known_backbone(name).vit.patch_px
        sides = [max(1, round(side / patch_px)) * patch_px for side in image_px]
        with torch.device("meta"):
            shapes = random_student(name)
        student = random_student(name).to(where, kind) if rounds else None
        for side in sides:
            counted = _counted(name, shapes, side)
            timed = {} if student is None else _timed(student, side, counted, batch_sizes, rounds, where)
            for row in counted:
                if rounds:
                    row["peak_mib"] = _mib(peak_bytes_of(name, row["variant"], side, where, kind))
                rows += [{**row, **each} for each in timed.get(row["variant"], [{}])]
    if not rows:
        raise BrixelError("nothing to measure; expected at least one architecture and one size")
    columns = {
        **{"architecture": ("architecture", ""), "image_px": ("image, px", "d"), "output_cells": ("map", "")},
        **{"variant": ("variant", ""), "parameters": ("parameters, M", ".1f"), "gflop": ("GFLOP", ".1f")},
    }
    if rounds:
        columns |= {"batch": ("batch", "d"), "ms": ("ms, median", ".1f"), "ms_p90": ("p90", ".1f")}
        columns |= {"per_second": ("images/s", ".2f"), "peak_mib": ("peak memory of one, MiB", ".0f")}
    seldom = " (x 4: one of five)" if where.type == "cpu" else ""
    timing = (
        f"{dtype_name(kind)}, {rounds} rounds in turn{seldom}; {describe_machine(where)}"
        if rounds
        else f"torch {torch.__version__}"
    )
    recipe = f"Random weights; operations of products, convolutions and attention, two for a multiply-add; {timing}."
    return Report("cost", "What it costs", columns, rows, recipe)


def _counted(name: str, shapes: Student, side: int) -> list[dict[str, Any]]:
    """Rows of the variants of one size, counted on the meta device."""
    like = next(shapes.backbone.parameters())
    counts = {part: sum(each.numel() for each in part.parameters()) for part in (shapes.backbone, shapes)}
    rows = []
    with torch.no_grad():
        for variant, call in variants(shapes, side, like).items():
            large = variant == LARGE
            if large and (UPSCALE * side) ** 2 > _LARGEST:
                continue
            cells = side // shapes.backbone.patch_px * (1 if variant == BACKBONE else UPSCALE)
            rows.append(
                {
                    **{"architecture": name, "student_px": side, "variant": variant},
                    **{"image_px": side * (UPSCALE if large else 1), "output_cells": f"{cells} x {cells}"},
                    "parameters": counts[shapes if variant == STUDENT else shapes.backbone] / 1e6,
                    "gflop": flops_of(call) / 1e9,
                }
            )
    return rows


def _timed(
    student: Student,
    side: int,
    counted: Sequence[dict[str, Any]],
    batch_sizes: Sequence[int],
    rounds: int,
    device: torch.device,
) -> dict[str, list[dict[str, Any]]]:
    """By variant: median and p90 in ms of a batch, and images per second, for every batch size."""
    like, names = next(student.backbone.parameters()), [row["variant"] for row in counted]
    calls = {
        (variant, batch): call
        for batch in batch_sizes
        for variant, call in variants(student, side, like, batch).items()
        if variant in names
    }
    seldom = [key for key in calls if key[0] == LARGE]
    found: dict[str, list[dict[str, Any]]] = {}
    for (variant, batch), seconds in seconds_in_turn(calls, rounds, device, seldom).items():
        median = statistics.median(seconds)
        p90 = torch.quantile(torch.tensor(seconds, dtype=torch.float64), 0.9).item()
        row = {"batch": batch, "ms": median * 1e3, "ms_p90": p90 * 1e3, "per_second": batch / median}
        found.setdefault(variant, []).append(row)
    return found


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20
