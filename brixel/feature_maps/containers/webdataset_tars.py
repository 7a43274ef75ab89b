"""webdataset tars: for each image the members `KEY.features.npy` and `KEY.json`.

webdataset takes the name up to its first dot as the key, so dots of the file's name are escaped as `%2E`. The JSON
holds the relative path as it is, under "image", with `image_hw`, `stride` and `meta`.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from brixel.utils.structured_files import check_regular, checking_content, parse_json

_FEATURES, _DESCRIPTION = ".features.npy", ".json"


class WebdatasetTars:
    """Tars that `webdataset.WebDataset` reads."""

    title, suffix, folder = "a webdataset tar", ".tar", "webdataset"
    is_folder, holds_parts, max_values = False, False, None

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse bfloat16."""
        check_float_dtype(self.title, dtype)

    def check_image(self, image: str) -> None:
        """Refuse a name that is not UTF-8."""
        check_utf8(image)

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a tar, the same bytes for the same maps."""
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for stored in maps:
                array, key = as_array(stored.features.detach().cpu()), sample_key(stored.image)
                file = io.BytesIO()
                np.save(file, np.ascontiguousarray(array))
                _add(tar, f"{key}{_FEATURES}", file.getvalue())
                fields = {"image": stored.image, **stored.geometry, "meta": dict(stored.geometry["meta"])}
                _add(tar, f"{key}{_DESCRIPTION}", json.dumps(fields).encode())

    def images(self, path: Path) -> list[str]:
        """The images in a tar."""
        with _open_tar(path) as tar:
            names = [member.name for member in tar.getmembers() if member.name.endswith(_DESCRIPTION)]
            return [str(_description(tar, name, path)["image"]) for name in names]

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """The map of one image."""
        key = sample_key(image)
        with _open_tar(path) as tar:
            if f"{key}{_DESCRIPTION}" not in tar.getnames():
                raise not_described(image)
            geometry = _description(tar, f"{key}{_DESCRIPTION}", path)
            if geometry.pop("image") != image:
                raise not_described(image)
            array = np.load(io.BytesIO(_content(tar, f"{key}{_FEATURES}")), allow_pickle=False)
            return torch.from_numpy(array), checked_geometry(image, geometry)


def sample_key(image: str) -> str:
    """The key of an image's sample: its relative path, without dots in the file's name."""
    folder, slash, name = image.rpartition("/")
    return folder + slash + name.replace("%", "%25").replace(".", "%2E")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _description(tar: tarfile.TarFile, name: str, path: Path) -> dict[str, Any]:
    fields = parse_json(_content(tar, name), path)
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise BrixelError(f"{name} does not describe a map")
    return fields


def _content(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise BrixelError(f"{name} is no file")
    return file.read()


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    check_regular(path)
    with checking_content(path, "a webdataset tar of brixel", "extract again"):
        try:
            with tarfile.open(path, "r:") as tar:
                yield tar
        except (tarfile.TarError, KeyError, TypeError, ValueError, EOFError, OSError) as error:
            if isinstance(error, BrixelError):
                raise
            raise DamagedFileError(str(error)) from error
