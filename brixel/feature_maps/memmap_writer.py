"""A feature map that goes to a file as it is made, for maps that are too large for memory."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.storage import check_writable, write_sidecar
from brixel.utils.atomic_files import atomic_path
from brixel.utils.devices import dtype_name


def check_map_path(path: str | os.PathLike[str]) -> Path:
    """The path, or BrixelError where a map cannot be written there as it is made."""
    target = Path(path)
    if target.suffix != ".npy":
        raise BrixelError(f"{target} ends in {target.suffix!r}; a map is written as it is made to *.npy alone")
    check_writable(target)
    return target


def make_map_file(
    path: Path,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    fill: Callable[[Tensor], Mapping[str, str]],
    *,
    image_hw: tuple[int, int],
    stride: tuple[float, float],
) -> FeatureMap:
    """Have ``fill`` write the cells (D, Hf, Wf) into a file that is mapped into memory; it returns the map's meta.

    The file appears whole or not at all, over an earlier one. ``dtype`` bfloat16 becomes float32, which `.npy` lacks.
    Returns the map as :meth:`FeatureMap.load` reads it. Raises OSError where the disk is full.
    """
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    with atomic_path(path) as unfinished:
        cells = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype_name(dtype), shape=shape)
        _reserve(unfinished, cells.nbytes + cells.offset)
        meta = fill(torch.from_numpy(cells))
        cells.flush()
        fields = {
            "image_hw": image_hw,
            "stride": stride,
            "meta": dict(meta),
            "shape": shape,
            "dtype": dtype_name(dtype),
        }
        del cells
        write_sidecar(path, fields)
    return FeatureMap.load(path)


def _reserve(path: Path, size: int) -> None:
    """Take the room on the disk now: a mapped file that finds none while it is written ends the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
