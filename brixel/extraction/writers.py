"""How maps are written: a file for each image, or files of many maps. Every file appears whole or not at all."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch

from brixel.errors import BrixelError
from brixel.extraction.manifest import SourceImage, WrittenFile
from brixel.extraction.parts import part_name, part_of
from brixel.feature_maps.containers.base import Container, StoredMap
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.steps import cast_features
from brixel.feature_maps.storage import sidecar_path, stored_tensors
from brixel.utils.atomic_files import atomic_folder, atomic_path
from brixel.utils.devices import dtype_name

_MAX_NAME_BYTES = 255
Made = TypeVar("Made", bound=FeatureMap | FeatureTable)


class FileWriter:
    """A file for each image, at its relative path with an ending added."""

    def __init__(self, folder: Path, ending: str) -> None:
        self._folder, self._ending = folder, ending
        self.supports_memmap = ending == ".npy"  # whether a map can be written while it is computed

    def check_name(self, relative_path: str) -> None:
        """Raise BrixelError for a name that is longer than file systems allow."""
        path = self.path(relative_path)
        name = (sidecar_path(path) if path.suffix == ".npy" else path).name
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
        _check_in_place(self._folder)
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


class PartWriter:
    """Files of up to ``limit_bytes`` of maps, keyed by relative path; a larger map gets its own file.

    Args:
        folder: The output folder.
        container: The format.
        limit_bytes: Size of the features in a file.
        owner: Who writes, the first part of the files' names: the rank of a process, or the name of a block.
        written: What manifests list: numbers go on after the last file of the owner.
    """

    supports_memmap = False

    def __init__(
        self, folder: Path, container: Container, limit_bytes: int, owner: str, written: Iterable[WrittenFile] = ()
    ) -> None:
        self._folder, self._container, self._limit_bytes, self._owner = folder, container, limit_bytes, owner
        # a file that was not listed is written over
        parts = [part for file in written if (part := part_of(file.file)) and part.suffix == container.suffix]
        self._number = max((part.number for part in parts if part.owner == owner), default=-1) + 1
        self._waiting: list[tuple[SourceImage, StoredMap]] = []
        self._waiting_bytes = self._waiting_values = 0

    def check_name(self, relative_path: str) -> None:
        """Raise BrixelError for a name that cannot be a key of the format."""
        self._container.check_image(relative_path)

    def add(self, source: SourceImage, made: FeatureMap | FeatureTable) -> WrittenFile | None:
        """Take a map; if the file would exceed its limit with it, the file is written first."""
        stored = stored_map(source.relative_path, made, self._container)
        size_bytes = sum(tensor.nbytes for tensor in (stored.features, *stored.parts.values()))
        most = self._container.max_values
        is_full = self._waiting_bytes + size_bytes > self._limit_bytes
        is_full |= most is not None and self._waiting_values + stored.features.numel() > most
        written = self.finish() if is_full else None
        self._waiting.append((source, stored))
        self._waiting_bytes += size_bytes
        self._waiting_values += stored.features.numel()
        return written

    def finish(self) -> WrittenFile | None:
        """Write what waits, if anything does."""
        if not self._waiting:
            return None
        _check_in_place(self._folder)
        path = self._folder / self._container.folder / part_name(self._owner, self._number, self._container.suffix)
        path.parent.mkdir(exist_ok=True)
        with (atomic_folder if self._container.is_folder else atomic_path)(path) as temporary:
            self._container.write(temporary, [stored for _, stored in self._waiting])
        written = synced_file(self._folder, path, tuple(source for source, _ in self._waiting))
        self._number += 1
        self._waiting, self._waiting_bytes, self._waiting_values = [], 0, 0
        return written


def stored_map(image: str, made: FeatureMap | FeatureTable, container: Container) -> StoredMap:
    """A map or a table as a container takes it. Raises BrixelError for a table where it holds maps alone."""
    if container.holds_parts and isinstance(made, FeatureTable):
        tensors, fields = made.stored()
        return StoredMap(image, tensors.pop("features"), fields, tensors)
    if isinstance(made, FeatureTable):
        raise BrixelError(f"{container.title} holds maps, not features of points or regions; write files or shards")
    fields = {"image_hw": made.image_hw, "stride": made.stride, "meta": dict(made.meta)}
    if not container.holds_parts:
        return StoredMap(image, made.features, fields)
    if made.scales is not None:  # earlier versions refuse the field
        fields["dtype"] = dtype_name(made.features.dtype)
    tensors = stored_tensors(made.features, made.scales)
    return StoredMap(image, tensors.pop("features"), fields, tensors)


MapWriter = FileWriter | PartWriter
"""Takes maps in order; ``add`` and ``finish`` return a file once it is safely on disk."""


def convert(made: Made, dtype: torch.dtype | None, **meta: str) -> Made:
    """The map in the dtype to save, with ``meta`` added. Raises BrixelError where features overflow float16."""
    features = cast_features(made.features, dtype, meta.get("picture", ""))
    return dataclasses.replace(made, features=features, meta={**made.meta, **meta})


def file_size(path: Path) -> int:
    """Bytes of a file of maps, with the JSON file of a `.npy`, or of a folder. Raises OSError where one is missing."""
    return sum(file.stat().st_size for file in _files_of_map(path))


def checksum(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file of maps, with the JSON file of a `.npy`, or of the files in a folder by name."""
    digest = hashlib.sha256()
    for part in _files_of_map(path):
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return file_size(path), digest.hexdigest()


def _check_in_place(folder: Path) -> None:
    if not folder.is_dir():
        raise BrixelError(f"{folder} was moved or removed while maps were written into it; put it back")


def _files_of_map(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path, sidecar_path(path)] if path.suffix == ".npy" else [path]


def synced_file(folder: Path, path: Path, sources: tuple[SourceImage, ...]) -> WrittenFile:
    """Force a file to disk, and describe it for the manifest; ``sources``: what it was made of."""
    for part in _files_of_map(path):
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    size_bytes, sha256 = checksum(path)
    return WrittenFile(path.relative_to(folder).as_posix(), size_bytes, sha256, sources)
