"""Telling memory that ran out from other errors."""

from pathlib import Path

import torch

# what the allocators of the CPU and of MPS say, and the system to who maps a file: torch has no error class for these
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def raise_if_out_of_memory(error: Exception, path: str | Path) -> None:
    """Raise MemoryError, which names the file that was read, where ``error`` says that memory ran out."""
    if is_out_of_memory(error):
        raise MemoryError(f"{path} does not fit in memory ({error})") from error
