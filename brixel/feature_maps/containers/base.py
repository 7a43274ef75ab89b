"""What a format of files with many maps does, and the map as it goes in and comes out.

Shapes: D channels, Hf x Wf cells.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.storage import GEOMETRY_RULES
from brixel.utils.devices import dtype_name
from brixel.utils.fields import check_table


class StoredMap(NamedTuple):
    """A map in a container: the image's relative path, features (D, Hf, Wf), "image_hw", "stride" and "meta".

    ``parts`` are further tensors, such as the scales of int8, of containers that hold them.
    """

    image: str
    features: Tensor
    geometry: Mapping[str, Any]
    parts: Mapping[str, Tensor] = MappingProxyType({})


class Container(Protocol):
    """A format of files that hold the maps of many images. Every method raises BrixelError for what cannot be."""

    @property
    def title(self) -> str:
        """The format in messages, such as "a Parquet file"."""

    @property
    def suffix(self) -> str:
        """The ending of its files."""

    @property
    def folder(self) -> str:
        """The folder of its files inside an output folder; empty for the output folder itself."""

    @property
    def is_folder(self) -> bool:
        """Whether what is written is a folder of files."""

    @property
    def holds_parts(self) -> bool:
        """Whether int8 codes and features of points and regions are held; values of maps otherwise."""

    @property
    def max_values(self) -> int | None:
        """How many numbers a file may hold; None for any number."""

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a dtype of features that the format lacks."""

    def check_image(self, image: str) -> None:
        """Refuse the relative path of an image that cannot be a key."""

    def write(self, path: Path, maps: Sequence[StoredMap]) -> None:
        """Write a file, or a folder where the format is one; nothing is at ``path`` yet, or an empty file."""

    def images(self, path: Path) -> list[str]:
        """The images whose maps a file holds, in its order."""

    def read(self, path: Path, image: str) -> tuple[Tensor, dict[str, Any]]:
        """Features and geometry of one image's map."""


def check_float_dtype(title: str, dtype: torch.dtype) -> None:
    """Raise BrixelError for bfloat16, which few formats know."""
    if dtype == torch.bfloat16:
        raise BrixelError(f"{title} does not support {dtype_name(dtype)}: write shards, or save as float16 or float32")


def check_utf8(image: str) -> None:
    """Raise BrixelError for a name that is not UTF-8, which the keys of a container must be."""
    try:
        image.encode()
    except UnicodeEncodeError as error:
        raise BrixelError(f"{image!a} is no UTF-8, which a shard's names must be: rename it") from error


def checked_geometry(image: str, fields: object) -> dict[str, Any]:
    """ "image_hw", "stride" and "meta" as they were read from a file."""
    return check_table(f"the map of {image}", fields, GEOMETRY_RULES)


def not_described(image: str) -> BrixelError:
    """The error for an image that a file does not hold."""
    return BrixelError(f"it does not describe the map of {image}")
