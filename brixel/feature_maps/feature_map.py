"""A dense feature map with the geometry of its cells on the image.

Shapes: D channels, Hf x Wf cells, N points.
Image coordinates are continuous (y, x) in pixels of the image as the user gave it. The pixel in row r and column c
covers [r, r+1) x [c, c+1), its centre is (r+0.5, c+0.5). With ``stride`` = (stride_y, stride_x) the centre of cell
(i, j) is ((i+0.5)*stride_y, (j+0.5)*stride_x). Cells cover the image: the last one of a row or column may extend
beyond the edge, but does not lie completely outside.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.channel_basis import ChannelBasis
from brixel.feature_maps.clustering import cluster_cells
from brixel.feature_maps.containers.formats import BY_SUFFIX, load_from_container
from brixel.feature_maps.matching import Matches, nearest, refined, unit_cells
from brixel.feature_maps.pca import PcaBasis
from brixel.feature_maps.picture import png_picture
from brixel.feature_maps.storage import as_array, damaged, load_map, save_map
from brixel.feature_maps.viewer.page import MAX_CELLS, ViewedImage, ViewedMap, build_page, check_page_path
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import boolean, check_field, path_like, short_repr, whole_number
from brixel.utils.out_of_memory import is_out_of_memory
from brixel.utils.tensor_kinds import not_plain
from brixel.utils.torch_defaults import plain_defaults

_LARGEST = 2.0**53  # of sizes and strides: whole numbers up to here are exact as floats
BASIS_KEY = "basis"  # in meta: the digest of the basis that the channels are coordinates in
ROUNDING = 1e-6  # relative tolerance between the cells' extent and the image's size

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features of an image's cells, with the geometry that relates cells to pixels.

    Points are continuous (y, x) in pixels of the image: (0, 0) is its top left corner, (0.5, 0.5) the centre of the
    first pixel. Two maps are equal only if they are the same object.

    Args:
        features: (D, Hf, Wf); float16, bfloat16, float32 or float64.
        image_hw: The image's height and width in pixels.
        stride: Distance (y, x) between neighbouring cells in pixels of the image; may be fractional.
        meta: How the map was made, as free-form texts; saved with the map, read-only.
        scales: (D,), float32, of a map that ``Reduce("int8")`` made: its features are whole multiples of them, and
            :meth:`save` writes those as int8.
        basis: Of a map that ``Reduce("pca:32")`` made, what its channels are coordinates in; not saved with the map.

    Raises:
        BrixelError: Another shape or dtype, or cells that do not cover the image.
    """

    features: Tensor
    image_hw: tuple[int, int]
    stride: tuple[float, float]
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scales: Tensor | None = dataclasses.field(default=None, kw_only=True)
    basis: ChannelBasis | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_features(self.features)
        object.__setattr__(self, "image_hw", _positive_pair("image_hw", self.image_hw, operator.index))
        object.__setattr__(self, "stride", _positive_pair("stride", self.stride, float))
        for axis in (0, 1):
            _check_cover("yx"[axis], self.grid_hw[axis], self.stride[axis], self.image_hw[axis])
        object.__setattr__(self, "meta", MappingProxyType(checked_meta(self.meta)))
        check_encoding(self.embed_dim, self.scales, self.basis)

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled or copied; a dict can
        return pickled(self)

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
        """Convert the features to another device or floating-point dtype.

        A map that would be saved as int8 is saved in the dtype that is asked for.

        Args:
            device_or_dtype: As in ``Tensor.to``; names such as "cuda" and "float16" are accepted.

        Returns:
            A new map.

        Raises:
            BrixelError: The dtype is not one that features may have.
        """
        target = DTYPES.get(device_or_dtype, device_or_dtype) if isinstance(device_or_dtype, str) else device_or_dtype
        to_dtype = isinstance(target, torch.dtype)
        try:
            moved = self.features.to(target if isinstance(target, torch.dtype) else torch.device(target))
        except (TypeError, RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).split("\n", 1)[0]
            raise BrixelError(
                f"a map cannot be converted to {short_repr(device_or_dtype)} ({reason}); expected a device such as "
                f"'cpu' or 'cuda', or one of {', '.join(DTYPES)}"
            ) from error
        return dataclasses.replace(self, features=moved, scales=None if to_dtype else self.scales)

    def restored(self, basis: ChannelBasis | None = None) -> FeatureMap:
        """Give a map that was reduced by ``pca`` its D channels again: what the basis keeps of them.

        Cells, dtype and size of the grid stay as they are. Similarities are the same before and after.

        Args:
            basis: As in ``Reduce.load("maps/reduce.safetensors").basis``; by default the one that the map has, as maps
                from ``Reduce`` and ``MapFolder`` do.

        Returns:
            A new map; of a map that was not reduced by ``pca``, the same features.

        Raises:
            BrixelError: The basis is not at hand, or another one.
        """
        basis = own_basis(self.meta, self.basis if basis is None else basis)
        features = self.features if basis is None else basis.restored(self.features)
        meta = {name: text for name, text in self.meta.items() if name != BASIS_KEY}
        return FeatureMap(features, self.image_hw, self.stride, meta)

    def numpy(self) -> npt.NDArray[Any]:
        """The features as an array (D, Hf, Wf); it shares memory if possible, and bfloat16 is converted to float32."""
        return as_array(self.features.detach().cpu())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """For ``np.asarray(feature_map)``: as :meth:`numpy`, of another dtype where NumPy asks for one."""
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def at(self, points_yx: Tensor | npt.ArrayLike) -> Tensor:
        """Read the features at points of the image, bilinearly between cell centres.

        Beyond the outermost centres the value is that of the border. Gradients flow to the features, not to the
        points.

        Args:
            points_yx: (N, 2), rows of (y, x) in pixels of the image.

        Returns:
            The features (N, D), in the dtype of the map.

        Raises:
            BrixelError: Another shape, or a point that is outside the image or NaN.
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
        below = np.floor(position).astype(np.int64)
        index = torch.from_numpy(np.stack([below, np.minimum(below + 1, last)])).to(self.features.device)
        weight = torch.from_numpy(position - below).to(_wide(self.features.dtype)).to(self.features.device)
        (y0, x0), (y1, x1), (wy, wx) = index[0].T, index[1].T, weight.T
        upper = self.features[:, y0, x0] * (1 - wx) + self.features[:, y0, x1] * wx  # (D, N)
        lower = self.features[:, y1, x0] * (1 - wx) + self.features[:, y1, x1] * wx
        values: Tensor = upper * (1 - wy) + lower * wy
        return values.T.contiguous().to(self.features.dtype)  # (N, D)

    def resize(self, out_hw: tuple[int, int]) -> FeatureMap:
        """Resize the map to a grid of cells that cover the image exactly.

        Bilinear between cell centres, as :meth:`at`; along an axis that shrinks the filter is widened (antialiasing).

        Args:
            out_hw: Number of cells along y and x.

        Returns:
            A new map (D, *out_hw) of the same image, in the same dtype.

        Raises:
            BrixelError: ``out_hw`` is not two positive whole numbers.
        """
        out = _positive_pair("out_hw", out_hw, operator.index)
        stride = (self.image_hw[0] / out[0], self.image_hw[1] / out[1])
        # new cells per old cell: not out/Hf, since the last old cell may extend beyond the image
        scale_y, scale_x = self.stride[0] / stride[0], self.stride[1] / stride[1]
        shrinks = min(scale_y, scale_x) < 1
        op = torch.ops.aten._upsample_bilinear2d_aa if shrinks else torch.ops.aten.upsample_bilinear2d
        wide = self.features[None].to(_wide(self.features.dtype))  # no antialiasing in half precision on the CPU
        # both ops copy an axis that keeps its number of cells, whatever the scale; another border cell prevents that
        same_y, same_x = (int(new == old) for new, old in zip(out, self.grid_hw, strict=True))
        if same_y or same_x:
            wide = torch.nn.functional.pad(wide, (0, same_x, 0, same_y), mode="replicate")
        resized = op.default(wide, list(out), False, scale_y, scale_x)[0].to(self.features.dtype)
        return FeatureMap(resized, self.image_hw, stride, self.meta, basis=self.basis)

    @plain_defaults()
    def similarity(self, to: Tensor | npt.ArrayLike, *, of: FeatureMap | None = None) -> Tensor:
        """Compute the cosine similarity of every cell to the features at one point, or to a vector.

        Args:
            to: A point (y, x) in pixels of the image, or a vector (D,) of features.
            of: Another map, such as that of another image, whose point ``to`` is.

        Returns:
            Similarities (Hf, Wf), float32 in [-1, 1]; 0 where either vector is zero.

        Raises:
            BrixelError: Another shape, a point that is outside its image or NaN, or maps of different D.
        """
        source = self if of is None else self._comparable(of)
        given = _to_float64(to)
        features = self.features.to(_wide(self.features.dtype))
        if given.shape == (2,):
            vector = source.at(given[None])[0]
        elif given.shape == (self.embed_dim,) and of is None:
            vector = torch.from_numpy(given)
        else:
            raise BrixelError(
                f"similarity to an array of shape {given.shape}; expected (2,), the y and x of a point in pixels"
                + (f", or ({self.embed_dim},), a vector of features" if of is None else "")
            )
        target = torch.nn.functional.normalize(vector.to(features), dim=0)
        lengths = torch.linalg.vector_norm(features, dim=0).clamp_min(1e-12)  # (Hf, Wf)
        cosines: Tensor = torch.tensordot(target, features, dims=1) / lengths
        return cosines.clamp(-1, 1).float()

    @plain_defaults()
    def match(
        self,
        other: FeatureMap,
        points_yx: Tensor | npt.ArrayLike | None = None,
        *,
        mutual: bool = False,
        refine: bool = True,
    ) -> Matches:
        """Find points of this image in another one, by the similarity of their features.

        Args:
            other: The map of the other image, from the same model; of any size.
            points_yx: (N, 2), rows of (y, x) in pixels of this image; the centres of all cells inside it where None.
            mutual: Whether only those matches are kept that the way back leads to the same point.
            refine: Whether matches may lie between the centres of cells, where a parabola through the similarities of
                the best cell and its neighbours is highest.

        Returns:
            The matches, in the order of the points, on the CPU.

        Raises:
            BrixelError: Another shape, a point that is outside the image or NaN, or maps of different D.
        """
        other = self._comparable(other)
        mutual, refine = check_field("mutual", mutual, boolean()), check_field("refine", refine, boolean())
        points = self._centres() if points_yx is None else _to_float64(points_yx)
        queries = unit_cells(self.at(points).T[..., None]).to(other.features.device)  # N D
        theirs = unit_cells(other.features).to(queries.dtype)
        scores, found = nearest(queries, theirs)
        width = other.grid_hw[1]
        places = torch.stack([found // width, found % width], 1).double()
        if refine:
            places = refined(queries, theirs, found, other.grid_hw)
        back = nearest(theirs[found], unit_cells(self.features).to(theirs))[1].cpu()
        returned = torch.stack([back // self.grid_hw[1], back % self.grid_hw[1]], 1)
        source = torch.from_numpy(points)
        away = (source / torch.tensor(self.stride) - 0.5 - returned).abs()  # in cells
        positions = ((places.cpu() + 0.5) * torch.tensor(other.stride, dtype=torch.float64)).clamp_min(0)
        inside = positions.minimum(torch.tensor(other.image_hw, dtype=torch.float64))
        matches = Matches(source, inside, scores.float().cpu(), (away < 1 - 1e-9).all(1))
        return matches[matches.mutual] if mutual else matches

    def _comparable(self, other: FeatureMap) -> FeatureMap:
        if not isinstance(other, FeatureMap):
            raise BrixelError(f"the other map is a {type(other).__name__}; expected a FeatureMap")
        if other.embed_dim != self.embed_dim:
            raise BrixelError(
                f"the maps have {self.embed_dim} and {other.embed_dim} channels; expected maps of one model"
            )
        return other

    def _centres(self) -> npt.NDArray[np.float64]:
        """The centres of all cells, row by row; of a cell that extends beyond the image, the edge: (N, 2)."""
        y, x = (
            np.minimum((np.arange(cells) + 0.5) * stride, side)
            for cells, stride, side in zip(self.grid_hw, self.stride, self.image_hw, strict=True)
        )
        return np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)

    def cluster(self, k: int, *, seed: int = 0) -> Tensor:
        """Group the cells by k-means on the directions of their features; needs scikit-learn (extra `cluster`).

        Args:
            k: Number of clusters.
            seed: Of the first centres; the same seed gives the same clusters.

        Returns:
            The clusters of the cells (Hf, Wf), int64 on the CPU: 0 is the one with the most cells.

        Raises:
            BrixelError: There are fewer cells than ``k``, features are not finite, or scikit-learn is missing.
        """
        return cluster_cells(
            self.features, check_field("k", k, whole_number(1)), check_field("seed", seed, whole_number(0, 2**32))
        )

    def pca(self, basis: PcaBasis | None = None) -> npt.NDArray[np.uint8]:
        """Colour the cells by three principal components.

        Args:
            basis: The components and their ranges; by default fitted to this map.

        Returns:
            RGB colours (Hf, Wf, 3), uint8.

        Raises:
            BrixelError: The basis has another D, or features are not finite.
        """
        if basis is not None and not isinstance(basis, PcaBasis):
            raise BrixelError(
                f"basis is {short_repr(basis)}; expected a PcaBasis, or None: the colours are always three components"
            )
        return (PcaBasis.fit([self.features]) if basis is None else basis).project(self.features)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map to a file, completely or not at all; an earlier file is replaced.

        ``.safetensors`` holds everything but the basis. ``.npy`` is a plain array, with bfloat16 converted to float32;
        the rest is in ``<name>.npy.json``, which is written first.

        Args:
            path: The file, ``*.safetensors`` or ``*.npy``.

        Raises:
            BrixelError: Another suffix, a missing folder, or a map with scales as ``.npy``.
        """
        geometry = {"image_hw": self.image_hw, "stride": self.stride, "meta": dict(self.meta)}
        save_map(check_field("path", path, path_like()), self.features, geometry, self.scales)

    def to_html(self, path: str | os.PathLike[str], image: Image.Image | npt.NDArray[np.uint8] | None = None) -> None:
        """Write a page in which one points at the map and sees what is similar, completely or not at all.

        The page is one file without a server or a network (`docs/viewer.md`). For image files, several maps, or maps
        of several kinds side by side see :func:`brixel.view`.

        Args:
            path: The file, ``*.html``; an earlier file is replaced.
            image: The map's image, to be seen below it: a PIL image, or an array (H, W, 3), uint8. The colours of
                :meth:`pca` where None.

        Raises:
            BrixelError: Another suffix, a missing folder, another kind of image or one of other proportions, or
                features that are not finite.
        """
        target = check_field("path", path, path_like())
        check_page_path(target)
        name = Path(getattr(image, "filename", "") or "image").name
        build_page([ViewedImage(name, {"features": viewed_map(self)}, _picture(image))]).save(target)

    def _repr_html_(self) -> str | None:
        """For notebooks: the picture of :meth:`_repr_png_` above what ``repr`` says."""
        if (png := self._repr_png_()) is None:
            return None
        source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        text = html.escape(repr(self))
        return f'<figure style="margin: 0"><img src="{source}" alt=""><figcaption>{text}</figcaption></figure>'

    def _repr_png_(self) -> bytes | None:
        """For notebooks: the map in its own PCA colours; None where there are none, so that ``repr`` is shown."""
        try:
            return png_picture(self.features, self.image_hw, self.stride)
        except BrixelError:
            return None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, image: str | None = None) -> FeatureMap:
        """Read a map that :meth:`save` wrote, or one in a file of many that `brixel extract` wrote.

        ``.npy`` is mapped into memory copy-on-write: only the cells that are used are read, and writing to the features
        does not change the file. bfloat16 is read completely, since the file holds float32.

        Args:
            path: The file, ``*.safetensors`` or ``*.npy``; of many maps a shard ``*.safetensors``, ``*.parquet``,
                ``*.zarr`` or ``*.tar``.
            image: In a file of many maps, the relative path of the image. A file of one map needs none.

        Returns:
            The map, with the features on the CPU in the dtype that they had when they were saved; those that the file
            holds as int8 as well.

        Raises:
            MissingFileError: There is no such file; it is a FileNotFoundError as well.
            DamagedFileError: The file is damaged or not a feature map.
            BrixelError: It is of a newer format, or its description is missing.
        """
        source = check_field("path", path, path_like())
        if source.suffix in BY_SUFFIX and (image is not None or source.suffix != ".safetensors"):
            features, fields = load_from_container(source, image)
        elif image is None:
            features, fields = load_map(source)
        else:
            raise BrixelError(f"{source} holds no maps by image, and image={short_repr(image)} was given: leave it out")
        try:
            return cls(features, **fields)
        except BrixelError as error:
            raise damaged(source, error) from error


def viewed_map(feature_map: FeatureMap) -> ViewedMap:
    """A map as the viewer takes it: resized where it has too many cells."""
    grid_hw = feature_map.grid_hw
    zoom = math.sqrt(MAX_CELLS / math.prod(grid_hw))
    if zoom >= 1:
        return ViewedMap(feature_map.features, feature_map.image_hw, feature_map.stride)
    height, width = (min(MAX_CELLS, max(1, int(side * zoom))) for side in grid_hw)
    resized = feature_map.resize((height, width))
    return ViewedMap(resized.features, resized.image_hw, resized.stride, full_grid_hw=grid_hw)


def _picture(image: object) -> Image.Image | None:
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(np.ascontiguousarray(image))
    found = f"an array {image.shape} of {image.dtype}" if isinstance(image, np.ndarray) else short_repr(image)
    raise BrixelError(
        f"image is {found}; expected a PIL image or an array (H, W, 3) of uint8; for a file or another kind of image "
        "call brixel.view(feature_map, path, images=image)"
    )


def pickled(result: Any) -> tuple[Any, ...]:
    """What ``__reduce__`` returns for a dataclass whose ``meta`` is a mapping proxy."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return _from_fields, (type(result), {**fields, "meta": dict(result.meta)})


def _from_fields(kind: type[Any], fields: dict[str, Any]) -> Any:
    return kind(**fields)


def checked_meta(meta: object) -> dict[str, str]:
    """The texts of a result's ``meta``. Raises BrixelError where they are none."""
    texts = [*meta, *meta.values()] if isinstance(meta, Mapping) else [None]
    if not isinstance(meta, Mapping) or not all(isinstance(text, str) for text in texts):
        raise BrixelError(f"meta is {meta!r}; expected a mapping from strings to strings")
    return dict(meta)


def check_encoding(embed_dim: int, scales: object, basis: object) -> None:
    """Raise BrixelError unless scales and basis are such, or None, of features with ``embed_dim`` channels."""
    if scales is not None and not (isinstance(scales, Tensor) and scales.shape == (embed_dim,)):
        given = tuple(scales.shape) if isinstance(scales, Tensor) else short_repr(scales)
        raise BrixelError(f"scales are {given}; expected a tensor ({embed_dim},), one for each channel, or None")
    if isinstance(scales, Tensor) and not (
        scales.dtype == torch.float32 and bool(scales.isfinite().all() & (scales > 0).all())
    ):
        raise BrixelError("scales are not float32, finite and above zero; give those that Reduce('int8') makes")
    if basis is not None and not (isinstance(basis, ChannelBasis) and len(basis.components) == embed_dim):
        given = f"one of {len(basis.components)} components" if isinstance(basis, ChannelBasis) else short_repr(basis)
        raise BrixelError(
            f"the basis is {given}; expected one of {embed_dim} components, as many as there are channels"
        )


def own_basis(meta: Mapping[str, str], basis: ChannelBasis | None) -> ChannelBasis | None:
    """The basis of a result, None where its ``meta`` names none. Raises BrixelError where it is missing or another."""
    stated = meta.get(BASIS_KEY)
    if stated is None and basis is None:
        return None
    if not isinstance(basis, ChannelBasis):
        given = "it is not at hand" if basis is None else f"{short_repr(basis)} is none"
        raise BrixelError(
            f"the channels are coordinates in basis {stated}, and {given}; read the file through MapFolder, or give "
            "basis=Reduce.load('maps/reduce.safetensors').basis"
        )
    if stated is not None and basis.digest != stated:
        raise BrixelError(f"the channels are coordinates in basis {stated}, not in {basis.digest}; give that basis")
    return basis


def _check_features(features: object) -> None:
    if not isinstance(features, Tensor):
        raise BrixelError(f"features are a {type(features).__name__}; expected a torch tensor (D, Hf, Wf)")
    if not features.is_meta and (problem := not_plain(features)):
        raise BrixelError(f"features: the tensor {problem}")
    if features.ndim != 3 or 0 in features.shape:
        raise BrixelError(f"features have shape {tuple(features.shape)}; expected (D, Hf, Wf), none zero")
    if features.dtype not in DTYPES.values():
        raise BrixelError(f"features are {features.dtype}; expected {', '.join(DTYPES)}; convert them")


def _positive_pair(name: str, value: Any, convert: Callable[[Any], Number]) -> tuple[Number, Number]:
    try:
        first, second = (convert(part) for part in value)
    except (TypeError, ValueError, OverflowError):
        first = second = convert(0)
    if not (0 < first < _LARGEST and 0 < second < _LARGEST):
        kind = "finite numbers" if convert is float else "whole numbers"
        raise BrixelError(f"{name} is {short_repr(value)}; expected two positive {kind}, (y, x)")
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
