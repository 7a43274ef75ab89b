"""How much memory a strategy needs, and the cheapest strategy that fits into a limit.

The need is counted, not estimated: the functions that will run first run on fake tensors, which have shapes and no
data, under an :class:`AllocationTracker`. Most of the equal batches, chunks and tiles are left out.
"""

import dataclasses
import math
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from brixel.backbones.base import Backbone
from brixel.backbones.vit import ViT
from brixel.errors import BrixelError, MemoryLimitError
from brixel.feature_maps.host_copy import crop
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes, weights_and_buffers
from brixel.inference.memory.strategies import TILE_SIDES, RowChunks, Strategy, Tiles, Whole, new_outputs, patch_grid_of
from brixel.model.student import Student
from brixel.model.universal import CELLS, STEM_CHANNELS
from brixel.model.upsampler import TrainedUpsampler, Upsampler
from brixel.utils.devices import dtype_name
from brixel.utils.memory import MARGIN, format_bytes, free_bytes, parse_bytes

TileMode = Literal["auto", "never", "always"]
HOST = torch.device("cpu")
HALF_INT = 2**31 - 1
"""Several kernels count elements in 32 bits: no tensor of a whole pass may have more."""
_INDICES_PER_PATCH = 1024  # of one extractor: 4 queries, 16 heads, 4 points, 4 corners
_STEM_PER_PIXEL = 16  # 64 channels at half the resolution
_PER_WINDOW = 8000  # of the universal upsampler, per patch: inner products, cosines, the low-resolution map
_PER_OUTPUT_CELL = 700  # guide, stem, trunk, weights
_SIZE_STEPS = 256

_PEAKS: "weakref.WeakKeyDictionary[Backbone, dict[Any, int]]" = weakref.WeakKeyDictionary()


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


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch of ``batch`` images of padded size; ``to_file``: its maps go to files rather than to memory."""

    batch: int
    padded_hw: tuple[int, int]
    to_file: bool = False

    def grid_hw(self, student: Student) -> tuple[int, int]:
        """The patch grid of each image."""
        return patch_grid_of(student, self.padded_hw)

    def map_bytes(self, student: Student) -> int:
        """Bytes of one image's map, 0 where it goes to a file."""
        height, width = self.grid_hw(student)
        return 0 if self.to_file else student.scale**2 * height * width * student.embed_dim * student.dtype.itemsize


def pixel_bytes(padded_hw: tuple[int, int]) -> int:
    """Bytes of the prepared pixels of an image, (3, H, W) in float32."""
    return 3 * 4 * padded_hw[0] * padded_hw[1]


# ---------------------------------------------------------------- prediction


def predict_peak(student: Student, strategy: Strategy, job: Job, device: torch.device | None = None) -> int:
    """Peak bytes on ``device`` (the model's own where None), weights included, of computing a job."""
    device = student.device if device is None else device
    key = (strategy, job, device, student.dtype, student.scale, type(student.upsampler), storage_bytes(student))
    known = _PEAKS.setdefault(student.backbone, {})
    if key not in known:
        known[key] = _count(student, strategy, job, device)
    return known[key]


def _count(student: Student, strategy: Strategy, job: Job, device: torch.device) -> int:
    fake = FakeTensorMode()

    def without_data(tensor: Tensor) -> Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    twin = copy_with(student, without_data).eval()
    tracker = AllocationTracker(device.type)
    with fake:
        outputs = new_outputs(twin, torch.empty(job.batch, 3, *job.padded_hw)) if job.to_file else None
        with tracker:
            tracker.track(weights_and_buffers(twin))
            tracker.leave_out(outputs or [])
            images = [torch.empty(3, *job.padded_hw) for _ in range(job.batch)]
            run_job(twin, strategy, images, outputs, counting=True)
    return tracker.peak


def run_job(
    student: Student,
    strategy: Strategy,
    images: Sequence[Tensor],
    outputs: Sequence[Tensor] | None,
    *,
    counting: bool = False,
) -> list[Tensor]:
    """What a stream does with a batch of prepared pixels (3, H, W), for counting memory; arguments as `Strategy.run`.

    Returns the maps, or nothing where they were written to ``outputs``.
    """
    pixels = images[0][None] if len(images) == 1 else torch.stack(list(images))
    maps = strategy.run(student, pixels, outputs, counting=counting)
    return [crop(dense, (dense.shape[1], dense.shape[2])) for dense in maps] if outputs is None else []


def surely_fits(student: Student, job: Job, spare_bytes: int) -> bool:
    """Whether a whole pass fits, by an upper bound that costs nothing; ``spare_bytes``: without the weights."""
    return bound_bytes(student, job) < spare_bytes and _is_countable(student, job.batch, job)


def bound_bytes(student: Student, job: Job) -> int:
    """An upper bound of what a whole pass takes, without the weights."""
    height, width = job.grid_hw(student)
    patch_px, channels, scale = student.patch_px, student.embed_dim, student.scale
    # per patch: dense maps twice, queries, tokens and what attention and feed-forward make of them
    elements = (2 * scale**2 + 60) * channels
    if isinstance(student.upsampler, TrainedUpsampler):
        elements += 8 * _INDICES_PER_PATCH + 4 * _STEM_PER_PIXEL * patch_px**2  # points; the stem
    if not isinstance(student.upsampler, Upsampler):
        elements += 2 * (CELLS + 1) * channels + _PER_WINDOW + _PER_OUTPUT_CELL * scale**2 + 8 * patch_px**2
    patches = max(4, height * width)  # what does not depend on the size is less than three of them
    return 8 * job.batch * patches * elements


def _held_bytes(student: Student, job: Job, device: torch.device | None) -> int:
    """A lower bound of any strategy: the weights, and on the CPU the pixels and the maps that do not go to a file."""
    if (student.device if device is None else device).type != "cpu":
        return storage_bytes(student)
    return storage_bytes(student) + job.batch * (pixel_bytes(job.padded_hw) + job.map_bytes(student))


def _is_countable(student: Student, batch: int, job: Job) -> bool:
    """Whether a whole pass of ``batch`` images stays within what kernels count."""
    height, width = job.grid_hw(student)
    patch_px, channels, scale = student.patch_px, student.embed_dim, student.scale
    per_patch = scale**2 * channels
    if isinstance(student.upsampler, TrainedUpsampler):
        per_patch = max(per_patch, _INDICES_PER_PATCH, _STEM_PER_PIXEL * patch_px**2)
    if not isinstance(student.upsampler, Upsampler):
        per_patch = max(per_patch, (CELLS + 1) * channels, 4 * STEM_CHANNELS * scale**2)
    return batch * height * width * per_patch <= HALF_INT


# ---------------------------------------------------------------- choice


def strategies_by_cost(student: Student, job: Job, tiles: TileMode) -> list[list[Strategy]]:
    """The strategies that are allowed, one list per kind, cheapest kind first; in a list from most to least memory."""
    grid_hw = job.grid_hw(student)
    whole: list[Strategy] = [Whole(batch) for batch in _halvings(job.batch) if _is_countable(student, batch, job)]
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

    def peak(strategy: Strategy) -> int:
        return predict_peak(student, strategy, job, device)

    kinds = strategies_by_cost(student, job, tiles)
    for strategies in kinds if _held_bytes(student, job, device) <= limit_bytes else []:
        found = _first_that_fits(strategies, lambda strategy: peak(strategy) <= limit_bytes)
        if found is not None:
            return found
    least = min(peak(strategies[-1]) for strategies in kinds)
    largest = _largest(student, job, limit_bytes, tiles, device)
    raise MemoryLimitError(_refusal(job, limit_bytes, tiles, least, largest))


def _first_that_fits(strategies: list[Strategy], fits: Callable[[Strategy], bool]) -> Strategy | None:
    """The first of strategies that need less and less, found by bisection; None where the last does not fit."""
    if fits(strategies[0]):
        return strategies[0]
    low, high = 0, len(strategies) - 1  # what fails, what fits
    if not fits(strategies[high]):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(strategies[middle]) else (middle, high)
    return strategies[high]


def _refusal(job: Job, limit_bytes: int, tiles: TileMode, least: int, largest: tuple[int, int] | None) -> str:
    height, width = job.padded_hw
    fitting = f"the largest image of this shape that fits has {largest[0]}x{largest[1]}" if largest else "no image fits"
    advice = ["allow more memory", "ask for a smaller short_side_px"]
    advice += ["allow tiles"] if tiles == "never" else []
    advice += ["write the map to a file (out='map.npy', or --format npy)"] if not job.to_file else []
    images, need = (f"{job.batch} images", "need") if job.batch > 1 else ("an image", "needs")
    return (
        f"{images} of {height}x{width} pixels (height x width) {need} {format_bytes(least)} at least, and the limit is "
        f"{format_bytes(limit_bytes, up=False)}; {fitting}; {', or '.join(advice)}"
    )


def _largest(
    student: Student, job: Job, limit_bytes: int, tiles: TileMode, device: torch.device | None
) -> tuple[int, int] | None:
    """The largest padded size of the same aspect that fits, in pixels; None where none is found.

    For an image longer than `_SIZE_STEPS` patches, to within one part in so many.
    """
    patch_px, grid_hw = student.patch_px, job.grid_hw(student)
    longest = max(grid_hw)

    def sized(patches: int) -> tuple[int, int]:
        height, width = (max(1, cells * patches // longest) * patch_px for cells in grid_hw)
        return height, width

    def fits(patches: int) -> bool:
        smaller = dataclasses.replace(job, padded_hw=sized(patches))
        if _held_bytes(student, smaller, device) > limit_bytes:
            return False
        least = strategies_by_cost(student, smaller, tiles)[-1][-1]
        return predict_peak(student, least, smaller, device) <= limit_bytes

    low, high = 0, longest  # what fits, what fails
    while high - low > max(1, longest // _SIZE_STEPS):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sized(low) if low else None


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
        return Plan(
            strategy=strategy.name,
            device=str(device),
            dtype=dtype_name(self.student.dtype),
            padded_hw=job.padded_hw,
            batch=job.batch,
            peak_bytes=predict_peak(self.student, strategy, job, device),
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
        except Exception as error:  # a foreign backbone that does not run on fake tensors
            if self._is_limit_given:
                raise BrixelError(
                    f"the memory that {type(self.student.backbone).__name__} needs cannot be predicted "
                    f"({type(error).__name__}: {error}); leave out memory_limit"
                ) from error
            return Choice(Whole(job.batch), False)

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
