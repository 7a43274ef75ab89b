"""`brixel.view`: a page in which one points at an image and sees what is similar, in it and in others."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap, viewed_map
from brixel.feature_maps.panel import pil_image
from brixel.feature_maps.viewer.page import MAX_IMAGE_PX, ViewedImage, ViewPage, build_page, check_page_path
from brixel.images.load import ImageInput, image_list, open_image
from brixel.utils.fields import check_field, optional, path_like, several, short_repr, text

MapsOfImage: TypeAlias = FeatureMap | Mapping[str, FeatureMap]
"""A map of an image, or several by kind, such as "backbone" and "brixel"."""

_NAMES = optional(several(text(empty=True), "a list of texts, or None", single=False))


def view(
    maps: MapsOfImage | Sequence[MapsOfImage],
    path: str | os.PathLike[str] | None = None,
    *,
    images: ImageInput | Sequence[ImageInput] | None = None,
    names: Sequence[str] | None = None,
) -> ViewPage:
    """Make a page in which one points at an image and sees how similar all cells of all images are to that point.

    The page is one file without a server or a network (`docs/viewer.md`); a notebook shows what is returned. Features
    are reduced to 64 principal components of 8 bits; the page says what similarities lose by that.

    Args:
        maps: The map of an image, or a list of one for each of several images. In place of a map, a mapping such as
            ``{"backbone": a, "brixel": b}`` gives an image several kinds to switch between; all images have the same.
        path: The file to write, ``*.html``; an earlier file is replaced. None: nothing is written.
        images: The images of the maps, of any kind that ``extract`` takes, in the same order; the colours of
            :meth:`FeatureMap.pca` where None.
        names: What the images are called in the page; by default by the names of their files, or by numbers.

    Returns:
        The page.

    Raises:
        ImageError: An image cannot be used.
        BrixelError: Maps of one kind are not of one model, an image does not fit its map, or an argument is out of
            range.
    """
    target = check_field("path", path, optional(path_like()))
    if target is not None:
        check_page_path(target)
    kinds = _by_kind(maps)
    given = [None] * len(kinds) if images is None else image_list(images, len(kinds))
    titles = check_field("names", names, _NAMES)
    if titles is None:
        titles = [_name(image, number) for number, image in enumerate(given, 1)]
    if len(titles) != len(kinds):
        raise BrixelError(f"{len(titles)} names for {len(kinds)} images; expected one for each")
    page = build_page(
        [
            ViewedImage(name, {kind: viewed_map(each) for kind, each in by_kind.items()}, _picture(image))
            for name, by_kind, image in zip(titles, kinds, given, strict=True)
        ]
    )
    if target is not None:
        page.save(target)
    return page


def _by_kind(maps: object) -> list[dict[str, FeatureMap]]:
    """The maps of every image by kind, all in the order of the first; checked."""
    alone = isinstance(maps, FeatureMap | Mapping) or not isinstance(maps, Sequence) or isinstance(maps, str | bytes)
    found = [_kinds(each) for each in ([maps] if alone else list(maps))]  # type: ignore[call-overload]
    if not found or not found[0]:
        raise BrixelError("no maps to view; give at least one FeatureMap")
    first = found[0]
    for number, each in enumerate(found, 1):
        if each.keys() != first.keys():
            raise BrixelError(
                f"image {number} has maps of the kinds {short_repr(list(each))}, the first one of "
                f"{short_repr(list(first))}; expected the same for all"
            )
        for kind in first:
            if each[kind].embed_dim != first[kind].embed_dim:
                raise BrixelError(
                    f"the maps {short_repr(kind)} have {first[kind].embed_dim} and {each[kind].embed_dim} channels; "
                    "expected maps of one model"
                )
    return [{kind: each[kind] for kind in first} for each in found]


def _kinds(maps: object) -> dict[str, FeatureMap]:
    by_kind: dict[Any, Any] = dict(maps) if isinstance(maps, Mapping) else {"features": maps}
    for kind, feature_map in by_kind.items():
        if not isinstance(kind, str) or not isinstance(feature_map, FeatureMap):
            raise BrixelError(
                f"maps hold {short_repr(feature_map)}; expected a FeatureMap, a mapping from kinds to maps such as "
                "{'backbone': a, 'brixel': b}, or a list of them"
            )
    return by_kind


def _name(image: ImageInput | None, number: int) -> str:
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", "")
    return Path(os.fsdecode(path)).name or f"image {number}" if path else f"image {number}"


def _picture(image: ImageInput | None) -> Image.Image | None:
    """The image; of a large JPEG file a smaller one."""
    if image is None:
        return None
    with open_image(image) as source:
        rgb = source.read((MAX_IMAGE_PX, MAX_IMAGE_PX))
    return pil_image(rgb.numpy())
