"""Finding the image files in folders."""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from brixel.errors import BrixelError, printable
from brixel.images.formats import HEIF_ENDINGS, HEIF_HINT, readable_endings

IMAGE_SUFFIXES = readable_endings()
"""Suffixes of images in a folder; files that are named one by one may have others."""

SCENE = Path(__file__).parents[1] / "assets" / "scene.jpg"
"""The bundled example image, a drawing."""

_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_MAX_NAMES = 64  # of one folder, by links to it: folders full of links to each other have millions
_MAX_ENDINGS = 8  # in a message
_LOG = logging.getLogger("brixel")


def is_hidden(path: Path) -> bool:
    """Whether a name starts with a dot, as hidden files do and the `._NAME` files that macOS puts beside others."""
    return path.name.startswith(".")


class FoundImages(list[tuple[Path, Path]]):
    """Pairs of an image and its relative path below an output folder, and what was left out in the searched folders.

    Attributes:
        left_out: The number of files that are no images by their ending, in lower case, and of links and folders that
            cannot be followed, by what is wrong with them. Hidden files are not counted.
    """

    def __init__(self, images: Iterable[tuple[Path, Path]] = (), left_out: Mapping[str, int] | None = None) -> None:
        super().__init__(images)
        self.left_out: dict[str, int] = dict(left_out or {})


def find_images(paths: Sequence[Path], *, also: Sequence[str] = ()) -> FoundImages:
    """Find images, in a fixed order; what is left out is logged.

    Folders are searched recursively, except for files and folders that start with a dot. Links to folders are followed,
    unless they lead back to a folder around them.

    Args:
        paths: Images and folders.
        also: More endings to look for in folders, such as those of videos.

    Returns:
        Pairs of an image and its relative path below an output folder: its path inside the searched folder, or its name
        for an image that was given itself.

    Raises:
        BrixelError: A path does not exist, a folder holds no images, or two images have the same relative path.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    for path in map(os.fspath, paths):
        for image, relative in _images_at(path, left_out, _SUFFIXES.union(also)):
            absolute = os.path.abspath(image)
            if absolute in seen:  # given twice, or in two of the folders
                continue
            seen.add(absolute)
            if relative in found:
                raise BrixelError(
                    f"{found[relative]} and {image} would both be written as {relative}; extract them separately"
                )
            found[relative] = image
    if left_out:
        _LOG.warning("%s", describe_left_out(left_out))
    return FoundImages(((Path(image), Path(relative)) for relative, image in found.items()), left_out)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """What was left out, as "4 files left out: 3 .heic, 1 .pdf"; empty where nothing was."""
    if not left_out:
        return ""
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        f"{count} {printable(kind)}{'s' * (count > 1 and kind[0] != '.')}" for kind, count in counts[:_MAX_ENDINGS]
    ]
    if len(counts) > _MAX_ENDINGS:
        parts.append(f"{sum(count for _, count in counts[_MAX_ENDINGS:])} others")
    total = sum(left_out.values())
    hint = f" ({HEIF_HINT})" if any(ending in HEIF_ENDINGS for ending in left_out) else ""
    return f"{total} file{'s' * (total != 1)} left out: {', '.join(parts)}{hint}"


def _images_at(path: str, left_out: Counter[str], endings: frozenset[str]) -> Iterable[tuple[str, str]]:
    """Path and relative path of the images at a path, sorted."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise BrixelError(f"no image or folder at {path}")
        return [(path, os.path.basename(path))]
    left_out_here: Counter[str] = Counter()
    names = sorted(_images_below(path, left_out_here, endings), key=lambda name: name.split("/"))
    if not names:
        others = f" ({describe_left_out(left_out_here)})" if left_out_here else ""
        raise BrixelError(f"no images in {path}{others}; looked for {', '.join(IMAGE_SUFFIXES)}")
    left_out += left_out_here
    return ((os.path.join(path, name), name) for name in names)


def _images_below(top: str, left_out: Counter[str], endings: frozenset[str]) -> Iterator[str]:
    """Relative paths of the images below a folder, with slashes, in the order of the file system."""
    names_of: Counter[tuple[int, int]] = Counter()
    waiting: deque[tuple[str, frozenset[tuple[int, int]]]] = deque([("", frozenset())])  # a folder, and those around it
    while waiting:
        prefix, around = waiting.popleft()
        try:
            folder = os.path.join(top, prefix)
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:
            left_out["unreadable folder"] += 1
            continue
        identity = (status.st_dev, status.st_ino)
        names_of[identity] += 1
        if identity in around or names_of[identity] > _MAX_NAMES:
            left_out["circular link"] += 1
            continue
        for entry in inside:
            if _holds(entry.is_dir):
                waiting.append((f"{prefix}{entry.name}/", around | {identity}))
            elif not _holds(entry.is_file):
                left_out["broken link" if entry.is_symlink() else "special file"] += 1
            elif (ending := os.path.splitext(entry.name)[1].lower()) in endings:
                yield prefix + entry.name
            else:
                left_out[ending or "name without ending"] += 1


def _holds(test: Callable[[], bool]) -> bool:
    """The answer of a directory entry; no for a link that leads nowhere or to itself."""
    try:
        return test()
    except OSError:
        return False
