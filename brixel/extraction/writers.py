"""How maps are written: a file for each image, or shards of many maps. Every file appears whole or not at all."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError
from brixel.extraction.manifest import SourceImage, WrittenFile, shard_number
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.steps import cast_features
from brixel.feature_maps.storage import sidecar_path, stored_tensors
from brixel.utils.atomic_files import atomic_path
from brixel.utils.devices import dtype_name

_MAX_NAME_BYTES = 255
SHARD_KEY = "maps"  # in a shard's metadata: JSON of what the file of a single map holds besides its features
Made = TypeVar("Made", FeatureMap, FeatureTable)


class FileWriter:
    """A file for each image, at its relative path with an ending added."""

    def __init__(self, folder: Path, ending: str) -> None:
        self._folder, self._ending = folder, ending
        self.supports_memmap = ending == ".npy"  # whether a map can be written while it is computed

    def check_name(self, relative_path: str) -> None:
        """Raise BrixelError for a name that is longer than file systems allow."""
        name = _files_of_map(self.path(relative_path))[-1].name
        if len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise BrixelError(
                f"the name of its map, {name}, is longer than {_MAX_NAME_BYTES} bytes: give {relative_path} a shorter "
                "one"
            )

    def add(self, source: SourceImage, made: FeatureMap | FeatureTable) -> WrittenFile:
        """Write the map to its file."""
        made.save(self.prepare_path(source))
        return self.sync(source)

    def prepare_path(self, source: SourceImage) -> Path:
        """The path of an image's map; its folder is created."""
        path = self.path(source.relative_path)
        if not self._folder.is_dir():
            raise BrixelError(f"{self._folder} was moved or removed while maps were written into it; put it back")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def sync(self, source: SourceImage) -> WrittenFile:
        """Force the file of an image's map to disk."""
        return synced_file(self._folder, self.path(source.relative_path), (source,))

    def path(self, relative_path: str) -> Path:
        """The path of an image's map."""
        return self._folder / f"{relative_path}{self._ending}"

    def finish(self) -> None:
        """Nothing waits."""


class ShardWriter:
    """Safetensors files of up to ``limit_bytes`` of maps, keyed by relative path; a larger map gets its own file."""

    supports_memmap = False

    def __init__(self, folder: Path, limit_bytes: int, rank: int, written: Iterable[WrittenFile] = ()) -> None:
        self._folder, self._limit_bytes, self._rank = folder, limit_bytes, rank
        # numbers go on after the last shard that is listed: one that was not listed is written over
        numbers = [found for file in written if (found := shard_number(file.file))]
        self._number = max((number for owner, number in numbers if owner == rank), default=-1) + 1
        self._waiting: list[tuple[SourceImage, dict[str, Tensor], dict[str, Any]]] = []
        self._waiting_bytes = 0

    def check_name(self, relative_path: str) -> None:
        """Raise BrixelError for a name that is not UTF-8, which the keys of a shard must be."""
        try:
            relative_path.encode()
        except UnicodeEncodeError as error:
            raise BrixelError(f"{relative_path!a} is no UTF-8, which a shard's names must be: rename it") from error

    def add(self, source: SourceImage, made: FeatureMap | FeatureTable) -> WrittenFile | None:
        """Take a map; if the shard would exceed its limit with it, the shard is written first."""
        tensors, fields = _parts(made)
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        written = self.finish() if self._waiting_bytes + size_bytes > self._limit_bytes else None
        self._waiting.append((source, tensors, fields))
        self._waiting_bytes += size_bytes
        return written

    def finish(self) -> WrittenFile | None:
        """Write the shard, unless it is empty."""
        if not self._waiting:
            return None
        path = self._folder / f"maps-{self._rank}-{self._number:05d}.safetensors"
        fields = {source.relative_path: described for source, _, described in self._waiting}
        tensors = {
            name if part == "features" else part_key(part, name): tensor
            for name, parts in ((source.relative_path, parts) for source, parts, _ in self._waiting)
            for part, tensor in parts.items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {SHARD_KEY: json.dumps(fields)})
        written = synced_file(self._folder, path, tuple(source for source, _, _ in self._waiting))
        self._number += 1
        self._waiting, self._waiting_bytes = [], 0
        return written


def part_key(part: str, image: str) -> str:
    """The key in a shard of what an image has beside its features; no relative path begins with a slash."""
    return f"/{part}/{image}"


def _parts(made: FeatureMap | FeatureTable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a shard holds of a map or a table: tensors by part, and a description."""
    if isinstance(made, FeatureTable):
        return made.stored()
    fields = {"image_hw": made.image_hw, "stride": made.stride, "meta": dict(made.meta)}
    if made.scales is not None:  # earlier versions refuse the field
        fields["dtype"] = dtype_name(made.features.dtype)
    return stored_tensors(made.features, made.scales), fields


MapWriter = FileWriter | ShardWriter
"""Takes maps in order; ``add`` and ``finish`` return a file once it is safely on disk."""


def convert(made: Made, dtype: torch.dtype | None, **meta: str) -> Made:
    """The map in the dtype to save, with ``meta`` added. Raises BrixelError where features overflow float16."""
    features = cast_features(made.features, dtype, meta.get("picture", ""))
    return dataclasses.replace(made, features=features, meta={**made.meta, **meta})


def file_size(path: Path) -> int:
    """Bytes of a file of maps, with the JSON file of a `.npy`. Raises OSError where either is missing."""
    return sum(file.stat().st_size for file in _files_of_map(path))


def checksum(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file of maps, with the JSON file of a `.npy`."""
    digest = hashlib.sha256()
    for part in _files_of_map(path):
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return file_size(path), digest.hexdigest()


def _files_of_map(path: Path) -> list[Path]:
    return [path, sidecar_path(path)] if path.suffix == ".npy" else [path]


def synced_file(folder: Path, path: Path, sources: tuple[SourceImage, ...]) -> WrittenFile:
    """Force a file to disk, and describe it for the manifest; ``sources``: what it was made of."""
    for part in _files_of_map(path):
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    size_bytes, sha256 = checksum(path)
    return WrittenFile(path.relative_to(folder).as_posix(), size_bytes, sha256, sources)
