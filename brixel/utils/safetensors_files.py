"""Opening safetensors files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from brixel.errors import DamagedFileError
from brixel.utils.out_of_memory import raise_if_out_of_memory
from brixel.utils.structured_files import check_regular


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a file, as ``safe_open`` does, and read tensors of it in the context.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is no safetensors file, or lacks a tensor that is read.
        MemoryError: There is too little memory for it.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(
            f"{path} is damaged or no safetensors file ({error}); fetch or write it again"
        ) from error
    except (OSError, RuntimeError) as error:
        raise_if_out_of_memory(error, path)
        raise
