"""Reading `.npy` files: the header is matched, not evaluated, and its shape is compared with the size of the file."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from brixel.errors import DamagedFileError
from brixel.utils.out_of_memory import raise_if_out_of_memory
from brixel.utils.structured_files import check_regular

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by the format's major version
_MAX_HEADER_BYTES = 10_000
_HEADER = re.compile(
    r"\{\s*'descr':\s*'(?P<dtype>[<>|=]?[biuf]\d{1,2})',\s*'fortran_order':\s*(?P<fortran>True|False),"
    r"\s*'shape':\s*\((?P<shape>[\d ,]{0,400})\),?\s*\}\s*"
)


def open_npy(path: Path) -> "np.memmap[Any, np.dtype[Any]]":
    """The array of numbers in a `.npy` file, mapped into memory copy-on-write.

    Raises:
        MissingFileError: There is no such file.
        DamagedFileError: It is no such file, or not whole.
        MemoryError: There is too little memory for it.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start[:6] != _MAGIC or len(start) < 8 or start[6] not in _LENGTH_BYTES:
                raise DamagedFileError(f"{path} is no .npy file: it does not start like one")
            length = int.from_bytes(file.read(_LENGTH_BYTES[start[6]]), "little")
            header = file.read(min(length, _MAX_HEADER_BYTES)).decode("latin-1")
            offset, size = file.tell(), file.seek(0, 2)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read ({error.strerror or error})") from error
    found = _HEADER.fullmatch(header)
    try:
        if found is None or len(header) != length:
            raise ValueError("its header does not describe an array of numbers")
        dtype, shape = np.dtype(found["dtype"]), tuple(int(side) for side in found["shape"].split(",") if side.strip())
        needed = offset + dtype.itemsize * math.prod(shape)
        if 0 in shape or needed != size:
            raise ValueError(f"an array of {shape} {dtype} makes {needed} bytes, and the file has {size}")
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    try:
        return np.memmap(path, dtype, "c", offset, shape, "F" if found["fortran"] == "True" else "C")
    except OSError as error:
        raise_if_out_of_memory(error, path)
        raise
