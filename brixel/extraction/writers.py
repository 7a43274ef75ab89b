"""How maps are written: a file for each image, or shards of many maps; every file whole or not at all."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from brixel.errors import BrixelError
from brixel.extraction.manifest import SourceImage, Written
from brixel.feature_maps.feature_map import FeatureMap
from brixel.utils.atomic_files import atomic_path

_LONGEST = 255  # bytes of a file's name
SHARD_KEY = "maps"  # in a shard's metadata: JSON of what each map's own file would hold beside its features


class Output(Protocol):
    """Takes maps in order; tells of each file that is safely on disk."""

    def check_name(self, image: str) -> None:
        """Raise BrixelError for an image whose map could not be written under its name."""

    def add(self, source: SourceImage, feature_map: FeatureMap) -> Written | None:
        """Take a map; the file that was written for it, or None where it waits for others."""

    def finish(self) -> Written | None:
        """Write what waits."""


class Files:
    """A file for each image, at the image's own place and name with an ending added."""

    def __init__(self, folder: Path, ending: str) -> None:
        self._folder, self._ending = folder, ending
        self.takes_parts = ending == ".npy"  # whether a map can be written as it is made

    def check_name(self, image: str) -> None:
        """Raise BrixelError for a name that is longer than file systems take."""
        names = [path.name for path in _parts(self.path(image))]
        if len(os.fsencode(names[-1])) > _LONGEST:
            raise BrixelError(
                f"the name of its map, {names[-1]}, is longer than {_LONGEST} bytes: give {image} a shorter one"
            )

    def add(self, source: SourceImage, feature_map: FeatureMap) -> Written:
        """Write the map's file."""
        path = self.place(source)
        feature_map.save(path)
        return self.noted(source)

    def place(self, source: SourceImage) -> Path:
        """Where an image's map goes, in a folder that is there."""
        path = self.path(source.image)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def noted(self, source: SourceImage) -> Written:
        """Bring a file that was written safely to disk."""
        return _written(self._folder, self.path(source.image), (source,))

    def path(self, image: str) -> Path:
        """Where an image's map goes."""
        return self._folder / f"{image}{self._ending}"

    def finish(self) -> None:
        """Nothing waits."""


class Shards:
    """Safetensors files of up to ``limit_bytes`` of maps, by the images' places; a larger map has one to itself."""

    def __init__(self, folder: Path, limit_bytes: int, rank: int, written: Iterable[Written] = ()) -> None:
        self._folder, self._limit_bytes, self._rank = folder, limit_bytes, rank
        # a shard that was written and not noted is written over
        names = [Path(each.file).stem.split("-") for each in written]
        self._number = max((int(name[2]) for name in names if int(name[1]) == rank), default=-1) + 1
        self._waiting: list[tuple[SourceImage, FeatureMap]] = []
        self._bytes = 0

    def check_name(self, image: str) -> None:
        """Raise BrixelError for a name that is no text, which shards hold."""
        try:
            image.encode()
        except UnicodeEncodeError as error:
            raise BrixelError(f"{image!a} is no UTF-8, which a shard's names must be: rename it") from error

    def add(self, source: SourceImage, feature_map: FeatureMap) -> Written | None:
        """Take a map; where the shard would grow too large with it, the shard is written first."""
        full = bool(self._waiting) and self._bytes + feature_map.features.nbytes > self._limit_bytes
        written = self.finish() if full else None
        self._waiting.append((source, feature_map))
        self._bytes += feature_map.features.nbytes
        return written

    def finish(self) -> Written | None:
        """Write the shard."""
        if not self._waiting:
            return None
        path = self._folder / f"maps-{self._rank}-{self._number:05d}.safetensors"
        told = {
            source.image: {"image_hw": each.image_hw, "stride": each.stride, "meta": dict(each.meta)}
            for source, each in self._waiting
        }
        tensors = {source.image: each.features.contiguous() for source, each in self._waiting}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {SHARD_KEY: json.dumps(told)})
        written = _written(self._folder, path, tuple(source for source, _ in self._waiting))
        self._number += 1
        self._waiting, self._bytes = [], 0
        return written


def converted(feature_map: FeatureMap, dtype: torch.dtype | None, **meta: str) -> FeatureMap:
    """The map in the dtype that is saved, and with more to tell; BrixelError where numbers are too large for that."""
    features = feature_map.features if dtype is None else feature_map.features.to(dtype)
    if dtype == torch.float16 and features.isinf().any() and not feature_map.features.isinf().any():
        raise BrixelError(f"{meta.get('image', 'a map')}: its features do not fit float16; save as bfloat16")
    return dataclasses.replace(feature_map, features=features, meta={**feature_map.meta, **meta})


def size_of(path: Path) -> int:
    """Bytes of a file of maps, with those of what lies beside a `.npy`; OSError where either is missing."""
    return sum(part.stat().st_size for part in _parts(path))


def checksum(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of a file of maps, with those of what lies beside a `.npy`."""
    digest, size = hashlib.sha256(), 0
    for part in _parts(path):
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    return size, digest.hexdigest()


def _parts(path: Path) -> list[Path]:
    return [path, path.with_name(f"{path.name}.json")] if path.suffix == ".npy" else [path]


def _written(folder: Path, path: Path, sources: tuple[SourceImage, ...]) -> Written:
    """Of a file, once it is safely on disk."""
    for part in _parts(path):
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    size, sha256 = checksum(path)
    return Written(path.relative_to(folder).as_posix(), size, sha256, sources)
