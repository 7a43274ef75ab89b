"""Files of feature maps: ``.safetensors``, or ``.npy`` with a description in ``<name>.npy.json``.

`.safetensors` holds the description as JSON in its metadata, under VERSION_KEY. Shapes: D channels, Hf x Wf cells.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError
from brixel.utils.atomic_files import atomic_path, write_text
from brixel.utils.devices import DTYPES, dtype_name

VERSION_KEY, VERSION = "brixel_feature_map", "1"
FIELDS = ("image_hw", "stride", "meta", "shape", "dtype")  # of a description, besides its version


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
    if not path.is_file():
        raise FileNotFoundError(f"no feature map at {path}: there is no such file")
    header, features = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npy(path)
    try:
        fields = {name: header[name] for name in FIELDS}
        shape, dtype = fields.pop("shape"), DTYPES[fields.pop("dtype")]
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if list(features.shape) != shape:
        raise damaged(path, f"the array is {tuple(features.shape)}, its description says {shape}")
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
    """Write the description (FIELDS) of the map in the ``.npy`` file at ``path``."""
    write_text(sidecar_path(path), json.dumps({VERSION_KEY: VERSION, **fields}, indent=1))


def damaged(path: Path, error: object) -> BrixelError:
    """The error for a file that cannot be read."""
    return BrixelError(f"{path} is damaged or not a feature map ({error}); compute the map and save it again")


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npy"):
        raise BrixelError(f"{path} ends in {path.suffix!r}; name a feature map *.safetensors or *.npy")


def sidecar_path(path: Path) -> Path:
    """The file of the description of the map in the ``.npy`` file at ``path``."""
    return path.with_name(path.name + ".json")


def _check_version(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or VERSION_KEY not in header:
        raise BrixelError(f"{path} was not written by brixel: it lacks {VERSION_KEY!r}; give a file that save() wrote")
    if header[VERSION_KEY] != VERSION:
        version = header[VERSION_KEY]
        raise BrixelError(f"{path} has format {version!r}, this brixel reads {VERSION!r}; update brixel")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header: Any = json.loads(metadata[VERSION_KEY]) if VERSION_KEY in metadata else None
            _check_version(path, header)
            return header, file.get_tensor("features")
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


def _read_npy(path: Path) -> tuple[dict[str, Any], Tensor]:
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BrixelError(f"{path} lacks {sidecar.name} next to it; move both files, or save the map again")
    try:
        header = json.loads(sidecar.read_bytes())
    except ValueError as error:
        raise damaged(sidecar, error) from error
    _check_version(sidecar, header)
    try:
        return header, torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))  # never unpickles
    except (ValueError, TypeError, EOFError, SyntaxError, TokenError) as error:
        raise damaged(path, error) from error
