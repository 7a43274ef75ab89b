"""Writes a feature map to a file while it is computed, for maps that are too large for memory."""

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
from brixel.utils.fields import check_field, path_like


def check_map_path(path: str | os.PathLike[str]) -> Path:
    """The path of a map that is written while it is computed. Raises BrixelError where that cannot be."""
    target: Path = check_field("out", path, path_like())
    if target.suffix != ".npy":
        raise BrixelError(f"{target} ends in {target.suffix!r}; a map is written while it is computed only as .npy")
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
    """Write a map through ``fill``. The file appears whole or not at all, and replaces an earlier one.

    Args:
        path: A `.npy` file, checked by :func:`check_map_path`.
        shape: (D, Hf, Wf).
        dtype: Of the cells; bfloat16, which `.npy` lacks, becomes float32.
        fill: Writes the cells (D, Hf, Wf), a file that is mapped into memory, and returns the map's meta.
        image_hw: As in :class:`FeatureMap`.
        stride: As in :class:`FeatureMap`.

    Returns:
        The map as :meth:`FeatureMap.load` reads it.

    Raises:
        OSError: The disk is full.
    """
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    with atomic_path(path) as unfinished:
        cells = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype_name(dtype), shape=shape)
        _reserve(unfinished, cells.nbytes + cells.offset)
        meta = fill(torch.from_numpy(cells))
        cells.flush()
        del cells
        geometry = {"image_hw": image_hw, "stride": stride, "meta": dict(meta)}
        write_sidecar(path, {**geometry, "shape": shape, "dtype": dtype_name(dtype)})
    return FeatureMap.load(path)


def _reserve(path: Path, size: int) -> None:
    """Reserve the bytes on the disk: a full disk ends the process when it shows while a mapped file is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
