"""Dense maps of images within a limit of memory: plans before it runs, and takes less where that still fails."""

import dataclasses
import gc
import logging
import math
import sys
import threading

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from brixel.backbones.vit import ViT
from brixel.errors import BrixelError, MemoryLimitError
from brixel.inference.memory.allocation_tracker import copy_with, storage_bytes
from brixel.inference.memory.planner import (
    Job,
    Plan,
    bound_bytes,
    check_tiles,
    choose_way,
    describe_way,
    predict_peak,
    surely_fits,
)
from brixel.inference.memory.strategies import Way, maps_of, run_way, smaller
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE
from brixel.utils.memory import MARGIN, format_bytes, free_bytes, parse_bytes

_LOG = logging.getLogger("brixel")
_HOST = torch.device("cpu")
# how torch's allocators say it where they have no error class for it: the CPU's, and MPS'
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


class MemoryLimitedForward:
    """The dense maps of a run of images. What was learned of memory in one batch holds for those after it.

    ``limit``: bytes or text such as "4GiB", weights included; None: what is free on the device, less a margin.
    ``tiles``: "auto", "never" or "always"; see :class:`Plan`. ``batch``: how many images will be
    asked for at once, for :meth:`room` and :meth:`window`.
    """

    def __init__(
        self, student: Student, *, limit: int | str | None = None, tiles: str = "auto", batch: int = 1
    ) -> None:
        self._student = student
        self._tiles = check_tiles(tiles)
        self._is_given = limit is not None
        self._weights = storage_bytes(student)
        self._limit = self._free(student.head.out.weight.device) if limit is None else parse_bytes(limit)
        self._batch = batch
        self._most_an_image = self._most_waiting = 0  # bytes of the largest image so far: in work, and waiting
        self._together: dict[tuple[int, int], int] = {}  # by padded size: see together()
        self._on_host: Student | None = None
        self._ways: dict[Job, tuple[Way, bool]] = {}
        self._all_on_host = False
        self._too_much: dict[str, float] = {}  # by kind of way: pixels at a time that ran out of memory
        self._notes = WeakTensorKeyDictionary()
        self._told: set[str] = set()
        self._planning = threading.RLock()  # images are checked by the threads that decode them

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """The maps (D, 4h, 4w) of ``pixels`` (B, 3, H, W), which lie on the CPU. Raises MemoryLimitError."""
        job = Job(pixels.shape[0], (pixels.shape[2], pixels.shape[3]))
        maps = self._run(job, pixels, None)
        assert maps is not None
        return maps

    def fill(self, pixels: Tensor, room: Tensor) -> str:
        """Write the map of one image (1, 3, H, W) to ``room`` (D, Hf, Wf), which takes no memory; a note of tiles."""
        job = Job(1, (pixels.shape[2], pixels.shape[3]), to_file=True)
        self._run(job, pixels, room)
        return self._note(job)

    def tiles_of(self, features: Tensor) -> str:
        """How a map that this run made was put together from tiles; empty where it was not."""
        return str(self._notes.get(features, ""))

    def check(self, padded_hw: tuple[int, int], *, to_file: bool = False) -> None:
        """Raise MemoryLimitError where an image of that size cannot be computed, before its pixels exist."""
        job, weight = Job(1, padded_hw, to_file), self._student.head.out.weight
        rows, columns = (UPSCALE * cells for cells in job.grid_hw(self._student))
        map_bytes = 0 if to_file else weight.shape[0] * rows * columns * weight.element_size()
        with self._planning:
            way, on_host = self._way(job)
            need = 0 if on_host else self._need(way, job) - self._weights
            check_host(padded_hw, map_bytes)
            self._most_an_image = max(self._most_an_image, need)
            self._most_waiting = max(self._most_waiting, 3 * 4 * padded_hw[0] * padded_hw[1] + map_bytes)

    def room(self) -> int:
        """Bytes of the computer's memory for what waits: images made ready ahead, maps whose turn has not come.

        Where the model is on the CPU, what the limit leaves beside batches of the largest image so far; else a
        quarter of what is free.
        """
        if self._student.head.out.weight.device != _HOST:
            free = free_bytes(_HOST)
            return sys.maxsize if free is None else free // 4
        return max(0, self._limit - self._weights - self._batch * self._most_an_image)

    def window(self) -> int:
        """Images and maps that may be held: a batch, and as many as half of :meth:`room` is enough for.

        Maps of one batch may share their memory, which is free when the last of them is.
        """
        batch = min(self._together.values(), default=self._batch)
        spare = self.room() // 2 - (batch - 1) * self._most_waiting
        return batch + max(0, spare) // max(1, self._most_waiting)

    def together(self, padded_hw: tuple[int, int]) -> int:
        """How many images of a size to ask for at once: a batch, halved until each is computed as it is alone.

        The maps of a batch are there at once, so that more of them may need tiles, or not fit at all.
        """
        with self._planning:
            if padded_hw not in self._together:
                batch = self._batch
                while batch > 1 and not self._is_as_alone(Job(batch, padded_hw)):
                    batch //= 2
                self._together[padded_hw] = batch
            return self._together[padded_hw]

    def _is_as_alone(self, job: Job) -> bool:
        alone = Job(1, job.padded_hw)
        try:
            way, on_host = self._way(alone)
        except MemoryLimitError:  # since the image was checked, memory ran out: its turn will tell
            return False
        if on_host or self._weights + job.batch * (self._need(way, alone) - self._weights) <= self._limit:
            return True  # nothing need be predicted for the batch
        return self._need(way, job) <= self._limit

    def _need(self, way: Way, job: Job) -> int:
        """Bytes that an image takes, weights included: bound from above where that is enough for batches of it."""
        if self._is_trusting(dataclasses.replace(job, batch=self._batch)):
            return self._weights + bound_bytes(self._student, job)
        try:
            return predict_peak(self._student, way, job)
        except Exception:  # a backbone of someone else's that does not run without data
            return self._limit

    def plan(self, job: Job) -> Plan:
        """How a job will be computed."""
        way, on_host = self._way(job)
        device = _HOST if on_host else self._student.head.out.weight.device
        limit = self._free(_HOST) if on_host else self._limit
        return describe_way(self._student, way, job, limit, device)

    # ---------------------------------------------------------------- which way

    def _way(self, job: Job) -> tuple[Way, bool]:
        """The way for a job, and whether it is on the CPU because the accelerator has no room."""
        with self._planning:
            return self._way_locked(job)

    def _way_locked(self, job: Job) -> tuple[Way, bool]:
        if job not in self._ways:
            self._ways[job] = self._choose(job)
        way, on_host = self._ways[job]
        grid_hw = job.grid_hw(self._student)
        while self._amount(way, job) >= self._too_much.get(way.kind, math.inf):
            less = smaller(way, grid_hw, tiles=self._tiles != "never")
            if less is None:
                break
            way = less
        self._ways[job] = way, on_host
        return way, on_host

    def _choose(self, job: Job) -> tuple[Way, bool]:
        student = self._student
        if self._all_on_host:
            return self._choose_on_host(job), True
        if self._is_trusting(job):
            return Way("whole", batch=job.batch), False
        try:
            return choose_way(student, job, self._limit, self._tiles), False
        except MemoryLimitError:
            if student.head.out.weight.device == _HOST:
                raise
            return self._choose_on_host(job), True
        except Exception as error:  # a backbone of someone else's that does not run without data
            if self._is_given:
                raise BrixelError(
                    f"the memory that {type(student.backbone).__name__} needs cannot be predicted "
                    f"({type(error).__name__}: {error}); leave out memory_limit"
                ) from error
            return Way("whole", batch=job.batch), False

    def _is_trusting(self, job: Job) -> bool:
        """Whether there is so much memory that nothing need be predicted.

        Of a limit that was given, half: what waits takes the rest. The bound is not of other people's backbones.
        """
        spare = self._limit - self._weights
        if self._is_given:
            spare = spare // 2 if isinstance(self._student.backbone, ViT) else 0
        return self._tiles != "always" and surely_fits(self._student, job, spare)

    def _free(self, device: torch.device) -> int:
        """What is free on a device less a margin, and the weights that lie there; no bound where it is not known."""
        free = free_bytes(device)
        weights = self._weights if self._student.head.out.weight.device == device else 0
        return sys.maxsize if free is None else int((1 - MARGIN) * free) + weights

    def _choose_on_host(self, job: Job) -> Way:
        return choose_way(self._student, job, self._free(_HOST), self._tiles, _HOST)

    def _amount(self, way: Way, job: Job) -> int:
        """Pixels that are in work at a time."""
        patch_px = self._student.backbone.patch_px
        if way.kind == "whole":
            return min(way.batch, job.batch) * job.padded_hw[0] * job.padded_hw[1]
        if way.kind == "pieces":
            return way.rows * patch_px * job.padded_hw[1]
        return (way.side * patch_px) ** 2

    # ---------------------------------------------------------------- run

    def _run(self, job: Job, pixels: Tensor, room: Tensor | None) -> list[Tensor] | None:
        """The maps, or None where they were written to ``room``."""
        while True:
            way, on_host = self._way(job)
            self._tell(job, way, on_host)
            done, maps = _attempt(self._host() if on_host else self._student, way, pixels, room)
            if done:  # else what was computed is freed by now
                for each in maps or []:
                    self._notes[each] = self._note(job)
                return maps
            self._take_less(job, way, on_host)

    def _take_less(self, job: Job, way: Way, on_host: bool) -> None:
        """After a failure: less at a time from now on, at last on the CPU."""
        with self._planning:
            self._take_less_locked(job, way, on_host)

    def _take_less_locked(self, job: Job, way: Way, on_host: bool) -> None:
        amount = self._amount(way, job)
        self._too_much[way.kind] = min(amount, self._too_much.get(way.kind, amount))
        less = smaller(way, job.grid_hw(self._student), tiles=self._tiles != "never")
        if less is not None:
            self._ways[job] = less, on_host
        elif self._student.head.out.weight.device != _HOST and not on_host:
            self._all_on_host, self._too_much, self._ways = True, {}, {}
        else:
            height, width = job.padded_hw
            raise MemoryLimitError(
                f"memory ran out for an image of {height}x{width} pixels (height x width), however little was done at "
                "a time; close other programs, or ask for a smaller short_side_px"
            )

    def _host(self) -> Student:
        if self._on_host is None:
            self._on_host = copy_with(self._student, Tensor.cpu).eval()
        return self._on_host

    def _note(self, job: Job) -> str:
        way, _ = self._ways[job]
        if way.kind != "tiles":
            return ""
        tiling, patch_px = way.tiling(job.grid_hw(self._student)), self._student.backbone.patch_px
        height, width = (patch_px * each for each in tiling.tile_hw)
        return f"{tiling.count} of {height}x{width} px, overlapping by {way.overlap * patch_px} px or more"

    def _tell(self, job: Job, way: Way, on_host: bool) -> None:
        """Say once in a run that maps are approximate, and once that the CPU is at work."""
        if way.kind == "tiles" and "tiles" not in self._told:
            self._told.add("tiles")
            _LOG.warning(
                "an image of %dx%d px is computed in tiles, %s, blended where they overlap: an approximation, since "
                "tiles do not attend to one another; tiles='never' refuses it",
                *job.padded_hw,
                self._note(job),
            )
        if on_host and "cpu" not in self._told:
            self._told.add("cpu")
            device = self._student.head.out.weight.device
            _LOG.warning("%s has too little memory for %dx%d px: the CPU computes them", device, *job.padded_hw)


def check_host(padded_hw: tuple[int, int], map_bytes: int = 0) -> None:
    """Raise MemoryLimitError where the computer has no room for the pixels of an image and so large a map."""
    height, width = padded_hw
    need, free = 3 * 4 * height * width + map_bytes, free_bytes(_HOST)
    if free is not None and need > free:
        raise MemoryLimitError(
            f"an image of {height}x{width} pixels (height x width) takes {format_bytes(need)}, with its map if that is "
            f"kept in memory, and the computer has {format_bytes(free, up=False)} free; ask for a smaller "
            "short_side_px, or write the map to a file (out='map.npy', or --format npy)"
        )


def _attempt(student: Student, way: Way, pixels: Tensor, room: Tensor | None) -> tuple[bool, list[Tensor] | None]:
    """Whether there was memory enough, and the maps. What a failed attempt held is free when this returns."""
    try:
        if room is None:
            return True, maps_of(student, way, pixels)
        run_way(student, way, pixels, [room])
        return True, None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()  # outside the except block, where the traceback would hold the tensors of the failed attempt
    if student.head.out.weight.device.type == "cuda":
        torch.cuda.empty_cache()
    return False, None
