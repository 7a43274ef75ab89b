"""Shards: safetensors files of many maps. The metadata holds the geometry as JSON under SHARD_KEY."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.feature_maps.containers.base import StoredMap, check_utf8, checked_geometry, not_described
from brixel.feature_maps.storage import GEOMETRY_RULES, values_of
from brixel.utils.devices import DTYPES
from brixel.utils.fields import check_table, one_of
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import checking_content, parse_json

SHARD_KEY = "maps"


class Shards:
    """Safetensors files, which hold every dtype."""

    title, suffix, folder = "a shard", ".safetensors", ""
    is_folder, holds_parts, max_values = False, True, None

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Every dtype is held."""

    def check_image(self, image: str) -> None:
        """Refuse a name that is not UTF-8."""
        check_utf8(image)

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a shard."""
        tensors = {
            key: tensor
            for stored in maps
            for key, tensor in (
                (stored.image, stored.features.contiguous()),
                # copies: points may be the same tensor for all images, which safetensors refuses
                *((_part_key(part, stored.image), tensor.clone()) for part, tensor in stored.parts.items()),
            )
        }
        save_file(tensors, path, {SHARD_KEY: json.dumps({stored.image: dict(stored.geometry) for stored in maps})})

    def images(self, path: Path) -> list[str]:
        """The images in a shard."""
        with _reading(path), open_safetensors(path) as file:
            return list(_described(file, path))

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """The map of one image; geometry has its "scales" where it was kept as int8."""
        with _reading(path):
            tensors, fields = self.read_parts(path, image)
            if "dtype" not in fields:
                return tensors["features"], checked_geometry(image, fields)
            geometry = check_table(f"the map of {image}", fields, {**GEOMETRY_RULES, "dtype": one_of(*DTYPES)})
            features, scales = values_of(tensors)
            return features.to(DTYPES[geometry.pop("dtype")]), {**geometry, "scales": scales}

    def is_table(self, path: Path, image: str) -> bool:
        """Whether the features of points or regions are kept of an image, and no map."""
        with _reading(path), open_safetensors(path) as file:
            fields = _described(file, path).get(image)
            return isinstance(fields, dict) and "stride" not in fields

    def read_parts(self, path: Path, image: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors of one image by part, "features" among them, and what describes them."""
        with _reading(path), open_safetensors(path) as file:
            maps = _described(file, path)
            if image not in maps:
                raise not_described(image)
            fields = maps[image]
            if not isinstance(fields, dict):
                checked_geometry(image, fields)  # which says what it is
            parts = (key[1:].partition("/") for key in file.keys() if key.startswith("/"))  # noqa: SIM118  # no mapping
            tensors = {part: file.get_tensor(_part_key(part, image)) for part, _, of in parts if of == image}
            return {"features": file.get_tensor(image), **tensors}, fields


def _part_key(part: str, image: str) -> str:
    """The key of what an image has beside its features; no relative path begins with a slash."""
    return f"/{part}/{image}"


def _reading(path: Path) -> Any:
    return checking_content(path, "a shard of brixel", "extract again")


def _described(file: Any, path: Path) -> Mapping[str, Any]:
    maps = parse_json((file.metadata() or {}).get(SHARD_KEY, "null"), path)
    return maps if isinstance(maps, dict) else {}
