"""A dense feature map, where it lies on its image, and how it is kept in a file.

Legend: D channels, Hf x Wf cells, N points.
Image coordinates are continuous (y, x) in pixels of the image as the user gave it. The pixel in row r and
column c covers [r, r+1) x [c, c+1), its centre is (r+0.5, c+0.5). With ``stride`` = (stride_y, stride_x) the
centre of cell (i, j) is ((i+0.5)*stride_y, (j+0.5)*stride_x). Cells cover the image: the last one of a row
or column may reach over the edge, it never lies wholly beyond.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.pca import PcaBasis
from brixel.utils.atomic_files import atomic_path, write_text
from brixel.utils.devices import DTYPES, dtype_name

ROUNDING = 1e-6  # how far strides and sizes may miss each other, relative
VERSION_KEY, VERSION = "brixel_feature_map", "1"
FIELDS = ("image_hw", "stride", "meta", "shape", "dtype")  # what a file tells besides its version

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features of an image's cells, with the geometry that ties cells to pixels; see the module's header.

    ``features`` is (D, Hf, Wf), float16, bfloat16, float32 or float64. ``image_hw`` is the image's height
    and width in pixels, ``stride`` the (y, x) distance between neighbouring cells in those pixels, fractions
    allowed. ``meta`` is free-form provenance, kept in saved files and read-only here. Two maps are equal only
    if they are the same object. Raises BrixelError where the parts do not fit together.
    """

    features: Tensor
    image_hw: tuple[int, int]
    stride: tuple[float, float]
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_features(self.features)
        object.__setattr__(self, "image_hw", _positive_pair("image_hw", self.image_hw, operator.index))
        object.__setattr__(self, "stride", _positive_pair("stride", self.stride, float))
        for axis in (0, 1):
            _check_cover("yx"[axis], self.grid_hw[axis], self.stride[axis], self.image_hw[axis])
        texts = [*self.meta, *self.meta.values()] if isinstance(self.meta, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise BrixelError(f"meta is {self.meta!r}; expected a mapping from strings to strings")
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled or copied; a dict can
        return type(self), (self.features, self.image_hw, self.stride, dict(self.meta))

    def __repr__(self) -> str:
        shape, dtype, device = tuple(self.features.shape), dtype_name(self.features.dtype), self.features.device
        stride_yx = "({:g}, {:g})".format(*self.stride)
        return f"FeatureMap({shape} {dtype} on {device}, image_hw={self.image_hw}, stride={stride_yx})"

    @property
    def embed_dim(self) -> int:
        """Number of channels, D."""
        return self.features.shape[0]

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of cells along y and x, (Hf, Wf)."""
        return self.features.shape[1], self.features.shape[2]

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> FeatureMap:
        """The same map with its features on another device or in another floating-point type, by name or as torch's."""
        wanted = DTYPES.get(device_or_dtype, device_or_dtype) if isinstance(device_or_dtype, str) else device_or_dtype
        return dataclasses.replace(self, features=self.features.to(wanted))

    def numpy(self) -> npt.NDArray[Any]:
        """The features as an array (D, Hf, Wf), sharing memory where it can; bfloat16 becomes float32."""
        features = self.features.detach().cpu()
        return (features.float() if features.dtype == torch.bfloat16 else features).numpy()

    def at(self, points_yx: Tensor | npt.ArrayLike) -> Tensor:
        """Features (N, D) at points (N, 2), (y, x) in pixels of the image, bilinear between cell centres.

        Beyond the outermost centres the value is that of the border. Gradients flow to the features, not to
        the points. Raises BrixelError for another shape, and for a point that is outside the image or NaN.
        """
        points = _to_float64(points_yx)
        if points.ndim != 2 or points.shape[1] != 2:
            raise BrixelError(f"points have shape {points.shape}; expected (N, 2), rows of (y, x) in pixels")
        inside = ((points >= 0) & (points <= self.image_hw)).all(axis=1)
        if not inside.all():
            first = int(inside.argmin())
            y, x = points[first].tolist()
            raise BrixelError(
                f"point {first} is {(y, x)}, outside the image: expected (y, x) from "
                f"(0, 0) to {self.image_hw} pixels; drop or clamp such points"
            )
        last = np.array(self.grid_hw) - 1
        position = np.clip(points / self.stride - 0.5, 0, last)  # in cells, from the first centre
        near = np.floor(position).astype(np.int64)
        index = torch.from_numpy(np.stack([near, np.minimum(near + 1, last)])).to(self.features.device)
        share = torch.from_numpy(position - near).to(_wide(self.features.dtype)).to(self.features.device)
        (y0, x0), (y1, x1), (wy, wx) = index[0].T, index[1].T, share.T
        upper = self.features[:, y0, x0] * (1 - wx) + self.features[:, y0, x1] * wx  # (D, N)
        lower = self.features[:, y1, x0] * (1 - wx) + self.features[:, y1, x1] * wx
        values: Tensor = upper * (1 - wy) + lower * wy
        return values.T.contiguous().to(self.features.dtype)  # (N, D)

    def resize(self, out_hw: tuple[int, int]) -> FeatureMap:
        """The same image in ``out_hw`` cells that cover it exactly, in the same dtype: (D, *out_hw).

        Bilinear between cell centres, as ``at``; along an axis that shrinks the filter widens (antialiasing).
        Raises BrixelError for a size that is not two positive whole numbers.
        """
        out = _positive_pair("out_hw", out_hw, operator.index)
        stride = (self.image_hw[0] / out[0], self.image_hw[1] / out[1])
        # new cells per old cell: not out/Hf, since the last old cell may reach over the image's edge
        scale_y, scale_x = self.stride[0] / stride[0], self.stride[1] / stride[1]
        shrinks = min(scale_y, scale_x) < 1
        op = torch.ops.aten._upsample_bilinear2d_aa if shrinks else torch.ops.aten.upsample_bilinear2d
        wide = self.features[None].to(_wide(self.features.dtype))  # there is no half antialias on the CPU
        # where an axis keeps its count both ops copy it, whatever the scale; one more border cell stops that
        same_y, same_x = (int(n == cells) for n, cells in zip(out, self.grid_hw, strict=True))
        if same_y or same_x:
            wide = torch.nn.functional.pad(wide, (0, same_x, 0, same_y), mode="replicate")
        resized = op.default(wide, list(out), False, scale_y, scale_x)[0].to(self.features.dtype)
        return FeatureMap(resized, self.image_hw, stride, self.meta)

    def similarity(self, point_yx: Tensor | npt.ArrayLike) -> Tensor:
        """Cosine similarity of every cell to the features at one point (y, x): float32 (Hf, Wf) in [-1, 1].

        Where either vector is zero it is 0. Raises BrixelError as ``at`` does.
        """
        point = _to_float64(point_yx)
        if point.shape != (2,):
            raise BrixelError(f"the point has shape {point.shape}; expected (2,), its y and x in pixels")
        features = self.features.to(_wide(self.features.dtype))
        target = torch.nn.functional.normalize(self.at(point[None])[0].to(features.dtype), dim=0)
        lengths = torch.linalg.vector_norm(features, dim=0).clamp_min(1e-12)  # (Hf, Wf)
        cosines: Tensor = torch.tensordot(target, features, dims=1) / lengths
        return cosines.clamp(-1, 1).float()

    def pca(self, basis: PcaBasis | None = None) -> npt.NDArray[np.uint8]:
        """Colours (Hf, Wf, 3) uint8 from three principal components, fitted to this map if no basis is given.

        Raises BrixelError for a basis of another D, and for features that are not finite.
        """
        return (basis or PcaBasis.fit([self.features])).project(self.features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map whole or not at all, over an earlier file; the ending chooses the format.

        ``.safetensors`` holds everything. ``.npy`` is a plain array, bfloat16 widened to float32, and
        ``<name>.npy.json`` beside it holds the rest; the array appears last. Raises BrixelError for another
        ending or a missing folder.
        """
        target = Path(path)
        _check_ending(target)
        check_place(target)
        shape, dtype = tuple(self.features.shape), dtype_name(self.features.dtype)
        fields = dict(zip(FIELDS, (self.image_hw, self.stride, dict(self.meta), shape, dtype), strict=True))
        with atomic_path(target) as unfinished:
            if target.suffix == ".safetensors":
                features = self.features.detach().cpu().contiguous()
                # floats exactly, by repr; under one name, as several are written in an order left to chance
                text = json.dumps({VERSION_KEY: VERSION, **fields})
                save_file({"features": features}, unfinished, {VERSION_KEY: text})
            else:
                np.save(unfinished, np.ascontiguousarray(self.numpy()))
                write_sidecar(target, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureMap:
        """Read a map that ``save`` wrote; the features lie on the CPU, in the type they had.

        ``.npy`` is mapped into memory copy-on-write: only what is used is read, and writing to the features
        leaves the file alone (bfloat16 is read whole, since the file holds float32). Raises
        FileNotFoundError, and BrixelError for a file that is not ours, damaged, or of a newer format.
        """
        source = Path(path)
        _check_ending(source)
        if not source.is_file():
            raise FileNotFoundError(f"no feature map at {source}: there is no such file")
        header, features = _read_safetensors(source) if source.suffix == ".safetensors" else _read_npy(source)
        try:
            image_hw, stride, meta, shape, dtype = (header[name] for name in FIELDS)
            if list(features.shape) != shape:
                raise BrixelError(f"the array is {tuple(features.shape)}, its description says {shape}")
            return cls(features.to(DTYPES[dtype]), image_hw, stride, meta)
        except (KeyError, TypeError, BrixelError) as error:
            raise _damaged(source, error) from error


def _check_features(features: object) -> None:
    if not isinstance(features, Tensor):
        raise BrixelError(f"features are a {type(features).__name__}; expected a torch tensor (D, Hf, Wf)")
    if features.ndim != 3 or 0 in features.shape:
        raise BrixelError(f"features have shape {tuple(features.shape)}; expected (D, Hf, Wf), none zero")
    if features.dtype not in DTYPES.values():
        raise BrixelError(f"features are {features.dtype}; expected {', '.join(DTYPES)}; convert them")


def _positive_pair(name: str, value: Any, convert: Callable[[Any], Number]) -> tuple[Number, Number]:
    try:
        first, second = (convert(part) for part in value)
    except (TypeError, ValueError):
        first = second = convert(0)
    if not (0 < first < math.inf and 0 < second < math.inf):
        kind = "finite numbers" if convert is float else "whole numbers"
        raise BrixelError(f"{name} is {value!r}; expected two positive {kind}, (y, x)")
    return first, second


def _check_cover(axis: str, cells: int, stride_px: float, image_px: int) -> None:
    begin, end = (cells - 1) * stride_px, cells * stride_px
    if image_px > end * (1 + ROUNDING) or begin >= image_px * (1 - ROUNDING):
        raise BrixelError(
            f"along {axis}, {cells} cells at a stride of {stride_px:g} do not fit {image_px} pixels: "
            f"expected its edge in the last cell, from {begin:g} to {end:g}; give sizes of one image"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _to_float64(points: Tensor | npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        array = points.detach().cpu().double().numpy() if isinstance(points, Tensor) else points
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BrixelError(f"points are not rows of numbers ({error}); give (y, x) pairs") from error


def _check_ending(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npy"):
        raise BrixelError(f"{path} ends in {path.suffix!r}; name a feature map *.safetensors or *.npy")


def check_place(path: Path) -> None:
    """Raise BrixelError where no file can be: a folder has that name, or its own folder is missing."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise BrixelError(f"{path} {what}; give a file in a folder that exists")


def write_sidecar(path: Path, fields: Mapping[str, Any]) -> None:
    """Write what a ``.npy`` cannot say of its map, FIELDS, into the file beside it."""
    write_text(_sidecar(path), json.dumps({VERSION_KEY: VERSION, **fields}, indent=1))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _damaged(path: Path, error: object) -> BrixelError:
    return BrixelError(f"{path} is damaged or not a feature map ({error}); compute the map and save it again")


def _check_version(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or VERSION_KEY not in header:
        raise BrixelError(f"{path} is not ours: it lacks {VERSION_KEY!r}; give a file that save() wrote")
    if header[VERSION_KEY] != VERSION:
        version = header[VERSION_KEY]
        raise BrixelError(f"{path} has format {version!r}, this brixel reads {VERSION!r}; update brixel")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            header: Any = json.loads(texts[VERSION_KEY]) if VERSION_KEY in texts else None
            _check_version(path, header)
            return header, file.get_tensor("features")
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error


def _read_npy(path: Path) -> tuple[dict[str, Any], Tensor]:
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        raise BrixelError(f"{path} lacks {sidecar.name} beside it; move both files, or save the map again")
    try:
        header = json.loads(sidecar.read_bytes())
    except ValueError as error:
        raise _damaged(sidecar, error) from error
    _check_version(sidecar, header)
    try:
        return header, torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))  # never unpickles
    except (ValueError, TypeError, EOFError, SyntaxError, TokenError) as error:
        raise _damaged(path, error) from error
