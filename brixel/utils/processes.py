"""Which process of a run this is, by the variables that `torchrun` and other launchers set."""

import os
from dataclasses import dataclass

import torch

from brixel.errors import BrixelError


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among those of its run: RANK of WORLD_SIZE, and LOCAL_RANK, its number on this machine."""

    rank: int = 0
    processes: int = 1
    local_rank: int | None = None


def own_device(device: str) -> str:
    """The device as given; of GPUs without a number, with several processes on one machine, that of this process."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    local_rank = launched_process().local_rank
    return device if local_rank is None else f"cuda:{local_rank % torch.cuda.device_count()}"


def launched_process() -> LaunchedProcess:
    """Read the environment; one process where WORLD_SIZE is not set.

    Raises:
        BrixelError: The variables do not describe a process, as those that an earlier run left behind.
    """
    processes = _number("WORLD_SIZE", at_least=1)
    if processes is None:
        return LaunchedProcess(local_rank=_number("LOCAL_RANK", at_least=0))
    rank = _number("RANK", at_least=0)
    if rank is None and processes == 1:
        rank = 0
    if rank is None or rank >= processes:
        given = "RANK is not set" if rank is None else f"RANK is {rank}"
        raise BrixelError(
            f"the environment says WORLD_SIZE={processes}, but {given}; expected a rank of 0 to {processes - 1} in "
            "each process, as torchrun sets it: start with torchrun, or unset WORLD_SIZE and RANK for one process"
        )
    return LaunchedProcess(rank, processes, _number("LOCAL_RANK", at_least=0))


def _number(name: str, *, at_least: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or not text.isascii() or int(text) < at_least:
        raise BrixelError(
            f"the environment says {name}={text}; expected a whole number from {at_least} up: unset it, or start with "
            "torchrun"
        )
    return int(text)
