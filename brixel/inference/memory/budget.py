"""What a stream of images may hold in addition to the batch in work: images decoded ahead, maps that wait."""

import dataclasses
import sys

from brixel.errors import MemoryLimitError
from brixel.inference.memory.planner import Planner
from brixel.inference.memory.prediction import HOST, Job, bound_bytes, needed_bytes, pixel_bytes
from brixel.inference.memory.strategies import Strategy
from brixel.utils.memory import free_bytes


class MemoryBudget:
    """How many images and maps a stream may hold, by the largest image that was added so far.

    Args:
        planner: The limit, and how images are computed within it.
        batch: Images that are asked for at once.
    """

    def __init__(self, planner: Planner, batch: int) -> None:
        self._planner = planner
        self._batch = batch
        self._largest_need = 0  # bytes in work for one image, without the weights
        self._largest_waiting = 0  # bytes of one image's pixels and map
        self._max_batch: dict[tuple[int, int], int] = {}

    def add_image(self, job: Job) -> None:
        """Take an image into account. Raises MemoryLimitError where it cannot be computed."""
        with self._planner.lock:
            strategy, on_host = self._planner.choose(job)
            need = 0 if on_host else self._need(strategy, job) - self._planner.weight_bytes
            self._largest_need = max(self._largest_need, need)
            waiting = pixel_bytes(job.padded_hw) + job.map_bytes(self._planner.student)
            self._largest_waiting = max(self._largest_waiting, waiting)

    def spare_bytes(self) -> int:
        """Bytes of the computer's memory for prepared images and for maps that wait for their turn.

        Where the model is on the CPU, what a batch of the largest image so far leaves of the limit; otherwise a
        quarter of what is free.
        """
        if self._planner.device != HOST:
            free = free_bytes(HOST)
            return sys.maxsize if free is None else free // 4
        return max(0, self._planner.limit_bytes - self._planner.weight_bytes - self._batch * self._largest_need)

    def max_in_flight(self) -> int:
        """Images and maps that may be held: a batch, and as many as fit into half of :meth:`spare_bytes`.

        Maps of one batch may share their memory, which is free only when the last of them is.
        """
        batch = min(self._max_batch.values(), default=self._batch)
        spare = self.spare_bytes() // 2 - (batch - 1) * self._largest_waiting
        return batch + max(0, spare) // max(1, self._largest_waiting)

    def max_batch(self, padded_hw: tuple[int, int]) -> int:
        """Images of one size to compute at once: the batch, halved until it is computed as one image is.

        The maps of a batch exist at once: more of them may need tiles, or not fit at all.
        """
        with self._planner.lock:
            if padded_hw not in self._max_batch:
                batch = self._batch
                while batch > 1 and not self._fits_as_one_does(Job(batch, padded_hw)):
                    batch //= 2
                self._max_batch[padded_hw] = batch
            return self._max_batch[padded_hw]

    def _fits_as_one_does(self, job: Job) -> bool:
        one, weights, limit = Job(1, job.padded_hw), self._planner.weight_bytes, self._planner.limit_bytes
        try:
            strategy, on_host = self._planner.choose(one)
        except MemoryLimitError:  # memory ran out since the image was checked: it fails when it is computed
            return False
        if on_host or weights + job.batch * (self._need(strategy, one) - weights) <= limit:
            return True  # without a prediction for the batch
        return self._need(strategy, job) <= limit

    def _need(self, strategy: Strategy, job: Job) -> int:
        """Bytes that a job takes, weights included; an upper bound where batches of it fit by that."""
        planner = self._planner
        if planner.surely_fits(dataclasses.replace(job, batch=self._batch)):
            return planner.weight_bytes + bound_bytes(planner.student, job)
        try:
            return needed_bytes(planner.student, strategy, job)
        except Exception:  # a foreign backbone that does not run on tensors without data
            return planner.limit_bytes
