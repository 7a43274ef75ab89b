"""Names of the files that hold many maps: `maps-OWNER-NUMBER`, in the folder of their format.

The owner is the rank of a process, or the name of a block of images that another engine gave to whoever was free.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from brixel.feature_maps.containers.formats import BY_SUFFIX, CONTAINERS

_NAME = re.compile(r"maps-([0-9a-z]+)-(\d{5,})")


class PartName(NamedTuple):
    """The name of a part, taken apart."""

    owner: str
    number: int
    suffix: str

    @property
    def rank(self) -> int:
        """The process that a file belongs to; those of blocks belong to the first."""
        return int(self.owner) if self.owner.isdecimal() else 0


def part_name(owner: str, number: int, suffix: str) -> str:
    """The name of a part in the folder of its format."""
    return f"maps-{owner}-{number:05d}{suffix}"


def part_of(file: str) -> PartName | None:
    """A path below an output folder taken apart; None where it is no part."""
    path = PurePosixPath(file)
    found = _NAME.fullmatch(path.stem)
    if found is None or path.suffix not in BY_SUFFIX or path.parent != PurePosixPath(BY_SUFFIX[path.suffix].folder):
        return None
    return PartName(found[1], int(found[2]), path.suffix)


def remove_parts(folder: Path, is_old: Callable[[str, PartName], bool]) -> None:
    """Remove parts from an output folder; ``is_old`` says which, by their path below it and by their name."""
    for path, part in list(_parts_in(folder)):
        if not is_old(path.relative_to(folder).as_posix(), part):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _parts_in(folder: Path) -> Iterator[tuple[Path, PartName]]:
    for container in CONTAINERS.values():
        for path in (folder / container.folder).glob(f"maps-*{container.suffix}"):
            part = part_of(path.relative_to(folder).as_posix())
            if part is not None:
                yield path, part
