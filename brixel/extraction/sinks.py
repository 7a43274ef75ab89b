"""Where maps go: a file for each image, or files of many maps in one of several formats."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from brixel.errors import BrixelError
from brixel.extraction.manifest import WrittenFile
from brixel.extraction.writers import FileWriter, MapWriter, PartWriter
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.utils.fields import check_field, one_of
from brixel.utils.memory import parse_bytes

FILES, SHARDS, PARQUET = "files", "shards", "parquet"
SINKS = (FILES, *CONTAINERS)
"""The names of the sinks."""

DEFAULT_ENDING, DEFAULT_PART_BYTES = ".safetensors", 2**28


@dataclass(frozen=True)
class Sink:
    """A kind of output; :meth:`choose` makes one of what a user asked for.

    Attributes:
        name: One of SINKS.
        ending: For files, their ending.
        part_bytes: For the others, the size of the features in a file.
    """

    name: str
    ending: str = DEFAULT_ENDING
    part_bytes: int = DEFAULT_PART_BYTES

    @classmethod
    def choose(cls, name: str | None, ending: str, part_bytes: int | None) -> "Sink":
        """The sink of that name; without one files, or shards where a size of shards is given.

        Raises:
            BrixelError: There is no such sink, or the settings contradict each other.
        """
        if name is None:
            name = FILES if part_bytes is None else SHARDS
        check_field("sink", name, one_of(*SINKS))
        if part_bytes is not None and (part_bytes < 1 or ending != DEFAULT_ENDING):
            raise BrixelError(f"shards of {part_bytes} bytes as {ending}: expected a positive size, and safetensors")
        if name == FILES and part_bytes is not None:
            raise BrixelError(
                "a shard size was given for the sink 'files', which has a file for each image: leave it out"
            )
        if name != FILES and ending != DEFAULT_ENDING:
            raise BrixelError(f"{ending[1:]} in the sink {name!r}, of another format: give the sink 'files'")
        return cls(name, ending, DEFAULT_PART_BYTES if part_bytes is None else part_bytes)

    @property
    def kind(self) -> str:
        """What the settings in a manifest call it; files are called by their ending, as in version 0.1."""
        return self.ending if self.name == FILES else self.name

    def stored_dtype(
        self, save_dtype: torch.dtype | None, model_dtype: torch.dtype, reduce: Reduce | None = None
    ) -> torch.dtype:
        """The dtype of the features that are written. Raises BrixelError where the sink cannot hold it."""
        made = model_dtype if reduce is None else reduce.dtype_of(model_dtype)
        if self.name != FILES:
            CONTAINERS[self.name].check_dtype(save_dtype or made)
        elif self.ending == ".npy" and torch.bfloat16 in (save_dtype, None if reduce is None else made):
            raise BrixelError("npy does not support bfloat16: write safetensors, or save as float16 or float32")
        return save_dtype or made

    def checked_reduction(self, reduce: Reduce | str, save_dtype: torch.dtype | None) -> Reduce:
        """The reduction, where its results can be written. Raises BrixelError."""
        reduce = Reduce.of(reduce)
        if self.ending == ".npy" and (reduce.has_scales or not reduce.makes_maps):
            what = "scales of int8" if reduce.makes_maps else "features of points or regions"
            raise BrixelError(f"npy does not support {what}, which {reduce.spec} gives: write safetensors")
        if not reduce.makes_maps and self.name not in (FILES, SHARDS):
            raise BrixelError(
                f"{reduce.spec} gives features of points or regions, which the sink {self.name!r} does not hold: "
                "give 'files' or 'shards'"
            )
        if save_dtype is not None and reduce.sets_dtype:
            raise BrixelError(
                f"{reduce.spec} says the dtype already: leave out save_dtype=, or the dtype of the reduction"
            )
        return reduce

    def split_memory(self, limit: int | str | None, device: torch.device) -> tuple["Sink", int | str | None]:
        """The sink, and the limit that is left for the model, where maps that wait for a file take the same memory.

        A file of many maps takes twice its bytes while it is written, so it gets at most a quarter of the limit.
        """
        if self.name == FILES or limit is None or device.type != "cpu":
            return self, limit
        limit_bytes = parse_bytes(limit)
        part_bytes = max(1, min(self.part_bytes, limit_bytes // 4))
        return Sink(self.name, self.ending, part_bytes), limit_bytes - 2 * part_bytes

    def writer(self, folder: Path, owner: str, written: Iterable[WrittenFile] = ()) -> MapWriter:
        """What writes into a folder; see :class:`PartWriter` for the owner."""
        if self.name == FILES:
            return FileWriter(folder, self.ending)
        return PartWriter(folder, CONTAINERS[self.name], self.part_bytes, owner, written)
