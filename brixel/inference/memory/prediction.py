"""How much memory a strategy needs for a batch of images.

The need is counted, not estimated: the functions that will run first run on tensors without data
(:mod:`brixel.inference.memory.shape_rules`), under an :class:`AllocationTracker`. Of what repeats, little runs: one
backbone block before each map, three chunks, one tile. Bounds that cost nothing come first where they decide.
"""

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brixel.backbones.base import Backbone
from brixel.backbones.vit import ViT
from brixel.feature_maps.host_copy import crop
from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes
from brixel.inference.memory.shape_rules import META, AttentionWithoutData, run_on_meta
from brixel.inference.memory.strategies import Strategy, new_outputs, patch_grid_of
from brixel.model.student import Student
from brixel.model.universal import CELLS, STEM_CHANNELS
from brixel.model.upsampler import TrainedUpsampler, WithUniversal

HOST = torch.device("cpu")
HALF_INT = 2**31 - 1
"""Several kernels count elements in 32 bits: no tensor of a whole pass may have more."""
_INDICES_PER_PATCH = 1024  # of one extractor: 4 queries, 16 heads, 4 points, 4 corners
_STEM_PER_PIXEL = 16  # 64 channels at half the resolution
_PER_WINDOW = 8000  # of the universal upsampler, per patch: inner products, cosines, the low-resolution map
_PER_OUTPUT_CELL = 700  # guide, stem, trunk, weights
# what kernels, the allocator and Python take beside tensors, measured as resident memory: docs/results/memory.md
_FIXED_OVERHEAD = 4 * 2**20
_PER_THREAD = 3 * 2**20  # and each thread after the first
_MOST_THREADS = 16
_OVERHEAD_SHARE = 1 / 32
_HALF_OVERHEAD = 24 * 2**20  # kernels of half precision on the CPU, which oneDNN compiles when they are first used

_PEAKS: "weakref.WeakKeyDictionary[Backbone, dict[Any, int]]" = weakref.WeakKeyDictionary()


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


def needed_bytes(student: Student, strategy: Strategy, job: Job, device: torch.device | None = None) -> int:
    """Memory that must be there for a job: :func:`predict_peak`, and what is taken beside the tensors."""
    return with_overhead(student, predict_peak(student, strategy, job, device))


def with_overhead(student: Student, peak_bytes: int) -> int:
    """A peak of tensors, weights included, with what is taken beside them."""
    is_half_on_host = student.dtype.itemsize < 4 and student.device.type == "cpu"
    threads = min(torch.get_num_threads(), _MOST_THREADS) - 1
    fixed = _FIXED_OVERHEAD + threads * _PER_THREAD + is_half_on_host * _HALF_OVERHEAD
    return peak_bytes + fixed + int(_OVERHEAD_SHARE * max(0, peak_bytes - storage_bytes(student)))


def predict_peak(student: Student, strategy: Strategy, job: Job, device: torch.device | None = None) -> int:
    """Peak bytes of tensors on ``device`` (the model's own where None), weights included, of computing a job."""
    device = student.device if device is None else device
    key = (strategy, job, device.type, student.dtype, student.scale, type(student.upsampler), storage_bytes(student))
    known = _PEAKS.setdefault(student.backbone, {})
    if key not in known:
        known[key] = _count(student, strategy, job, device)
    return known[key]


class _Counter(AllocationTracker):
    """Counts tensors of the meta device."""

    def __init__(self) -> None:
        super().__init__(META.type)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation by its rule."""
        return run_on_meta(func, args, kwargs)


def _count(student: Student, strategy: Strategy, job: Job, device: torch.device) -> int:
    twin = _without_data(student)
    counter = _Counter()
    counter.live = counter.peak = storage_bytes(student)
    with META:
        images = [torch.empty(3, *job.padded_hw, dtype=torch.float32) for _ in range(job.batch)]
        # maps lie in files, or on the computer while the model is on an accelerator
        is_elsewhere = job.to_file or device.type != "cpu"
        outputs = new_outputs(twin, torch.empty(job.batch, 3, *job.padded_hw)) if is_elsewhere else None
        with AttentionWithoutData(), counter:
            counter.leave_out([*twin.parameters(), *twin.buffers(), *(outputs or [])])
            counter.track(images)
            run_job(twin, strategy, images, outputs, counting=True)
    return counter.peak


def _without_data(student: Student) -> Student:
    """A copy on the meta device, whose backbone has only the blocks whose maps are read: the others repeat them."""
    shallow = copy.copy(student)
    if isinstance(student.backbone, ViT):
        backbone, blocks = copy.copy(student.backbone), student.backbone.blocks
        backbone._modules = {**backbone._modules, "blocks": nn.ModuleList(blocks[index] for index in student.blocks)}
        backbone.depth = len(student.blocks)
        shallow._modules = {**student._modules, "backbone": backbone}
        shallow.blocks = tuple(range(backbone.depth))

    def without_data(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)

    return copy_with(shallow, without_data).eval()


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


# ---------------------------------------------------------------- bounds


def surely_fits(student: Student, job: Job, spare_bytes: int) -> bool:
    """Whether a whole pass fits, by an upper bound that costs nothing; ``spare_bytes``: without the weights."""
    return bound_bytes(student, job) < spare_bytes and is_countable(student, job.batch, job)


def bound_bytes(student: Student, job: Job) -> int:
    """An upper bound of what a whole pass takes, without the weights."""
    height, width = job.grid_hw(student)
    patch_px, channels, scale = student.patch_px, student.embed_dim, student.scale
    # per patch: dense maps twice, queries, tokens and what attention and feed-forward make of them
    elements = (2 * scale**2 + 60) * channels
    if isinstance(student.upsampler, TrainedUpsampler):
        elements += 8 * _INDICES_PER_PATCH + 4 * _STEM_PER_PIXEL * patch_px**2  # points; the stem
    if isinstance(student.upsampler, WithUniversal):
        elements += 2 * (CELLS + 1) * channels + _PER_WINDOW + _PER_OUTPUT_CELL * scale**2 + 8 * patch_px**2
    patches = max(4, height * width)  # what does not depend on the size is less than three of them
    return 8 * job.batch * patches * elements


def held_bytes(student: Student, job: Job, device: torch.device | None) -> int:
    """A lower bound of any strategy: the weights, and on the CPU the pixels and the maps that do not go to a file."""
    if (student.device if device is None else device).type != "cpu":
        return with_overhead(student, storage_bytes(student))
    held = job.batch * (pixel_bytes(job.padded_hw) + job.map_bytes(student))
    return with_overhead(student, storage_bytes(student) + held)


def is_countable(student: Student, batch: int, job: Job) -> bool:
    """Whether a whole pass of ``batch`` images stays within what kernels count."""
    height, width = job.grid_hw(student)
    patch_px, channels, scale = student.patch_px, student.embed_dim, student.scale
    per_patch = scale**2 * channels
    if isinstance(student.upsampler, TrainedUpsampler):
        per_patch = max(per_patch, _INDICES_PER_PATCH, _STEM_PER_PIXEL * patch_px**2)
    if isinstance(student.upsampler, WithUniversal):
        per_patch = max(per_patch, (CELLS + 1) * channels, 4 * STEM_CHANNELS * scale**2)
    return batch * height * width * per_patch <= HALF_INT
