"""The page: images, codes of their maps, and the program that compares them, in one HTML text.

The page holds everything that it shows. Its security policy allows its own program and style by their hashes, images
inside the page, and nothing else: no connection, and no program in the name of an image.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, printable
from brixel.feature_maps.viewer.codes import EncodedMaps, MapCodes, encode
from brixel.utils.atomic_files import check_output_file, write_text
from brixel.utils.fields import check_field, path_like

ENDINGS = (".html", ".htm")
MAX_CELLS = 2**16  # of a map in a page: 256 x 256 and the like; a page compares all of them many times a second
MAX_IMAGE_PX = 1024  # long side of an image in the page
JPEG_QUALITY = 82
FRAME_PX = 720  # height of the page inside a notebook
_MARK = '<meta name="generator" content="brixel">'  # by which our pages are known


@dataclass(frozen=True, eq=False)
class ViewedMap:
    """A map to be shown.

    Args:
        features: (D, Hf, Wf), with at most ``MAX_CELLS`` cells.
        image_hw: Height and width of its image in pixels.
        stride: Distance (y, x) between neighbouring cells in pixels of the image.
        full_grid_hw: The grid that it was resized from, where it had too many cells.
    """

    features: Tensor
    image_hw: tuple[int, int]
    stride: tuple[float, float]
    full_grid_hw: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ViewedImage:
    """An image to be shown, with its maps.

    Args:
        name: What the page calls it; any text.
        maps: By kind, such as "brixel"; all of one image's height and width.
        picture: The image in any size of the same proportions, RGB, of which a small copy is kept; the colours of the
            maps where None.

    Raises:
        BrixelError: The maps, or the picture, are of images of different proportions.
    """

    name: str
    maps: Mapping[str, ViewedMap]
    picture: Image.Image | None = None

    def __post_init__(self) -> None:
        sizes = [viewed.image_hw for viewed in self.maps.values()]
        if len(set(sizes)) > 1:
            raise BrixelError(f"the maps of {self.name!r} are of images of {_sizes(sizes)}; expected maps of one image")
        if self.picture is not None and not _similar(self.picture.size[::-1], sizes[0]):
            raise BrixelError(
                f"{self.name!r} has {_sizes([self.picture.size[::-1]])}, and its map is of an image of "
                f"{_sizes(sizes[:1])}; expected the image that the map was made of"
            )
        if self.picture is not None:
            small = self.picture.copy()
            small.thumbnail((MAX_IMAGE_PX, MAX_IMAGE_PX), Image.Resampling.LANCZOS)
            object.__setattr__(self, "picture", small)


@dataclass(frozen=True)
class ViewPage:
    """A viewer, as the text of its page; notebooks show it.

    Args:
        html: The page.
    """

    html: str

    def __repr__(self) -> str:
        return f"ViewPage({len(self.html) / 1e6:.1f} MB)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, completely or not at all; an earlier file is replaced.

        Args:
            path: The file, ``*.html``.

        Raises:
            BrixelError: Another suffix, or a missing folder.
        """
        target = check_field("path", path, path_like())
        check_page_path(target)
        write_text(target, self.html)

    def _repr_html_(self) -> str:
        """The page in a frame that neither sees the notebook nor is seen by it."""
        style = f"width:100%;height:{FRAME_PX}px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(self.html)}"></iframe>'


def check_page_path(path: Path, *, overwrite: bool = True) -> None:
    """Raise BrixelError if no page can be written to ``path``; without ``overwrite``, also over another's file."""
    check_output_file(path, ENDINGS, "a page")
    if not overwrite and path.exists() and not _is_ours(path):
        raise BrixelError(f"{path} exists, and brixel has not written it; give another name, or --overwrite")


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return _MARK.encode() in file.read(512)


def build_page(images: Sequence[ViewedImage]) -> ViewPage:
    """Make the page of some images, which all have maps of the same kinds.

    Args:
        images: At least one.

    Raises:
        BrixelError: Features of one kind have different D, or are not finite.
    """
    encoded = {kind: encode([image.maps[kind].features for image in images]) for kind in images[0].maps}
    data = {
        "kinds": [_kind(kind, codes, [image.maps[kind] for image in images]) for kind, codes in encoded.items()],
        "images": [
            _image(image, [codes.maps[position] for codes in encoded.values()]) for position, image in enumerate(images)
        ],
    }
    others = f" and {len(images) - 1} more" if len(images) > 1 else ""
    return ViewPage(_filled(f"{printable(images[0].name)}{others}", data))


def _filled(title: str, data: Mapping[str, Any]) -> str:
    style, script = (_source(name) for name in ("page.css", "page.js"))
    return Template(_source("page.html")).substitute(
        mark=_MARK,
        version=html.escape(version("brixel")),
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no name ends the element that holds it
    )


def _source(name: str) -> str:
    return files("brixel.feature_maps.viewer").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + _base64(hashlib.sha256(text.encode()).digest())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _kind(name: str, encoded: EncodedMaps, maps: Sequence[ViewedMap]) -> dict[str, Any]:
    resized = {viewed.full_grid_hw for viewed in maps} - {None}
    return {
        "name": printable(name),
        "channels": encoded.channels,
        "low": _rounded(encoded.low),
        "step": _rounded(encoded.step),
        "directions": [_rounded(direction) for direction in encoded.directions],
        "colourLow": _rounded(encoded.colour_low),
        "colourHigh": _rounded(encoded.colour_high),
        "loss": {"mean": encoded.loss.mean, "p99": encoded.loss.p99, "largest": encoded.loss.largest},
        "resizedFrom": sorted("{} × {}".format(*grid) for grid in resized if grid is not None),
    }


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.8g}") for value in values]


def _image(image: ViewedImage, codes: Sequence[MapCodes]) -> dict[str, Any]:
    maps = list(image.maps.values())
    height, width = maps[0].image_hw
    return {
        "name": printable(image.name),
        "height": height,
        "width": width,
        "source": None if image.picture is None else f"data:image/jpeg;base64,{_base64(_jpeg(image.picture))}",
        "maps": [_map(viewed, coded) for viewed, coded in zip(maps, codes, strict=True)],
    }


def _map(viewed: ViewedMap, coded: MapCodes) -> dict[str, Any]:
    return {
        "grid": list(viewed.features.shape[1:]),
        "stride": list(viewed.stride),
        "codes": _base64(coded.codes.tobytes()),
        "lengths": _base64(coded.lengths.astype("<u2").tobytes()),
        "longest": coded.longest,
    }


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _similar(first_hw: tuple[int, int], second_hw: tuple[int, int]) -> bool:
    """Whether sizes have the same proportions, up to the rounding of a side to whole pixels."""
    (height, width), (other_height, other_width) = first_hw, second_hw
    return abs(height * other_width - width * other_height) <= max(*first_hw, *second_hw)


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{height} x {width} px" for height, width in sorted(set(sizes)))
