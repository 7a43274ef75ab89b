"""How much memory a way needs, and the cheapest way that fits into a limit.

The need is not estimated but counted: the very functions that will run, run first on fake tensors, which have shapes
and no data, while :class:`AllocationTracker` looks on. Only most of the equal pieces and tiles are left out.
"""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from brixel.errors import BrixelError, MemoryLimitError
from brixel.feature_maps.host_copy import crop
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes, weights_and_buffers
from brixel.inference.memory.strategies import TILE_SIDES, Way, maps_of, new_results, run_way
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE
from brixel.utils.memory import format_bytes

Tiles = Literal["auto", "never", "always"]
HALF_INT = 2**31 - 1
"""Several kernels count elements in 32 bits: of a whole pass no tensor may have more."""
_INDICES_PER_PATCH = 1024  # of one extractor: 4 queries, 16 heads, 4 points, 4 corners
_STEM_PER_PIXEL = 16  # 64 channels at half the resolution
_SIZE_STEPS = 256

_PEAKS: "weakref.WeakKeyDictionary[Student, dict[Any, int]]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a batch of images will be computed, and what that takes.

    ``way`` is "whole", "pieces" (the same numbers but for rounding) or "tiles" (an approximation: tiles do not attend
    to one another), on ``device``. ``micro_batch`` images go through at a time; of pieces ``piece_rows`` rows of
    patches; of tiles, ``tiles`` an image, ``tile_px`` (height, width) that overlap by ``overlap_px`` at least.
    ``peak_bytes`` is predicted, with the weights, and on the CPU with pixels and maps.
    """

    way: str
    device: str
    dtype: str
    padded_hw: tuple[int, int]
    batch: int
    micro_batch: int
    piece_rows: int | None
    tile_px: tuple[int, int] | None
    overlap_px: int | None
    tiles: int | None
    peak_bytes: int
    limit_bytes: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch of so many images of padded size; ``to_file``: its maps go to files rather than to memory."""

    batch: int
    padded_hw: tuple[int, int]
    to_file: bool = False

    def grid_hw(self, student: Student) -> tuple[int, int]:
        """The patch grid of each image."""
        return self.padded_hw[0] // student.backbone.patch_px, self.padded_hw[1] // student.backbone.patch_px


def check_tiles(tiles: str) -> Tiles:
    """The argument, or BrixelError for another than the three."""
    if tiles not in get_args(Tiles):
        raise BrixelError(f"tiles is {tiles!r}; expected 'auto' (where nothing exact fits), 'never' or 'always'")
    return tiles  # type: ignore[return-value]


def predict_peak(student: Student, way: Way, job: Job, device: torch.device | None = None) -> int:
    """Peak bytes on ``device`` (the model's own where None), weights included, of computing a job one way."""
    weight = student.head.out.weight
    where = weight.device if device is None else device
    key = (way, job, where, weight.dtype, storage_bytes(student))
    known = _PEAKS.setdefault(student, {})
    if key not in known:
        known[key] = _count(student, way, job, where)
    return known[key]


def _count(student: Student, way: Way, job: Job, device: torch.device) -> int:
    fake = FakeTensorMode()

    def without_data(tensor: Tensor) -> Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    twin = copy_with(student, without_data).eval()
    counter = AllocationTracker(device.type)
    with fake:
        rooms = new_results(twin, torch.empty(job.batch, 3, *job.padded_hw)) if job.to_file else None
        with counter:
            counter.track(weights_and_buffers(twin))
            counter.leave_out(rooms or [])
            run_job(twin, way, [torch.empty(3, *job.padded_hw) for _ in range(job.batch)], rooms, sketch=True)
    return counter.peak


def run_job(
    student: Student, way: Way, images: Sequence[Tensor], rooms: Sequence[Tensor] | None, *, sketch: bool = False
) -> list[Tensor]:
    """What happens to a batch from prepared pixels (3, H, W) to maps, for counting memory."""
    pixels = images[0][None] if len(images) == 1 else torch.stack(list(images))
    if rooms is not None:
        run_way(student, way, pixels, rooms, sketch=sketch)
        return []
    maps = maps_of(student, way, pixels, sketch=sketch)
    return [crop(each, (each.shape[1], each.shape[2])) for each in maps]


def surely_fits(student: Student, job: Job, spare_bytes: int) -> bool:
    """Whether a whole pass fits beside the weights, by a bound from above that costs nothing to compute."""
    return bound_bytes(student, job) < spare_bytes and _is_counted(student, Way("whole", batch=job.batch), job)


def bound_bytes(student: Student, job: Job) -> int:
    """More than a whole pass takes beside the weights."""
    height, width = job.grid_hw(student)
    patch_px, channels = student.backbone.patch_px, student.backbone.width
    # per patch: dense maps twice, queries, tokens and what attention and feed-forward make of them; points; the stem
    elements = (2 * UPSCALE**2 + 60) * channels + 8 * _INDICES_PER_PATCH + 4 * _STEM_PER_PIXEL * patch_px**2
    patches = max(4, height * width)  # what does not depend on the size is less than three of them
    return 8 * job.batch * patches * elements


def _held_bytes(student: Student, job: Job, device: torch.device | None) -> int:
    """Less than any way takes: the weights, and on the CPU the pixels and the maps that do not go to a file."""
    weight, (height, width) = student.head.out.weight, job.padded_hw
    if (weight.device if device is None else device).type != "cpu":
        return storage_bytes(student)
    grid_hw = job.grid_hw(student)
    cells = 0 if job.to_file else UPSCALE**2 * grid_hw[0] * grid_hw[1]
    map_bytes = weight.shape[0] * weight.element_size() * cells
    return storage_bytes(student) + job.batch * (3 * 4 * height * width + map_bytes)


def _is_counted(student: Student, way: Way, job: Job) -> bool:
    """Whether a whole pass stays within what kernels count."""
    height, width = job.grid_hw(student)
    pixels = height * width * student.backbone.patch_px**2
    per_image = max(
        _INDICES_PER_PATCH * height * width,
        UPSCALE**2 * height * width * student.backbone.width,
        _STEM_PER_PIXEL * pixels,
    )
    return way.batch * per_image <= HALF_INT


def ways_by_cost(student: Student, job: Job, tiles: Tiles) -> list[list[Way]]:
    """The ways that are allowed, cheapest kind first; of each kind from the most to the least memory."""
    grid_hw = job.grid_hw(student)
    whole = [Way("whole", batch=batch) for batch in _halvings(job.batch)]
    kinds = [[each for each in whole if _is_counted(student, each, job)]]
    kinds.append([Way("pieces", rows=rows) for rows in _halvings(max(1, grid_hw[0] // 2))])
    smaller_tiles = [Way("tiles", side=side) for side in TILE_SIDES if side < max(grid_hw)]
    if tiles == "always" and smaller_tiles:
        kinds = [smaller_tiles]
    elif tiles == "auto":
        kinds.append(smaller_tiles)
    return [each for each in kinds if each]


def _halvings(number: int) -> list[int]:
    numbers = [number]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    return numbers


def choose_way(student: Student, job: Job, limit_bytes: int, tiles: Tiles, device: torch.device | None = None) -> Way:
    """The cheapest way whose predicted peak is within the limit. Raises MemoryLimitError where none is."""
    kinds = ways_by_cost(student, job, tiles)
    for ways in kinds if _held_bytes(student, job, device) <= limit_bytes else []:
        found = _first_that_fits(student, ways, job, limit_bytes, device)
        if found is not None:
            return found
    least = min(predict_peak(student, ways[-1], job, device) for ways in kinds)
    raise MemoryLimitError(_refusal(student, job, limit_bytes, tiles, least, device))


def _first_that_fits(
    student: Student, ways: list[Way], job: Job, limit_bytes: int, device: torch.device | None
) -> Way | None:
    """The first of ways that need less and less, or None; few of them are tried."""

    def fits(index: int) -> bool:
        return predict_peak(student, ways[index], job, device) <= limit_bytes

    if fits(0):
        return ways[0]
    low, high = 0, len(ways) - 1  # what fails, what fits
    if not fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ways[high]


def _refusal(
    student: Student, job: Job, limit_bytes: int, tiles: Tiles, least: int, device: torch.device | None
) -> str:
    height, width = job.padded_hw
    most = _largest(student, job, limit_bytes, tiles, device)
    fitting = f"the largest image of this shape that fits has {most[0]}x{most[1]}" if most else "no image fits"
    advice = ["allow more memory", "ask for a smaller short_side_px"]
    advice += ["allow tiles"] if tiles == "never" else []
    advice += ["write the map to a file (out='map.npy', or --format npy)"] if not job.to_file else []
    images, need = (f"{job.batch} images", "need") if job.batch > 1 else ("an image", "needs")
    return (
        f"{images} of {height}x{width} pixels (height x width) {need} {format_bytes(least)} at least, and the limit is "
        f"{format_bytes(limit_bytes, up=False)}; {fitting}; {', or '.join(advice)}"
    )


def _largest(
    student: Student, job: Job, limit_bytes: int, tiles: Tiles, device: torch.device | None
) -> tuple[int, int] | None:
    """The largest padded size of the same aspect that some way fits, in pixels; None where none is found.

    Of an image longer than `_SIZE_STEPS` patches, as near as one part in so many.
    """
    patch_px, grid_hw = student.backbone.patch_px, job.grid_hw(student)
    if limit_bytes <= storage_bytes(student):
        return None
    longest = max(grid_hw)

    def sized(patches: int) -> tuple[int, int]:
        height, width = (max(1, cells * patches // longest) * patch_px for cells in grid_hw)
        return height, width

    def fits(patches: int) -> bool:
        smaller = dataclasses.replace(job, padded_hw=sized(patches))
        if _held_bytes(student, smaller, device) > limit_bytes:
            return False
        return predict_peak(student, ways_by_cost(student, smaller, tiles)[-1][-1], smaller, device) <= limit_bytes

    low, high = 0, longest  # what fits, what fails
    while high - low > max(1, longest // _SIZE_STEPS):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sized(low) if low else None


def describe_way(student: Student, way: Way, job: Job, limit_bytes: int, device: torch.device) -> Plan:
    """The plan, as data, of computing a job one way."""
    patch_px, tiling = student.backbone.patch_px, None
    if way.kind == "tiles":
        tiling = way.tiling(job.grid_hw(student))
    tile_hw = (0, 0) if tiling is None else tiling.tile_hw
    return Plan(
        way=way.kind,
        device=str(device),
        dtype=str(student.head.out.weight.dtype).removeprefix("torch."),
        padded_hw=job.padded_hw,
        batch=job.batch,
        micro_batch=min(way.batch, job.batch),
        piece_rows=way.rows or None,
        tile_px=None if tiling is None else (tile_hw[0] * patch_px, tile_hw[1] * patch_px),
        overlap_px=None if tiling is None else way.overlap * patch_px,
        tiles=None if tiling is None else tiling.count,
        peak_bytes=predict_peak(student, way, job, device),
        limit_bytes=limit_bytes,
    )
