"""Shards: safetensors files of many maps. The metadata holds the geometry as JSON under SHARD_KEY."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.feature_maps.containers.base import StoredMap, check_utf8, checked_geometry, not_described
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import checking_content, parse_json

SHARD_KEY = "maps"


class Shards:
    """Safetensors files, which hold every dtype."""

    title, suffix, folder = "a shard", ".safetensors", ""
    is_folder, max_values = False, None

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Every dtype is held."""

    def check_image(self, image: str) -> None:
        """Refuse a name that is not UTF-8."""
        check_utf8(image)

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a shard."""
        tensors = {stored.image: stored.features.contiguous() for stored in maps}
        save_file(tensors, path, {SHARD_KEY: json.dumps({stored.image: dict(stored.geometry) for stored in maps})})

    def images(self, path: Path) -> list[str]:
        """The images in a shard."""
        with _reading(path), open_safetensors(path) as file:
            return list(_described(file, path))

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """The map of one image."""
        with _reading(path), open_safetensors(path) as file:
            maps = _described(file, path)
            if image not in maps:
                raise not_described(image)
            return file.get_tensor(image), checked_geometry(image, maps[image])


def _reading(path: Path) -> Any:
    return checking_content(path, "a shard of brixel", "extract again")


def _described(file: Any, path: Path) -> Mapping[str, Any]:
    maps = parse_json((file.metadata() or {}).get(SHARD_KEY, "null"), path)
    return maps if isinstance(maps, dict) else {}
