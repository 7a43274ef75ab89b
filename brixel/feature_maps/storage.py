"""Files of feature maps: ``.safetensors``, or ``.npy`` with a description in ``<name>.npy.json``.

`.safetensors` holds the description as JSON in its metadata, under VERSION_KEY. Shapes: D channels, Hf x Wf cells.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError, DamagedFileError, MissingFileError
from brixel.utils.atomic_files import atomic_path, write_text
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import Rule, check_table, number, one_of, several, short_repr, text_table, whole_number
from brixel.utils.npy_files import open_npy
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import parse_json, read_json_value

VERSION_KEY, VERSION = "brixel_feature_map", "1"
GEOMETRY_RULES: Mapping[str, Rule] = {
    "image_hw": several(whole_number(1, 2**31), "two positive whole numbers", count=2),
    "stride": several(number(above=0), "two positive finite numbers", count=2),
    "meta": text_table("a mapping from texts to texts"),
}
"""What a file says of a map besides its features."""
_RULES = {
    **GEOMETRY_RULES,
    "shape": several(whole_number(1), "three positive whole numbers", count=3),
    "dtype": one_of(*DTYPES),
}


def save_map(path: Path, features: Tensor, geometry: Mapping[str, Any]) -> None:
    """Write features (D, Hf, Wf) and their "image_hw", "stride" and "meta"; see :meth:`FeatureMap.save`."""
    _check_suffix(path)
    check_writable(path)
    features = features.detach().cpu()
    fields = {**geometry, "shape": tuple(features.shape), "dtype": dtype_name(features.dtype)}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            # one metadata entry, since the order of several is random; JSON keeps floats exactly
            text = json.dumps({VERSION_KEY: VERSION, **fields})
            save_file({"features": features.contiguous()}, temporary, {VERSION_KEY: text})
        else:
            np.save(temporary, np.ascontiguousarray(as_array(features)))
            write_sidecar(path, fields)


def load_map(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read features (D, Hf, Wf) and their "image_hw", "stride" and "meta"; see :meth:`FeatureMap.load`."""
    _check_suffix(path)
    if not os.path.exists(path):
        raise MissingFileError(f"no feature map at {path}: there is no such file")
    try:
        header, features = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npy(path)
        fields = _checked(header, features)
    except DamagedFileError as error:
        raise damaged(path, error) from error
    dtype = DTYPES[fields.pop("dtype")]
    return features.to(dtype), fields


def as_array(features: Tensor) -> np.ndarray[Any, Any]:
    """A tensor on the CPU as an array that shares its memory; bfloat16 is converted to float32."""
    return (features.float() if features.dtype == torch.bfloat16 else features).numpy()


def check_writable(path: Path) -> None:
    """Raise BrixelError where no file can be written: ``path`` is a folder, or its folder does not exist."""
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise BrixelError(f"{path} {problem}; give a file in a folder that exists")


def write_sidecar(path: Path, fields: Mapping[str, Any]) -> None:
    """Write the description of the map in the ``.npy`` file at ``path``."""
    write_text(sidecar_path(path), json.dumps({VERSION_KEY: VERSION, **fields}, indent=1))


def damaged(path: Path, error: object) -> DamagedFileError:
    """The error for a file that cannot be read."""
    return DamagedFileError(f"{path} is damaged or not a feature map ({error}); compute the map and save it again")


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npy"):
        raise BrixelError(f"{path} ends in {path.suffix!r}; name a feature map *.safetensors or *.npy")


def sidecar_path(path: Path) -> Path:
    """The file of the description of the map in the ``.npy`` file at ``path``."""
    return path.with_name(path.name + ".json")


def _check_version(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or VERSION_KEY not in header:
        raise DamagedFileError(
            f"{path} was not written by brixel: it lacks {VERSION_KEY!r}; give a file that save() wrote"
        )
    if header[VERSION_KEY] != VERSION:
        version = short_repr(header[VERSION_KEY])
        raise BrixelError(f"{path} has format {version}, this brixel reads {VERSION!r}; update brixel")


def _checked(header: Mapping[str, Any], features: Tensor) -> dict[str, Any]:
    """The fields of a description that fits the features, without its version."""
    try:
        fields = check_table("the description", header, {VERSION_KEY: one_of(VERSION), **_RULES})
    except BrixelError as error:
        raise DamagedFileError(str(error)) from error
    shape, stored = fields.pop("shape"), dtype_name(features.dtype)
    if tuple(features.shape) != shape:
        raise DamagedFileError(f"the array is {tuple(features.shape)}, its description says {list(shape)}")
    if stored != fields["dtype"] and (stored, fields["dtype"]) != ("float32", "bfloat16"):
        raise DamagedFileError(f"the array holds {stored}, its description says {fields['dtype']}")
    del fields[VERSION_KEY]
    return fields


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Tensor]:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        header: Any = parse_json(metadata[VERSION_KEY], path) if VERSION_KEY in metadata else None
        _check_version(path, header)
        return header, file.get_tensor("features")


def _read_npy(path: Path) -> tuple[dict[str, Any], Tensor]:
    sidecar = sidecar_path(path)
    if not os.path.exists(sidecar):
        raise BrixelError(f"{path} lacks {sidecar.name} next to it; move both files, or save the map again")
    header = read_json_value(sidecar)
    _check_version(sidecar, header)
    array = open_npy(path)
    try:
        return header, torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # numbers that torch lacks
        raise DamagedFileError(str(error)) from error
