"""Steps of a reduction that need nothing but the map: fewer channels, fewer cells, fewer bits.

Shapes: D channels, Hf x Wf cells, k components.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.area_average import Edges, area_average
from brixel.feature_maps.channel_basis import ChannelBasis
from brixel.feature_maps.feature_map import BASIS_KEY, FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.int8 import int8_scales, rounded_to_int8
from brixel.utils.devices import DTYPES

_ROUNDING = 1e-6  # of a cell: what is left of an image by no more gets no cell of its own


class Step(ABC):
    """One step of a reduction. ``spec`` is how it is written, ``identity`` also tells the data it works by."""

    in_dtype: ClassVar[bool] = False
    """Whether it only changes how features are kept, after all other steps."""
    of_map: ClassVar[bool] = True
    """Whether it needs the cells of a map; others also work on tables."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """Such as "pca:32"."""

    @property
    def identity(self) -> str:
        """The spec, with a digest of what else the result depends on."""
        return self.spec

    @abstractmethod
    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap | FeatureTable:
        """The reduced map or table; ``name`` is that of the image."""


@dataclass(frozen=True)
class Stride(Step):
    """Cells at a distance of ``stride_px`` pixels of the image, as means over the area of each; never more cells."""

    stride_px: float

    @property
    def spec(self) -> str:
        """Such as "stride:8"."""
        return f"stride:{self.stride_px:g}"

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap:
        """The map with larger cells; along an axis whose cells are as large already, it keeps them."""
        assert isinstance(source, FeatureMap)
        steps = (max(self.stride_px, source.stride[0]), max(self.stride_px, source.stride[1]))
        edges_y, edges_x = (
            None if step == own else _edges(max(1, math.ceil(side / step - _ROUNDING)), step, side)
            for step, own, side in zip(steps, source.stride, source.image_hw, strict=True)
        )
        if edges_y is None and edges_x is None:
            return source
        features = area_average(source.features, source.stride, (edges_y, edges_x))
        return dataclasses.replace(source, features=features, stride=steps, scales=None)


@dataclass(frozen=True)
class Grid(Step):
    """A regular grid of ``grid_hw`` regions that cover the image exactly, as means over the area of each."""

    grid_hw: tuple[int, int]

    @property
    def spec(self) -> str:
        """Such as "regions:16x16"."""
        return f"regions:{self.grid_hw[0]}x{self.grid_hw[1]}"

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap:
        """The map with that many cells, of any image."""
        assert isinstance(source, FeatureMap)
        steps = (source.image_hw[0] / self.grid_hw[0], source.image_hw[1] / self.grid_hw[1])
        edges_y, edges_x = map(_edges, self.grid_hw, steps, source.image_hw)
        features = area_average(source.features, source.stride, (edges_y, edges_x))
        return dataclasses.replace(source, features=features, stride=steps, scales=None)


def _edges(cells: int, step: float, side_px: int) -> Edges:
    """The edges of cells along an axis, cut off at the edge of the image."""
    return np.minimum(np.arange(cells + 1) * step, float(side_px))


@dataclass(frozen=True)
class Pca(Step):
    """Coordinates in a basis of ``count`` directions; without a basis, the step must be fitted first."""

    count: int
    basis: ChannelBasis | None = None
    of_map = False

    @property
    def spec(self) -> str:
        """Such as "pca:32"."""
        return f"pca:{self.count}"

    @property
    def identity(self) -> str:
        """The spec, and the digest of the basis."""
        return self.spec if self.basis is None else f"{self.spec} (basis {self.basis.digest})"

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap | FeatureTable:
        """The map or table with ``count`` channels, which knows its basis."""
        basis = self.basis
        assert basis is not None
        made_by = source.meta.get("backbone", basis.backbone)
        if basis.backbone and made_by != basis.backbone:
            raise BrixelError(
                f"the basis was fitted to maps of {basis.backbone}, and this one is of {made_by}; fit one to its maps"
            )
        if source.basis is not None:
            raise BrixelError(
                "the map is reduced by pca already; reduce what restored() gives, or the map it was made of"
            )
        meta = {**source.meta, BASIS_KEY: basis.digest}
        return _with_channels(source, basis.project, meta=meta, basis=basis, scales=None)


@dataclass(frozen=True)
class Cast(Step):
    """Features as float16 or bfloat16."""

    name: str
    in_dtype = True
    of_map = False

    @property
    def spec(self) -> str:
        """The dtype."""
        return self.name

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap | FeatureTable:
        """The same in another dtype. Raises BrixelError where features overflow it."""
        features = cast_features(source.features, DTYPES[self.name], name)
        return dataclasses.replace(source, features=features, scales=None)


@dataclass(frozen=True)
class Int8(Step):
    """Features as multiples of a scale for each channel, which files hold as int8."""

    in_dtype = True
    of_map = False

    @property
    def spec(self) -> str:
        """The dtype."""
        return "int8"

    def apply(self, source: FeatureMap | FeatureTable, name: str) -> FeatureMap | FeatureTable:
        """The nearest multiples, float32, with their scales."""
        scales = int8_scales(_channels_first(source))
        return _with_channels(source, lambda features: rounded_to_int8(features, scales), scales=scales)


def cast_features(features: Tensor, dtype: torch.dtype | None, name: str = "") -> Tensor:
    """Features in another dtype, as they are for None. Raises BrixelError where they overflow float16."""
    converted = features if dtype is None else features.to(dtype)
    if dtype == torch.float16 and converted.isinf().any() and not features.isinf().any():
        raise BrixelError(f"{name or 'a map'}: its features do not fit float16; save as bfloat16")
    return converted


def _channels_first(source: FeatureMap | FeatureTable) -> Tensor:
    return source.features if isinstance(source, FeatureMap) else source.features.T


def _with_channels(
    source: FeatureMap | FeatureTable, change: Callable[[Tensor], Tensor], **fields: object
) -> FeatureMap | FeatureTable:
    """The map or table with other features and fields; ``change`` takes and gives channels first."""
    changed = change(_channels_first(source))
    features = changed if isinstance(source, FeatureMap) else changed.T.contiguous()
    return dataclasses.replace(source, features=features, **fields)  # type: ignore[arg-type]
