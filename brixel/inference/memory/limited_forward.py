"""Dense maps of images within a memory limit: planned before they run, and computed in less where that still fails."""

import functools
import gc
import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from brixel.errors import MemoryLimitError
from brixel.inference.memory.allocation_tracker import copy_with
from brixel.inference.memory.budget import MemoryBudget
from brixel.inference.memory.planner import Planner
from brixel.inference.memory.prediction import HOST, Job, pixel_bytes
from brixel.inference.memory.strategies import Strategy
from brixel.model.student import Student
from brixel.utils.eval_mode import evaluation_mode
from brixel.utils.memory import format_bytes, free_bytes, return_freed_memory
from brixel.utils.out_of_memory import is_out_of_memory
from brixel.utils.torch_defaults import plain_defaults

_LOG = logging.getLogger("brixel")


class ComputedMap(NamedTuple):
    """A dense map (D, 4h, 4w), and what its meta says of tiles: nothing where there were none."""

    features: Tensor
    meta: Mapping[str, str]


class MemoryLimitedForward:
    """Computes the dense maps of a stream of images. What ran out of memory in one batch is not tried in the next.

    Args:
        student: The model.
        limit: Bytes or text such as "4GiB", weights included; None: what is free on the device, less a margin.
        tiles: "auto", "never" or "always"; see :meth:`brixel.inference.dense_features.DenseFeatures.extract`.
        batch: Images that will be asked for at once, for the budget.

    Attributes:
        budget: What may be held of images that were passed to :meth:`check`.
    """

    def __init__(
        self, student: Student, *, limit: int | str | None = None, tiles: str = "auto", batch: int = 1
    ) -> None:
        self._student = student
        self._planner = Planner(student, limit, tiles)
        if limit is not None and student.device == HOST:
            return_freed_memory()
        self.budget = MemoryBudget(self._planner, batch)
        self._warned: set[str] = set()

    def __call__(self, pixels: Tensor, *, on_device: bool = False) -> list[ComputedMap]:
        """Compute the maps of ``pixels`` (B, 3, H, W), on the CPU. Raises MemoryLimitError.

        ``on_device``: maps that were computed whole stay on the model's device.
        """
        job = Job(pixels.shape[0], (pixels.shape[2], pixels.shape[3]))
        maps, meta = self._run(job, pixels, None, on_device)
        return [ComputedMap(dense, meta) for dense in maps]

    def fill(self, pixels: Tensor, out: Tensor) -> Mapping[str, str]:
        """Write the map of one image (1, 3, H, W) to ``out`` (D, Hf, Wf), which takes no memory; the map's meta."""
        job = Job(1, (pixels.shape[2], pixels.shape[3]), to_file=True)
        return self._run(job, pixels, out)[1]

    @plain_defaults()
    def check(self, padded_hw: tuple[int, int], *, to_file: bool = False) -> None:
        """Raise MemoryLimitError where an image of that size cannot be computed, before its pixels exist."""
        job = Job(1, padded_hw, to_file)
        self._planner.choose(job)
        check_host(padded_hw, job.map_bytes(self._student))
        self.budget.add_image(job)

    @plain_defaults()
    def _run(
        self, job: Job, pixels: Tensor, out: Tensor | None, on_device: bool = False
    ) -> tuple[list[Tensor], dict[str, str]]:
        """The maps of a job (``out`` alone if it is given), and their meta."""
        patch_px = self._student.patch_px
        while True:
            strategy, on_host = choice = self._planner.choose(job)
            meta = {} if strategy.exact else {"tiles": strategy.describe(job.grid_hw(self._student), patch_px)}
            self._warn(job, on_host, meta)
            with evaluation_mode(self._student):
                maps = _attempt(self._host if on_host else self._student, strategy, pixels, out, on_device)
            if maps is not None:
                return maps, meta
            self._planner.take_less(job, choice)

    @functools.cached_property
    def _host(self) -> Student:
        """A copy of the model on the CPU."""
        return copy_with(self._student, Tensor.cpu).eval()

    def _warn(self, job: Job, on_host: bool, meta: Mapping[str, str]) -> None:
        """Say once that maps are approximate, and once that the CPU computes them."""
        if "tiles" in meta and "tiles" not in self._warned:
            self._warned.add("tiles")
            _LOG.warning(
                "an image of %dx%d px is computed in tiles, %s, blended where they overlap: an approximation, since "
                "tiles do not attend to one another; tiles='never' refuses it",
                *job.padded_hw,
                meta["tiles"],
            )
        if on_host and "cpu" not in self._warned:
            self._warned.add("cpu")
            device = self._planner.device
            _LOG.warning("%s has too little memory for %dx%d px: the CPU computes them", device, *job.padded_hw)


def check_host(padded_hw: tuple[int, int], map_bytes: int = 0) -> None:
    """Raise MemoryLimitError where the computer's free memory is too small for an image's pixels and its map."""
    height, width = padded_hw
    need, free = pixel_bytes(padded_hw) + map_bytes, free_bytes(HOST)
    if free is not None and need > free:
        raise MemoryLimitError(
            f"an image of {height}x{width} pixels (height x width) takes {format_bytes(need)}, with its map if that is "
            f"kept in memory, and the computer has {format_bytes(free, up=False)} free; ask for a smaller "
            "short_side_px, or write the map to a file (out='map.npy', or --format npy)"
        )


def _attempt(
    student: Student, strategy: Strategy, pixels: Tensor, out: Tensor | None, on_device: bool
) -> list[Tensor] | None:
    """The maps, or None where memory ran out; what a failed attempt held is free when this returns."""
    try:
        return list(strategy.run(student, pixels, None if out is None else [out], on_device=on_device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # outside the except block, where the traceback would hold the tensors of the failed attempt
    if student.device.type == "cuda":
        torch.cuda.empty_cache()
    return None
