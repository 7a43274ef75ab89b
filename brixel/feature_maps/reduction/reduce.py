"""`Reduce`: what is done to every map after it is made and before it is kept, as one value.

A specification is a list of steps: "pca:32,int8", "stride:8,float16", "regions:16x16", "points:points.json".
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.channel_basis import BasisFit, ChannelBasis
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.places import MaskRegions, Places, Points
from brixel.feature_maps.reduction.steps import Cast, Grid, Int8, Pca, Step, Stride
from brixel.utils.devices import DTYPES
from brixel.utils.fields import check_field, path_like, short_repr
from brixel.utils.torch_defaults import plain_defaults

REDUCE_KEY = "reduce"  # in meta: the steps
_STEPS = (
    "pca:K (components), stride:PX (pixels between cells), regions:HxW (a grid) or regions:FOLDER (of masks), "
    "points:FILE.json, float16, bfloat16, int8"
)
_GRID = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


class Reduce:
    """What is done to a map after it is made and before anything is stored: a callable of some steps.

    >>> reduce = Reduce("stride:8,int8")
    >>> reduce(feature_map).save("map.safetensors")

    ``pca:32`` needs a basis: :meth:`fit` gives the same reduction with one, :meth:`save` and :meth:`load` keep it.
    Reductions are added to each other: ``Reduce.points(points) + "pca:32"``.

    Args:
        spec: Steps in their order, separated by commas; or a path that ends in ``.safetensors``, which :meth:`save`
            wrote. `docs/reduction.md` describes the steps.

    Raises:
        BrixelError: A step is unknown, stands where it cannot, or its value is wrong.
    """

    def __init__(self, spec: str | os.PathLike[str]) -> None:
        if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".safetensors")):
            self.steps: tuple[Step, ...] = Reduce.load(spec).steps
        elif isinstance(spec, str):
            self.steps = tuple(map(_parse, spec.split(",")))
        else:
            raise BrixelError(f"a reduction is {short_repr(spec)}; expected steps such as 'pca:32,int8': {_STEPS}")
        self._names: Mapping[str, str] = {}
        _check_order(self.steps)

    @classmethod
    def of(cls, reduce: Reduce | str | os.PathLike[str]) -> Reduce:
        """A reduction as it is, or that of a specification."""
        return reduce if isinstance(reduce, Reduce) else cls(reduce)

    @classmethod
    def _of_steps(cls, steps: Iterable[Step]) -> Reduce:
        made = cls.__new__(cls)
        made.steps, made._names = tuple(steps), {}
        _check_order(made.steps)
        return made

    @classmethod
    def pca(cls, basis: ChannelBasis) -> Reduce:
        """A reduction to the coordinates in a basis, such as that of another reduction."""
        if not isinstance(basis, ChannelBasis):
            raise BrixelError(f"the basis is {short_repr(basis)}; expected one of a fitted reduction: reduce.basis")
        return cls._of_steps([Pca(len(basis.components), basis)])

    @classmethod
    def points(cls, points_yx: Places | Tensor | Iterable[Any]) -> Reduce:
        """The features at points, as a :class:`FeatureTable`.

        Args:
            points_yx: (N, 2), rows of (y, x) in pixels, for all images; or for each image by its name, as a mapping, a
                function, or the path of a JSON file. Names are paths as they are given to ``stream``, and below the
                input folder in ``extract_files`` and ``brixel extract``.
        """
        return cls._of_steps([Points(_places(points_yx))])

    @classmethod
    def regions(cls, masks: Places | Tensor) -> Reduce:
        """The mean features of regions, as a :class:`FeatureTable`. For a regular grid: ``Reduce("regions:16x16")``.

        Args:
            masks: (H, W) of whole numbers, 0 where there is no region, or (N, H, W) of booleans, of the image's size,
                for all images; or for each image by its name, as a mapping or a function, or the path of a folder with
                "cats/7.png" for "cats/7.jpg".
        """
        return cls._of_steps([MaskRegions(_places(masks))])

    def __add__(self, other: Reduce | str) -> Reduce:
        return Reduce._of_steps((*self.steps, *Reduce.of(other).steps))

    def __repr__(self) -> str:
        return f"Reduce({self.spec!r}{'' if self.is_fitted else ', not fitted'})"

    @property
    def spec(self) -> str:
        """The steps as text, such as "pca:32,int8"."""
        return ",".join(step.spec for step in self.steps)

    @property
    def identity(self) -> str:
        """The steps as text, with a digest of the basis and of points: equal for reductions with the same results."""
        return ",".join(step.identity for step in self.steps)

    @property
    def is_fitted(self) -> bool:
        """Whether no step waits for its basis."""
        return all(step.basis is not None for step in self.steps if isinstance(step, Pca))

    @property
    def basis(self) -> ChannelBasis | None:
        """The basis of ``pca``; None without that step or before :meth:`fit`."""
        return next((step.basis for step in self.steps if isinstance(step, Pca)), None)

    @property
    def components(self) -> int:
        """The number of components of ``pca``; 0 without that step."""
        return next((step.count for step in self.steps if isinstance(step, Pca)), 0)

    @property
    def needs_basis(self) -> bool:
        """Whether ``pca`` is among the steps."""
        return self.components > 0

    @property
    def makes_maps(self) -> bool:
        """Whether the results are maps; otherwise they are tables, of points or regions."""
        return not any(isinstance(step, Points | MaskRegions) for step in self.steps)

    @property
    def has_scales(self) -> bool:
        """Whether the results are kept as int8."""
        return any(isinstance(step, Int8) for step in self.steps)

    @property
    def sets_dtype(self) -> bool:
        """Whether a step says in which dtype the results are kept."""
        return any(step.in_dtype for step in self.steps)

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the results' features for maps of a dtype; those kept as int8 are float32 in memory."""
        last = self.steps[-1]
        if isinstance(last, Int8):
            return torch.float32
        return DTYPES[last.name] if isinstance(last, Cast) else dtype

    @plain_defaults()
    def __call__(self, feature_map: FeatureMap, name: str = "") -> FeatureMap | FeatureTable:
        """Reduce a map.

        Args:
            feature_map: The map, on any device.
            name: Of the image, where points or masks are given by name.

        Returns:
            The reduced map, or a :class:`FeatureTable` with ``points`` or masks. Its ``meta`` says "reduce", and
            "basis" with ``pca``.

        Raises:
            BrixelError: The basis is missing or of another model, a point is outside the image, a mask has another
                size, or values do not fit the dtype.
        """
        if not isinstance(feature_map, FeatureMap):
            raise BrixelError(f"{short_repr(feature_map)} cannot be reduced; expected a FeatureMap")
        reduced = _run(self.fitted().steps, feature_map, self._names.get(name, name))
        earlier = feature_map.meta.get(REDUCE_KEY)
        spec = self.spec if earlier is None else f"{earlier},{self.spec}"
        return dataclasses.replace(reduced, meta={**reduced.meta, REDUCE_KEY: spec})

    def check_model(self, backbone: str, embed_dim: int) -> None:
        """Raise BrixelError where the basis, if there is one, is of maps of another model or number of channels."""
        basis = self.basis
        if basis is not None and (basis.backbone not in ("", backbone) or basis.components.shape[1] != embed_dim):
            theirs = f"{basis.components.shape[1]} channels of {basis.backbone or 'a model'}"
            raise BrixelError(
                f"the basis was fitted to {theirs}, and the maps have {embed_dim} channels of {backbone}; fit one to "
                "maps of the same model"
            )

    def fitted(self) -> Reduce:
        """The reduction itself. Raises BrixelError where a basis is missing."""
        if not self.is_fitted:
            raise BrixelError(
                f"{self.spec} has no basis yet: fit it to some maps, as in Reduce({self.spec!r}).fit(maps), or load a "
                "fitted one"
            )
        return self

    def fit(self, maps: Iterable[FeatureMap | tuple[str, FeatureMap]]) -> Reduce:
        """Fit the basis of ``pca`` to maps, in memory that does not grow with their number.

        Args:
            maps: Maps of one model, as :meth:`brixel.BrixelFeatures.stream` gives them; or pairs of the name of an
                image and its map, as ``MapFolder("maps").items()``.

        Returns:
            The same reduction with a basis; as it is where it needs none.

        Raises:
            BrixelError: There are no maps, fewer cells or channels than components, or maps of several models.
        """
        return fit_all([self], maps)[0]

    def for_images(self, names: Mapping[str, str]) -> Reduce:
        """The same reduction, which looks points and masks of an image up by another name: ``names[name]``."""
        renamed = copy.copy(self)
        renamed._names = dict(names)
        return renamed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a fitted reduction to a ``.safetensors`` file, completely or not at all.

        Raises:
            BrixelError: It has no basis, so that its specification says all of it; or another suffix.
        """
        target = _checked_path(path)
        if self.basis is None:
            advice = "its steps say all of it" if self.is_fitted else "fit it first"
            raise BrixelError(f"{self.spec} has no basis to save: {advice}")
        if not target.parent.is_dir():
            raise BrixelError(f"{target} cannot be written: its folder does not exist; give one that exists")
        self.basis.save(target, self.spec)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reduce:
        """Read a reduction that :meth:`save` wrote; ``brixel extract`` keeps one in its folder, `reduce.safetensors`.

        Raises:
            MissingFileError: There is no such file; it is a FileNotFoundError as well.
            DamagedFileError: The file is damaged or holds no reduction.
            BrixelError: It is of a newer format, or has points or masks that were given in Python.
        """
        basis, spec = ChannelBasis.load(_checked_path(path))
        return cls(spec).with_basis(basis)

    def with_basis(self, basis: ChannelBasis) -> Reduce:
        """The same reduction with another basis. Raises BrixelError where it has another number of components."""
        if self.components != len(basis.components):
            raise BrixelError(f"a basis of {len(basis.components)} components does not fit {self.spec}")
        steps = (Pca(step.count, basis) if isinstance(step, Pca) else step for step in self.steps)
        return Reduce._of_steps(steps).for_images(self._names)


def _run(steps: Iterable[Step], feature_map: FeatureMap, name: str) -> FeatureMap | FeatureTable:
    reduced: FeatureMap | FeatureTable = feature_map
    for step in steps:
        reduced = step.apply(reduced, name)
    return reduced


def fit_all(reductions: Sequence[Reduce], maps: Iterable[FeatureMap | tuple[str, FeatureMap]]) -> list[Reduce]:
    """:meth:`Reduce.fit` of several reductions to the same maps, which are looked at once."""
    waiting = {index: BasisFit() for index, reduce in enumerate(reductions) if reduce.needs_basis}
    made_by: set[str] = set()
    for name, feature_map in _named_maps(maps) if waiting else ():
        for index, fit in waiting.items():
            reduce = reductions[index]
            before = itertools.takewhile(lambda step: not isinstance(step, Pca), reduce.steps)
            reduced = _run(before, feature_map, reduce._names.get(name, name))
            cells = reduced.features if isinstance(reduced, FeatureMap) else reduced.features.T[..., None]
            if cells.numel():
                fit.add(cells)
        made_by.add(feature_map.meta.get("backbone", ""))
    if len(made_by) > 1:
        raise BrixelError(f"the maps are of {', '.join(sorted(made_by))}; fit a basis to maps of one model")
    return [
        reduce.with_basis(waiting[index].basis(reduce.components, *made_by)) if index in waiting else reduce
        for index, reduce in enumerate(reductions)
    ]


def _named_maps(maps: Iterable[FeatureMap | tuple[str, FeatureMap]]) -> Iterator[tuple[str, FeatureMap]]:
    if isinstance(maps, FeatureMap | str | Mapping) or not isinstance(maps, Iterable):
        raise BrixelError(f"a basis is fitted to several maps, not to {short_repr(maps)}; give [feature_map]")
    for item in maps:
        name, feature_map = item if isinstance(item, tuple) and len(item) == 2 else ("", item)
        if not isinstance(feature_map, FeatureMap):
            raise BrixelError(f"a basis is fitted to feature maps, not to a {type(feature_map).__name__}")
        yield name, feature_map


def _places(places: Any) -> Any:
    """Points or masks as the steps take them: arrays in place of tensors and lists, paths in place of texts."""
    if isinstance(places, str | os.PathLike):
        return Path(places)
    if isinstance(places, Mapping) or callable(places):
        return places
    try:
        return places.detach().cpu().numpy() if isinstance(places, Tensor) else np.asarray(places)
    except ValueError as error:
        raise BrixelError(
            f"rows of different lengths ({error}); give an array, or one by the name of each image"
        ) from None


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked: Path = check_field("path", path, path_like())
    if checked.suffix != ".safetensors":
        raise BrixelError(f"{checked} ends in {checked.suffix!r}; a reduction is a file *.safetensors")
    return checked


# ------------------------------------------------------------------------------------------------ specifications


def _parse(text: str) -> Step:
    """The step of one part of a specification."""
    kind, colon, value = text.strip().partition(":")
    parse = _PARSERS.get(kind)
    if parse is not None and bool(colon) and value:
        return parse(value)
    if kind in _DTYPES and not colon:
        return _DTYPES[kind]
    raise BrixelError(f"the reduction has a step {text.strip()!r}; expected one of {_STEPS}")


def _pca(value: str) -> Step:
    if not re.fullmatch(r"[1-9]\d{0,5}", value):
        raise BrixelError(f"pca:{value}; expected a positive number of components, such as pca:32")
    return Pca(int(value))


def _stride(value: str) -> Step:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value) or float(value) == 0:
        raise BrixelError(f"stride:{value}; expected a positive number of pixels, such as stride:8")
    return Stride(float(value))


def _regions(value: str) -> Step:
    if grid := _GRID.fullmatch(value):
        return Grid((int(grid[1]), int(grid[2])))
    return MaskRegions(Path(value))


def _points(value: str) -> Step:
    return Points(Path(value))


_PARSERS: Mapping[str, Callable[[str], Step]] = {"pca": _pca, "stride": _stride, "regions": _regions, "points": _points}
_DTYPES: Mapping[str, Step] = {"float16": Cast("float16"), "bfloat16": Cast("bfloat16"), "int8": Int8()}


def _check_order(steps: tuple[Step, ...]) -> None:
    """Raise BrixelError where a step cannot follow those before it."""
    if not steps:
        raise BrixelError(f"the reduction has no step; expected some of {_STEPS}")
    for before, step in itertools.pairwise(steps):
        if before.in_dtype:
            raise BrixelError(f"{step.spec} follows {before.spec}; the dtype comes last, and there is one at most")
    table = next((step for step in steps if isinstance(step, Points | MaskRegions)), None)
    later = steps[steps.index(table) + 1 :] if table is not None else ()
    if wrong := next((step for step in later if step.of_map), None):
        raise BrixelError(f"{wrong.spec} needs a map, and {table.spec if table else ''} before it leaves none")
    if sum(isinstance(step, Pca) for step in steps) > 1:
        raise BrixelError("the reduction has pca twice; give it once, with the smaller number of components")
