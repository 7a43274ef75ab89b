"""Reading what ``torch.save`` wrote, as data only: a file can hold numbers and containers of them, but run no code."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from brixel.errors import DamagedFileError
from brixel.utils.out_of_memory import raise_if_out_of_memory
from brixel.utils.structured_files import check_regular


def load_torch(path: Path, *, verify: bool) -> Any:
    """The content of a zip file of ``torch.save``, on the CPU.

    Args:
        path: The file.
        verify: Whether checksums are compared, for which all of it is read; torch does not notice damage in a tensor.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is no such file, is not whole, or holds other objects.
        MemoryError: There is too little memory for it.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_stored(archive, path.stat().st_size)
            if verify and (name := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {name} is wrong")
        return load_data(path)
    except pickle.UnpicklingError as error:
        raise DamagedFileError(
            f"{path} is damaged, or holds other objects than numbers and their containers"
        ) from error
    except Exception as error:  # damage causes many kinds of errors: IndexError, struct.error, BadZipFile, ...
        raise_if_out_of_memory(error, path)
        raise DamagedFileError(
            f"{path} is damaged or no file of torch.save ({error or type(error).__name__})"
        ) from error


def load_data(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.load` reads of a file as data only, without its warnings: about unusual versions of pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        with path.open("rb") as file:  # a path with this ending, torch would not take for a file of its own
            return torch.load(file, map_location="cpu", weights_only=True)


def _check_stored(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """torch.save does not compress: what would grow is no file of its."""
    entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > file_bytes:
        raise zipfile.BadZipFile("its parts are larger than the file")
