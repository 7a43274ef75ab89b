"""Parquet: a row per image, also for one without a map, whose `error` says why.

Columns: `image` (its relative path), `features` (D * Hf * Wf floats in C order), `shape` [D, Hf, Wf], `image_hw`
[height, width] and `stride` [y, x] in pixels, `meta` (texts by name), `error` (null where all went well).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError, DamagedFileError
from brixel.feature_maps.containers.base import (
    StoredMap,
    check_float_dtype,
    check_utf8,
    checked_geometry,
    not_described,
)
from brixel.feature_maps.storage import as_array
from brixel.utils.devices import dtype_name
from brixel.utils.extras import import_extra
from brixel.utils.structured_files import check_regular, checking_content

MAX_LIST_VALUES = 2**31 - 1  # the offsets of a list in Arrow have 32 bits
_ROW_GROUP_BYTES = 2**24  # what a lookup of one map reads; a larger map has a row group of its own
_ARROW_DTYPES = {"float16": "halffloat", "float32": "float", "float64": "double"}


class FailedImage(NamedTuple):
    """An image without a map, and why."""

    image: str
    error: str


class Parquet:
    """Parquet files, which every tool for tables reads."""

    title, suffix, folder = "a Parquet file", ".parquet", "parquet"
    is_folder = holds_parts = False
    max_values = MAX_LIST_VALUES  # of a file, since some readers join its rows

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse bfloat16."""
        check_float_dtype(self.title, dtype)

    def check_image(self, image: str) -> None:
        """Refuse a name that is not UTF-8."""
        check_utf8(image)

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a file."""
        largest = max(stored.features.nbytes for stored in maps)
        write_table(path, maps_table(maps, maps[0].features.dtype), max(1, _ROW_GROUP_BYTES // largest))

    def images(self, path: Path) -> list[str]:
        """The images with a map in a file."""
        return [image for image, error in _read_errors(path) if error is None]

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """The map of one image."""
        with _open_parquet(path) as file:
            for group in range(file.num_row_groups):
                names = file.read_row_group(group, columns=["image"])["image"].to_pylist()
                if image in names:
                    return _map_of_row(file.read_row_group(group).slice(names.index(image), 1), image)
            raise not_described(image)


def maps_table(rows: Sequence[StoredMap | FailedImage], dtype: torch.dtype) -> Any:
    """An Arrow table with a row for each image, in order.

    Args:
        rows: Maps of the dtype, and images without one.
        dtype: float16, float32 or float64.

    Raises:
        BrixelError: The maps are too large for one table, or pyarrow is not installed.
    """
    pa = _import("pyarrow")
    maps = [row if isinstance(row, StoredMap) else None for row in rows]
    values = [as_array(found.features.detach().cpu()).reshape(-1) for found in maps if found is not None]
    ends = np.cumsum([0, *(0 if found is None else found.features.numel() for found in maps)], dtype=np.int64)
    if ends[-1] > MAX_LIST_VALUES:
        raise BrixelError(
            f"{len(rows)} maps have {ends[-1]} numbers, and a Parquet column of lists at most {MAX_LIST_VALUES}: write "
            "smaller shards; a single map of that size fits .npy and .safetensors files"
        )
    schema = _schema(pa, dtype)
    features = pa.ListArray.from_arrays(
        pa.array(ends.astype(np.int32)),
        pa.array(np.concatenate([np.empty(0, dtype_name(dtype)), *values])),
        schema.field("features").type,
        mask=pa.array([found is None for found in maps], pa.bool_()),
    )
    columns = {
        "image": [row.image for row in rows],
        "features": features,
        "shape": [found and list(found.features.shape) for found in maps],
        "image_hw": [found and list(found.geometry["image_hw"]) for found in maps],
        "stride": [found and list(found.geometry["stride"]) for found in maps],
        "meta": [found and list(found.geometry["meta"].items()) for found in maps],
        "error": [row.error if isinstance(row, FailedImage) else None for row in rows],
    }
    return pa.table(columns, schema=schema)


def write_table(path: Path, table: Any, rows_per_group: int) -> None:
    """Write a table; features are stored as they are, since neither a dictionary nor compression makes them smaller."""
    plain = [name for name in table.column_names if name != "features"]
    _import("pyarrow.parquet").write_table(
        table, path, row_group_size=rows_per_group, compression="none", use_dictionary=False, write_statistics=plain
    )


def read_failed(path: Path) -> list[FailedImage]:
    """The images without a map in a file."""
    return [FailedImage(image, error) for image, error in _read_errors(path) if error is not None]


def _read_errors(path: Path) -> list[tuple[str, str | None]]:
    with _open_parquet(path) as file:
        table = file.read(columns=["image", "error"])
    return list(zip(table["image"].to_pylist(), table["error"].to_pylist(), strict=True))


def _map_of_row(row: Any, image: str) -> tuple[Tensor, dict[str, Any]]:
    fields = {name: row[name][0].as_py() for name in ("shape", "image_hw", "stride", "meta", "error")}
    if fields["error"] is not None:
        raise BrixelError(f"{image} has no map: {fields['error']}")
    array = np.array(row["features"][0].values.to_numpy(zero_copy_only=True))  # a copy that can be written to
    geometry = {"image_hw": fields["image_hw"], "stride": fields["stride"], "meta": dict(fields["meta"] or ())}
    return torch.from_numpy(array).reshape(fields["shape"]), checked_geometry(image, geometry)


def _schema(pa: Any, dtype: torch.dtype) -> Any:
    fields = {  # lists of any length: earlier versions of Arrow cannot read nulls of fixed ones
        "image": pa.string(),
        "features": pa.list_(pa.type_for_alias(_ARROW_DTYPES[dtype_name(dtype)])),
        "shape": pa.list_(pa.int32()),
        "image_hw": pa.list_(pa.int32()),
        "stride": pa.list_(pa.float64()),
        "meta": pa.map_(pa.string(), pa.string()),
        "error": pa.string(),
    }
    return pa.schema(fields)


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    check_regular(path)
    pa = _import("pyarrow")
    with checking_content(path, "a Parquet file of brixel", "extract again"):
        try:
            with _import("pyarrow.parquet").ParquetFile(path) as file:
                yield file
        except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, BrixelError):
                raise
            raise DamagedFileError(str(error)) from error


def _import(module: str) -> Any:
    return import_extra(module, extra="parquet", purpose="Parquet files")
