"""Zarr v3 groups: an array (N, D, Hf, Wf) for every shape of map, one shard with a chunk for each image.

The attributes of an array hold, under IMAGES_KEY, what belongs to its images in their order: the relative path,
`image_hw`, `stride` and `meta`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError, DamagedFileError, MissingFileError
from brixel.feature_maps.containers.base import (
    StoredMap,
    check_float_dtype,
    check_utf8,
    checked_geometry,
    not_described,
)
from brixel.feature_maps.storage import as_array
from brixel.utils.extras import import_extra
from brixel.utils.structured_files import check_regular, checking_content

IMAGES_KEY = "images"
_DIMENSIONS = ("image", "channel", "y", "x")


class ZarrGroups:
    """A folder in Zarr's third format, which holds a group."""

    title, suffix, folder = "a Zarr group", ".zarr", "zarr"
    is_folder, holds_parts, max_values = True, False, None

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse bfloat16."""
        check_float_dtype(self.title, dtype)

    def check_image(self, image: str) -> None:
        """Refuse a name that is not UTF-8."""
        check_utf8(image)

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a group with an array for every shape."""
        group = _import().create_group(str(path), zarr_format=3)
        by_shape = sorted(maps, key=lambda stored: tuple(stored.features.shape))  # stable: images keep their order
        for shape, same in groupby(by_shape, key=lambda stored: tuple(stored.features.shape)):
            _write_array(group, shape, list(same))

    def images(self, path: Path) -> list[str]:
        """The images in a group."""
        with _open_group(path) as group:
            return [_name(entry) for _, array in group.arrays() for entry in array.attrs[IMAGES_KEY]]

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """The map of one image."""
        with _open_group(path) as group:
            for name, array in group.arrays():
                for row, entry in enumerate(array.attrs[IMAGES_KEY]):
                    if _name(entry) == image:
                        check_regular(path / name / "c" / "0" / "0" / "0" / "0")  # the shard; zarr reads zeros without
                        geometry = {key: value for key, value in entry.items() if key != "image"}
                        return torch.from_numpy(np.array(array[row])), checked_geometry(image, geometry)
            raise not_described(image)


def _write_array(group: Any, shape: tuple[int, ...], maps: Sequence[StoredMap]) -> None:
    stacked = np.stack([as_array(stored.features.detach().cpu()) for stored in maps])
    entries = [
        {
            "image": stored.image,
            "image_hw": list(stored.geometry["image_hw"]),
            "stride": list(stored.geometry["stride"]),
            "meta": dict(stored.geometry["meta"]),
        }
        for stored in maps
    ]
    array = group.create_array(
        "x".join(map(str, shape)),
        shape=stacked.shape,
        dtype=stacked.dtype,
        chunks=(1, *shape),
        shards=stacked.shape,
        compressors=None,  # features are close to noise
        dimension_names=_DIMENSIONS,
        attributes={IMAGES_KEY: entries},
        config={"write_empty_chunks": True},  # also where every value is zero, so that -0.0 stays
    )
    array[:] = stacked


def _name(entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise BrixelError("its attributes do not describe images")
    return str(entry["image"])


@contextmanager
def _open_group(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    zarr = _import()
    with checking_content(path, "a Zarr group of brixel", "extract again"):
        try:
            yield zarr.open_group(str(path), mode="r", zarr_format=3)
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, BrixelError):
                raise
            raise DamagedFileError(str(error)) from error


def _import() -> Any:
    return import_extra("zarr", extra="zarr", purpose="Zarr groups")
