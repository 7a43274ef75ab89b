"""The cheapest strategy that fits into a memory limit, and the plans that say so."""

import dataclasses
import math
import sys
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch

from brixel.backbones.vit import ViT
from brixel.errors import BrixelError, MemoryLimitError
from brixel.inference.memory.allocation_tracker import storage_bytes
from brixel.inference.memory.prediction import (
    HOST,
    Job,
    held_bytes,
    is_countable,
    needed_bytes,
    surely_fits,
    with_overhead,
)
from brixel.inference.memory.strategies import TILE_SIDES, RowChunks, Strategy, Tiles, Whole
from brixel.model.student import Student
from brixel.utils.devices import dtype_name
from brixel.utils.memory import MARGIN, format_bytes, free_bytes, parse_bytes

TileMode = Literal["auto", "never", "always"]
_TRIED_SIZES = 3  # of smaller images, for the message of a refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How the maps of a batch of images will be computed, and the memory that takes.

    Attributes:
        strategy: "whole", "row_chunks" (the same numbers but for rounding) or "tiles" (an approximation: tiles do not
            attend to one another).
        device: Where the model runs, such as "cpu".
        dtype: The weights' dtype, such as "float32".
        padded_hw: Height and width of each image in pixels, padded to whole patches.
        batch: Number of images.
        micro_batch: Images that go through the model at a time.
        chunk_rows: Rows of patches that are computed at a time; None unless the strategy is "row_chunks".
        tile_px: Height and width of a tile in pixels; None unless the strategy is "tiles", as are the next two.
        overlap_px: Pixels that neighbouring tiles share at least.
        tiles: Number of tiles per image.
        peak_bytes: Predicted peak of memory on ``device``, weights included; on the CPU also pixels and maps.
        limit_bytes: The limit that was kept.
    """

    strategy: str
    device: str
    dtype: str
    padded_hw: tuple[int, int]
    batch: int
    micro_batch: int = 1
    chunk_rows: int | None = None
    tile_px: tuple[int, int] | None = None
    overlap_px: int | None = None
    tiles: int | None = None
    peak_bytes: int
    limit_bytes: int


# ---------------------------------------------------------------- choice


def strategies_by_cost(student: Student, job: Job, tiles: TileMode) -> list[list[Strategy]]:
    """The strategies that are allowed, one list per kind, cheapest kind first; in a list from most to least memory."""
    grid_hw = job.grid_hw(student)
    whole: list[Strategy] = [Whole(batch) for batch in _halvings(job.batch) if is_countable(student, batch, job)]
    chunks: list[Strategy] = [RowChunks(rows) for rows in _halvings(max(1, grid_hw[0] // 2))]
    tiled: list[Strategy] = [Tiles(side) for side in TILE_SIDES if side < max(grid_hw)]
    if tiles == "always" and tiled:
        return [tiled]
    kinds = [whole, chunks, tiled] if tiles == "auto" else [whole, chunks]
    return [strategies for strategies in kinds if strategies]


def _halvings(number: int) -> list[int]:
    numbers = [number]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    return numbers


def choose_strategy(
    student: Student, job: Job, limit_bytes: int, tiles: TileMode, device: torch.device | None = None
) -> Strategy:
    """The cheapest strategy whose predicted peak is within the limit. Raises MemoryLimitError where none is."""

    def needed(strategy: Strategy) -> int:
        return needed_bytes(student, strategy, job, device)

    def at_once(strategy: Strategy) -> int:
        return strategy.pixels_at_once(job.grid_hw(student), student.patch_px)

    held = held_bytes(student, job, device)
    kinds = strategies_by_cost(student, job, tiles)
    for strategies in kinds if held <= limit_bytes else []:
        found = _first_that_fits(strategies, needed, at_once, limit_bytes)
        if found is not None:
            return found
    least = held if held > limit_bytes else min(needed(strategies[-1]) for strategies in kinds)
    largest = _large_size_that_fits(student, job, limit_bytes, tiles, device)
    raise MemoryLimitError(_refusal(job, limit_bytes, tiles, least, largest))


def _first_that_fits(
    strategies: list[Strategy], needed: Callable[[Strategy], int], at_once: Callable[[Strategy], int], limit_bytes: int
) -> Strategy | None:
    """One of the first that fit, of strategies that need less and less; None where the last does not fit.

    ``at_once``: the pixels that a strategy computes at a time. The need grows with them no slower than in proportion,
    so the line between its ends is an upper bound of it, and a third prediction is enough.
    """
    least = needed(strategies[-1])
    if least > limit_bytes:
        return None
    most = needed(strategies[0])
    if most <= limit_bytes:
        return strategies[0]
    low, high = at_once(strategies[-1]), at_once(strategies[0])
    slope = (most - least) / max(1, high - low)
    likely = [one for one in strategies[1:-1] if least + slope * (at_once(one) - low) <= limit_bytes]
    return next((one for one in likely if needed(one) <= limit_bytes), strategies[-1])


def _refusal(job: Job, limit_bytes: int, tiles: TileMode, least: int, largest: tuple[int, int] | None) -> str:
    height, width = job.padded_hw
    fitting = f"an image of this shape with {largest[0]}x{largest[1]} fits" if largest else "no image fits"
    advice = ["allow more memory", "ask for a smaller short_side_px"]
    advice += ["allow tiles"] if tiles == "never" else []
    advice += ["write the map to a file (out='map.npy', or --format npy)"] if not job.to_file else []
    images, need = (f"{job.batch} images", "need") if job.batch > 1 else ("an image", "needs")
    return (
        f"{images} of {height}x{width} pixels (height x width) {need} {format_bytes(least)} at least, and the limit is "
        f"{format_bytes(limit_bytes, up=False)}; {fitting}; {', or '.join(advice)}"
    )


def _large_size_that_fits(
    student: Student, job: Job, limit_bytes: int, tiles: TileMode, device: torch.device | None
) -> tuple[int, int] | None:
    """A padded size of the same aspect that fits, in pixels, near the largest; None where none is found."""
    patch_px, grid_hw = student.patch_px, job.grid_hw(student)
    weights = with_overhead(student, storage_bytes(student))
    held = held_bytes(student, job, device)
    share = 1.0
    for _ in range(_TRIED_SIZES if limit_bytes > weights else 0):
        if held > limit_bytes:  # of what any strategy takes, at the most a few parts in ten are held
            share = min(share, 0.3 * (limit_bytes - weights) / (held - weights))
        cells_hw = [max(1, int(cells * share**0.5)) for cells in grid_hw]
        smaller = dataclasses.replace(job, padded_hw=(cells_hw[0] * patch_px, cells_hw[1] * patch_px))
        kinds = strategies_by_cost(student, smaller, tiles)
        least = min(needed_bytes(student, strategies[-1], smaller, device) for strategies in kinds[-2:])
        if least <= limit_bytes:
            return smaller.padded_hw
        if max(cells_hw) == 1:
            break
        held, share = 0, 0.95 * share * (limit_bytes - weights) / (least - weights)
    return None


class Choice(NamedTuple):
    """How a job is computed; ``on_host``: on the CPU, because the accelerator has too little memory."""

    strategy: Strategy
    on_host: bool


class Planner:
    """Chooses how to compute jobs within a limit, and remembers for the jobs after it what ran out of memory.

    Args:
        student: The model.
        limit: Bytes or text such as "4GiB", weights included; None: what is free on the device, less a margin.
        tiles: "auto", "never" or "always"; see :meth:`brixel.inference.dense_features.DenseFeatures.extract`.

    Raises:
        BrixelError: An argument is none of these.
    """

    def __init__(self, student: Student, limit: int | str | None, tiles: str) -> None:
        if tiles not in get_args(TileMode):
            raise BrixelError(f"tiles is {tiles!r}; expected 'auto' (where nothing exact fits), 'never' or 'always'")
        self._tiles: TileMode = tiles  # type: ignore[assignment]
        self.student = student
        self.weight_bytes = storage_bytes(student)
        self.lock = threading.RLock()  # images are checked by the threads that decode them
        self._is_limit_given = limit is not None
        self.limit_bytes = self._free(self.device) if limit is None else parse_bytes(limit)
        self._choices: dict[Job, Choice] = {}
        self._too_much: dict[str, int] = {}  # by kind of strategy: pixels at once that ran out of memory
        self._only_on_host = False

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.student.device

    def choose(self, job: Job) -> Choice:
        """How to compute a job. Raises MemoryLimitError where nothing fits."""
        with self.lock:
            if job not in self._choices:
                self._choices[job] = self._choose(job)
            strategy, on_host = self._choices[job]
            while self._pixels_at_once(strategy, job) >= self._too_much.get(strategy.name, math.inf):
                if (smaller := self._smaller(strategy, job)) is None:
                    break
                strategy = smaller
            self._choices[job] = Choice(strategy, on_host)
            return self._choices[job]

    def take_less(self, job: Job, failed: Choice) -> None:
        """Remember that a choice ran out of memory: the next is smaller, and on the CPU after the smallest.

        Raises MemoryLimitError where the smallest failed on the CPU.
        """
        strategy, on_host = failed
        with self.lock:
            pixels = self._pixels_at_once(strategy, job)
            self._too_much[strategy.name] = min(pixels, self._too_much.get(strategy.name, pixels))
            smaller = self._smaller(strategy, job)
            if smaller is not None:
                self._choices[job] = Choice(smaller, on_host)
            elif self.device != HOST and not on_host:
                self._only_on_host, self._too_much, self._choices = True, {}, {}
            else:
                height, width = job.padded_hw
                raise MemoryLimitError(
                    f"memory ran out for an image of {height}x{width} pixels (height x width), however little was done "
                    "at a time; close other programs, or ask for a smaller short_side_px"
                )

    def plan(self, job: Job) -> Plan:
        """How a job will be computed, as data."""
        strategy, on_host = self.choose(job)
        device = HOST if on_host else self.device
        try:
            peak_bytes = needed_bytes(self.student, strategy, job, device)
        except Exception as error:
            if isinstance(self.student.backbone, ViT):
                raise
            raise self._unpredictable(error) from error
        return Plan(
            strategy=strategy.name,
            device=str(device),
            dtype=dtype_name(self.student.dtype),
            padded_hw=job.padded_hw,
            batch=job.batch,
            peak_bytes=peak_bytes,
            limit_bytes=self._free(HOST) if on_host else self.limit_bytes,
            **strategy.plan_fields(job.grid_hw(self.student), self.student.patch_px),
        )

    def surely_fits(self, job: Job) -> bool:
        """Whether there is so much memory that nothing need be predicted.

        Of a limit that was given, half: what waits takes the rest. The bound does not hold for foreign backbones.
        """
        spare = self.limit_bytes - self.weight_bytes
        if self._is_limit_given:
            spare = spare // 2 if isinstance(self.student.backbone, ViT) else 0
        return self._tiles != "always" and surely_fits(self.student, job, spare)

    def _choose(self, job: Job) -> Choice:
        if self._only_on_host:
            return self._choose_on_host(job)
        if self.surely_fits(job):
            return Choice(Whole(job.batch), False)
        try:
            return Choice(choose_strategy(self.student, job, self.limit_bytes, self._tiles), False)
        except MemoryLimitError:
            if self.device == HOST:
                raise
            return self._choose_on_host(job)
        except Exception as error:
            if isinstance(self.student.backbone, ViT):
                raise
            # another backbone may not run on tensors without data
            if self._is_limit_given:
                raise self._unpredictable(error) from error
            return Choice(Whole(job.batch), False)

    def _unpredictable(self, error: Exception) -> BrixelError:
        """The error for a backbone that does not run on tensors without data."""
        name, kind = type(self.student.backbone).__name__, type(error).__name__
        return BrixelError(
            f"the memory that {name} needs cannot be predicted ({kind}: {error}); leave out memory_limit: without one, "
            "extract() runs the model whole"
        )

    def _choose_on_host(self, job: Job) -> Choice:
        return Choice(choose_strategy(self.student, job, self._free(HOST), self._tiles, HOST), True)

    def _free(self, device: torch.device) -> int:
        """What is free on a device less a margin, and the weights on it; no bound where it is not known."""
        free = free_bytes(device)
        weights = self.weight_bytes if self.device == device else 0
        return sys.maxsize if free is None else int((1 - MARGIN) * free) + weights

    def _smaller(self, strategy: Strategy, job: Job) -> Strategy | None:
        return strategy.smaller(job.grid_hw(self.student), tiles=self._tiles != "never")

    def _pixels_at_once(self, strategy: Strategy, job: Job) -> int:
        return strategy.pixels_at_once(job.grid_hw(self.student), self.student.patch_px)
