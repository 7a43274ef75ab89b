"""Features of points or regions of one image, as rows: what is left of a map where its cells are not needed.

Shapes: N points or regions, D channels.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.channel_basis import ChannelBasis
from brixel.feature_maps.feature_map import BASIS_KEY, check_encoding, checked_meta, own_basis, pickled
from brixel.feature_maps.storage import (
    GEOMETRY_RULES,
    TABLE_KEY,
    check_version,
    check_writable,
    stored_tensors,
    values_of,
)
from brixel.utils.atomic_files import atomic_path
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import check_field, check_table, one_of, path_like, several, whole_number
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import checking_content, parse_json

_VERSION = "1"
_IMAGE_HW = several(whole_number(1, 2**31), "two positive whole numbers", count=2)
TABLE_RULES = {"image_hw": _IMAGE_HW, "meta": GEOMETRY_RULES["meta"], "dtype": one_of(*DTYPES)}
"""What a file says of a table besides its tensors."""
_PLACES = ("points_yx", "labels")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of points or regions of an image; as long as its rows, N, which may be 0.

    Args:
        features: (N, D); float16, bfloat16, float32 or float64.
        points_yx: (N, 2), float64: the points, or the centres of mass of the regions, (y, x) in pixels of the image.
        labels: (N,), int64: the numbers of the points from 0, or the labels of the regions in their mask.
        image_hw: The image's height and width in pixels.
        meta: How the features were made, as free-form texts; saved with them, read-only.
        scales: (D,), float32, where the features are whole multiples of them, which :meth:`save` writes as int8.
        basis: What the channels are coordinates in, after ``pca``; not saved with the table.

    Raises:
        BrixelError: Another shape or dtype.
    """

    features: Tensor
    points_yx: Tensor
    labels: Tensor
    image_hw: tuple[int, int]
    meta: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scales: Tensor | None = dataclasses.field(default=None, kw_only=True)
    basis: ChannelBasis | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        tensors = (self.features, self.points_yx, self.labels)
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
            raise BrixelError(f"features, points_yx and labels are {kinds}; expected tensors")
        shapes = [tuple(tensor.shape) for tensor in tensors]
        count = shapes[0][:1]
        if len(shapes[0]) != 2 or 0 in shapes[0][1:] or shapes[1:] != [(*count, 2), count]:
            raise BrixelError(f"features, points_yx and labels have shapes {shapes}; expected (N, D), (N, 2) and (N,)")
        if self.features.dtype not in DTYPES.values():
            raise BrixelError(f"features are {self.features.dtype}; expected {', '.join(DTYPES)}; convert them")
        if (self.points_yx.dtype, self.labels.dtype) != (torch.float64, torch.int64):
            dtypes = f"{self.points_yx.dtype} and {self.labels.dtype}"
            raise BrixelError(f"points_yx and labels are {dtypes}; expected torch.float64 and torch.int64")
        object.__setattr__(self, "image_hw", check_field("image_hw", self.image_hw, _IMAGE_HW))
        object.__setattr__(self, "meta", MappingProxyType(checked_meta(self.meta)))
        check_encoding(self.embed_dim, self.scales, self.basis)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickled(self)

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        shape, dtype = tuple(self.features.shape), dtype_name(self.features.dtype)
        return f"FeatureTable({shape} {dtype} on {self.features.device}, image_hw={self.image_hw})"

    @property
    def embed_dim(self) -> int:
        """Number of channels, D."""
        return self.features.shape[1]

    def restored(self, basis: ChannelBasis | None = None) -> FeatureTable:
        """Give features that were reduced by ``pca`` their channels again, as :meth:`brixel.FeatureMap.restored`."""
        basis = own_basis(self.meta, self.basis if basis is None else basis)
        features = self.features if basis is None else basis.restored(self.features.T).T.contiguous()
        meta = {name: text for name, text in self.meta.items() if name != BASIS_KEY}
        return FeatureTable(features, self.points_yx, self.labels, self.image_hw, meta)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What files hold of the table: tensors, and the fields of :data:`TABLE_RULES`."""
        places = {name: getattr(self, name).cpu().contiguous() for name in _PLACES}
        tensors = {**stored_tensors(self.features.detach().cpu(), self.scales, axis=1), **places}
        return tensors, {"image_hw": self.image_hw, "meta": dict(self.meta), "dtype": dtype_name(self.features.dtype)}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> FeatureTable:
        """The table of what :meth:`stored` gave. Raises BrixelError where it is none."""
        fields = check_table("the description", fields, TABLE_RULES)
        if missing := [part for part in ("features", *_PLACES) if part not in tensors]:
            raise BrixelError(f"it lacks {', '.join(missing)}")
        features, scales = values_of(tensors, axis=1)
        features = features.to(DTYPES[fields["dtype"]])
        points_yx, labels = (tensors[name] for name in _PLACES)
        return cls(features, points_yx, labels, fields["image_hw"], fields["meta"], scales=scales)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a ``.safetensors`` file, completely or not at all; an earlier file is replaced.

        Raises:
            BrixelError: Another suffix, or a missing folder.
        """
        target = _checked_path(path)
        check_writable(target)
        tensors, fields = self.stored()
        with atomic_path(target) as temporary:
            save_file(tensors, temporary, {TABLE_KEY: json.dumps({TABLE_KEY: _VERSION, **fields})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureTable:
        """Read a table that :meth:`save` wrote, on the CPU.

        Raises:
            MissingFileError: There is no such file; it is a FileNotFoundError as well.
            DamagedFileError: The file is damaged or holds no such table.
            BrixelError: It is of a newer format.
        """
        source = _checked_path(path)
        with open_safetensors(source) as file:
            metadata = file.metadata() or {}
            header: Any = parse_json(metadata[TABLE_KEY], source) if TABLE_KEY in metadata else None
            check_version(source, header, TABLE_KEY, (_VERSION,))
            with checking_content(source, "a table of features", "compute it again"):
                return cls.from_stored(_read_parts(file), {k: v for k, v in header.items() if k != TABLE_KEY})


def is_table(path: Path) -> bool:
    """Whether a file holds a table, by what a safetensors file says of itself. Raises as `open_safetensors`."""
    if path.suffix != ".safetensors":
        return False
    with open_safetensors(path) as file:
        return TABLE_KEY in (file.metadata() or {})


def _read_parts(file: Any) -> dict[str, Tensor]:
    """The tensors of a table in an open safetensors file: its features, and what else there is of it."""
    present = set(file.keys())
    return {part: file.get_tensor(part) for part in ("features", "scales", *_PLACES) if part in {"features", *present}}


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked: Path = check_field("path", path, path_like())
    if checked.suffix != ".safetensors":
        raise BrixelError(f"{checked} ends in {checked.suffix!r}; a table of features is a file *.safetensors")
    return checked
