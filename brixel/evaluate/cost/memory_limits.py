"""Predicted against measured peaks of memory, by architecture, size and limit; random weights, on the CPU."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from brixel.backbones.registry import known_backbone
from brixel.errors import MemoryLimitError
from brixel.evaluate.cost.memory import measure_peak
from brixel.evaluate.cost.timing import check_side, random_student
from brixel.inference.memory.planner import Job, TileMode, choose_strategy, predict_peak
from brixel.inference.memory.strategies import Strategy
from brixel.utils.devices import describe_machine, dtype_name
from brixel.utils.memory import format_bytes

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class LimitRow:
    """One square image computed within a limit; ``strategy`` and what follows are None where nothing fits."""

    architecture: str
    dtype: torch.dtype
    side_px: int
    limit_bytes: int
    strategy: Strategy | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    seconds: float | None = None


def limit_table(
    architectures: Sequence[str], sides_px: Sequence[int], limits: Sequence[int], *, dtype: torch.dtype, tiles: TileMode
) -> Iterator[LimitRow]:
    """Choose a way for every architecture, side and limit (bytes), compute an image that way, and count.

    The map goes to a file. A way that several limits lead to is computed once.
    """
    for architecture, side_px in itertools.product(architectures, sides_px):
        check_side(architecture, side_px)  # an error should not cost the time of those before it
    for architecture in architectures:
        student = random_student(architecture).to(dtype)
        for side_px in sides_px:
            job, measured = Job(1, (side_px, side_px), to_file=True), dict[Strategy, tuple[int, float]]()
            for limit in limits:
                try:
                    strategy = choose_strategy(student, job, limit, tiles, _HOST)
                except MemoryLimitError:
                    yield LimitRow(architecture, dtype, side_px, limit)
                    continue
                if strategy not in measured:
                    measured[strategy] = measure_peak(student, strategy, job)
                predicted = predict_peak(student, strategy, job, _HOST)
                yield LimitRow(architecture, dtype, side_px, limit, strategy, predicted, *measured[strategy])


def limit_report(rows: Sequence[LimitRow], command: str) -> str:
    """A table in Markdown, a line for each row."""
    lines = [
        "# Limits of memory kept",
        "",
        "| architecture | dtype | px | limit | way | predicted peak | measured | of the prediction | seconds |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        *map(_line, rows),
        "",
        *_NOTES,
        "",
        describe_machine(_HOST) + ". Made by:",
        "",
        f"    {command}",
    ]
    return "\n".join(lines)


_NOTES = (
    "One image, random weights, weights included, the map going to a file. Bytes of tensors, predicted on fake ones",
    "and counted on real ones, one run each. Seconds beside whatever else the machine did.",
)


def _line(row: LimitRow) -> str:
    head = f"| {row.architecture} | {dtype_name(row.dtype)} | {row.side_px} | {format_bytes(row.limit_bytes)} |"
    if row.strategy is None or row.predicted_bytes is None or row.measured_bytes is None:
        return f"{head} refused: nothing fits | - | - | - | - |"
    share = 100 * row.measured_bytes / row.predicted_bytes
    return (
        f"{head} {_describe(row.strategy, row.side_px, row.architecture)} | {format_bytes(row.predicted_bytes)} | "
        f"{format_bytes(row.measured_bytes)} | {share:.1f} % | {row.seconds:.1f} |"
    )


def _describe(strategy: Strategy, side_px: int, architecture: str) -> str:
    patch_px = known_backbone(architecture).vit.patch_px
    text = strategy.describe((side_px // patch_px, side_px // patch_px), patch_px)
    return text if strategy.exact else f"tiles, {text}"
