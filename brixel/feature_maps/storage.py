"""Files of feature maps: ``.safetensors``, or ``.npy`` with a description in ``<name>.npy.json``.

`.safetensors` holds the description as JSON in its metadata, under VERSION_KEY. Maps with scales, whose features the
file holds as int8, have a format of their own, which earlier versions refuse. Shapes: D channels, Hf x Wf cells.
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
from brixel.feature_maps.int8 import int8_codes, int8_values
from brixel.utils.atomic_files import atomic_path, write_text
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import Rule, check_table, number, one_of, several, short_repr, text_table, whole_number
from brixel.utils.npy_files import open_npy
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import parse_json, read_json_value

VERSION_KEY, VERSION, INT8_VERSION = "brixel_feature_map", "1", "2"
TABLE_KEY = "brixel_feature_table"
"""The key of the description in the file of a :class:`brixel.FeatureTable`."""
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


def save_map(path: Path, features: Tensor, geometry: Mapping[str, Any], scales: Tensor | None = None) -> None:
    """Write features (D, Hf, Wf) and their "image_hw", "stride" and "meta"; see :meth:`FeatureMap.save`."""
    _check_suffix(path)
    check_writable(path)
    if path.suffix == ".npy" and scales is not None:
        raise BrixelError(f"{path}: npy has no place for the scales of an int8 map; save it as safetensors")
    features = features.detach().cpu()
    fields = {**geometry, "shape": tuple(features.shape), "dtype": dtype_name(features.dtype)}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            # one metadata entry, since the order of several is random; JSON keeps floats exactly
            text = json.dumps({VERSION_KEY: VERSION if scales is None else INT8_VERSION, **fields})
            save_file(stored_tensors(features, scales), temporary, {VERSION_KEY: text})
        else:
            np.save(temporary, np.ascontiguousarray(as_array(features)))
            write_sidecar(path, fields)


def load_map(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read features (D, Hf, Wf) and their "image_hw", "stride", "meta" and "scales"; see :meth:`FeatureMap.load`."""
    _check_suffix(path)
    if not os.path.exists(path):
        raise MissingFileError(f"no feature map at {path}: there is no such file")
    try:
        header, tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npy(path)
        fields = _checked(header, tensors["features"])
        features, scales = values_of(tensors)
    except DamagedFileError as error:
        raise damaged(path, error) from error
    dtype = DTYPES[fields.pop("dtype")]
    return features.to(dtype), {**fields, "scales": scales}


def stored_tensors(features: Tensor, scales: Tensor | None, axis: int = 0) -> dict[str, Tensor]:
    """What a file holds of features on the CPU, whose channels lie along ``axis``: with scales, int8 codes and scales.

    The dtype of the features is not in it.
    """
    if scales is None:
        return {"features": features.contiguous()}
    codes = int8_codes(features.movedim(axis, 0), scales.cpu()).movedim(0, axis)
    return {"features": codes.contiguous(), "scales": scales.cpu().contiguous()}


def values_of(tensors: Mapping[str, Tensor], axis: int = 0) -> tuple[Tensor, Tensor | None]:
    """The features and the scales of what :func:`stored_tensors` made. Raises DamagedFileError."""
    features, scales = tensors["features"], tensors.get("scales")
    if scales is None:
        return features, None
    if features.dtype != torch.int8 or scales.dtype != torch.float32 or scales.shape != features.shape[axis : axis + 1]:
        raise DamagedFileError(
            f"it holds {tuple(features.shape)} {dtype_name(features.dtype)} and {tuple(scales.shape)} "
            f"{dtype_name(scales.dtype)} scales; expected int8, and a float32 scale for each channel"
        )
    return int8_values(features.movedim(axis, 0), scales).movedim(0, axis).contiguous(), scales


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


def check_version(path: Path, header: Any, key: str, versions: tuple[str, ...]) -> None:
    """Raise BrixelError unless a description states one of these versions under ``key``."""
    if not isinstance(header, dict) or key not in header:
        raise DamagedFileError(f"{path} was not written by brixel: it lacks {key!r}; give a file that save() wrote")
    if header[key] not in versions:
        version = short_repr(header[key])
        raise BrixelError(
            f"{path} has format {version}, this brixel reads {', '.join(map(repr, versions))}; update brixel"
        )


def _checked(header: Mapping[str, Any], features: Tensor) -> dict[str, Any]:
    """The fields of a description that fits the features, without its version."""
    try:
        fields = check_table("the description", header, {VERSION_KEY: one_of(VERSION, INT8_VERSION), **_RULES})
    except BrixelError as error:
        raise DamagedFileError(str(error)) from error
    shape, stored = fields.pop("shape"), dtype_name(features.dtype)
    if tuple(features.shape) != shape:
        raise DamagedFileError(f"the array is {tuple(features.shape)}, its description says {list(shape)}")
    expected = "int8" if fields[VERSION_KEY] == INT8_VERSION else fields["dtype"]
    if stored != expected and (stored, expected) != ("float32", "bfloat16"):
        raise DamagedFileError(f"the array holds {stored}, its description says {fields['dtype']}")
    del fields[VERSION_KEY]
    return fields


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if TABLE_KEY in metadata:
            raise BrixelError(f"{path} holds features of points or regions, not a map; read it with FeatureTable.load")
        header: Any = parse_json(metadata[VERSION_KEY], path) if VERSION_KEY in metadata else None
        check_version(path, header, VERSION_KEY, (VERSION, INT8_VERSION))
        names = ("features", "scales") if header[VERSION_KEY] == INT8_VERSION else ("features",)
        return header, {name: file.get_tensor(name) for name in names}


def _read_npy(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sidecar = sidecar_path(path)
    if not os.path.exists(sidecar):
        raise BrixelError(f"{path} lacks {sidecar.name} next to it; move both files, or save the map again")
    header = read_json_value(sidecar)
    check_version(sidecar, header, VERSION_KEY, (VERSION,))
    array = open_npy(path)
    try:
        return header, {"features": torch.from_numpy(array)}
    except (TypeError, ValueError) as error:  # numbers that torch lacks
        raise DamagedFileError(str(error)) from error
