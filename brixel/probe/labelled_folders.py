"""Images with masks, values or clicks in files, for the command line."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError
from brixel.images.find_images import find_images, is_hidden
from brixel.probe.targets import Click
from brixel.utils.fields import number, several, short_repr
from brixel.utils.structured_files import checking_content, read_bounded, read_json_value

_MOST_BYTES = 2**25  # of a list of clicks
_CLICKS = several(several(number(), "(y, x, class)", count=3), "a list of [y, x, class]", single=False)
_HEADER = ["image", "y", "x", "class"]


def pair_by_name(images: Path, targets: Path, endings: Sequence[str]) -> tuple[list[tuple[Path, Path]], int]:
    """Images with the file of the same name, but for its ending, at the same place in another folder.

    Args:
        images: A folder of images, with subfolders.
        targets: The folder of masks or values.
        endings: Of files there, in order of preference.

    Returns:
        The pairs, sorted, and the number of images that have none: they are left out.

    Raises:
        BrixelError: A folder is missing, no image has a target, a target has no image, or two images have one name.
    """
    for folder in (images, targets):
        if not folder.is_dir():
            raise BrixelError(f"{folder} is no folder; expected a folder of images, and one of masks or values")
    by_name: dict[Path, Path] = {}
    for image, relative in find_images([images]):
        stem = relative.with_suffix("")
        if stem in by_name:
            raise BrixelError(
                f"{by_name[stem]} and {image} have one name, so a mask could belong to either; rename one"
            )
        by_name[stem] = image
    pairs, without = [], 0
    for stem, image in by_name.items():
        candidates = (targets / f"{stem}{ending}" for ending in endings)
        target = next((path for path in candidates if path.exists()), None)
        if target is None:
            without += 1
        else:
            pairs.append((image, target))
    if not pairs:
        raise BrixelError(
            f"none of {len(by_name)} images in {images} has a file of its name in {targets}, ending in "
            f"{' or '.join(endings)}"
        )
    found = (path for path in sorted(targets.rglob("*")) if path.suffix in endings and not is_hidden(path))
    if extra := [path for path in found if path.relative_to(targets).with_suffix("") not in by_name]:
        raise BrixelError(f"{len(extra)} files have no image in {images}, the first {extra[0]}; give their images too")
    return pairs, without


def read_clicks_file(path: Path, images: Path) -> tuple[list[Path], list[list[Click]]]:
    """Clicks from a file: the images, which it names below a folder, and the clicks on each.

    JSON is ``{"a.jpg": [[y, x, class], ...], ...}``; CSV has a row for each click, under ``image,y,x,class``.

    Raises:
        BrixelError: The file is not so, or an image is missing.
    """
    by_name = _from_csv(path) if path.suffix.lower() == ".csv" else _from_json(path)
    if not by_name:
        raise BrixelError(f"{path} holds no clicks")
    if missing := [name for name in by_name if not (images / name).is_file()]:
        raise BrixelError(f"{path} names {missing[0]}, which is not in {images}")
    return [images / name for name in by_name], list(by_name.values())


def read_class_names(path: Path) -> Any:
    """Names of classes from JSON: a list by number, or a table by class. The probe checks them."""
    names = read_json_value(path)
    if not isinstance(names, list | dict):
        raise BrixelError(f"{path} holds {short_repr(names)}; expected a list of names, or names by class")
    return names


def _from_json(path: Path) -> dict[str, list[Click]]:
    with checking_content(path, "a file of clicks", 'expected {"a.jpg": [[y, x, class], ...], ...}'):
        content = read_json_value(path)
        if not isinstance(content, dict):
            raise BrixelError(f"it holds {short_repr(content)}")
        return {name: list(_converted(name, clicks)) for name, clicks in content.items()}


def _from_csv(path: Path) -> dict[str, list[Click]]:
    found: dict[str, list[Any]] = {}
    with checking_content(path, "a file of clicks", f"expected rows under {','.join(_HEADER)}"):
        try:
            text = read_bounded(path, _MOST_BYTES).decode("utf-8-sig")
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
            for row in rows:
                found.setdefault(row["image"], []).append([float(row[name]) for name in _HEADER[1:]])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            if isinstance(error, BrixelError):
                raise
            raise BrixelError(f"{type(error).__name__}: {error}") from error
        return {name: list(_converted(name, clicks)) for name, clicks in found.items()}


def _converted(name: str, clicks: Any) -> tuple[Click, ...]:
    try:
        converted: tuple[Click, ...] = _CLICKS.convert(clicks)
    except (TypeError, ValueError, OverflowError):
        raise BrixelError(f"the clicks on {name} are {short_repr(clicks)}; expected {_CLICKS.expected}") from None
    return converted
