"""Files that are written completely or not at all: under a temporary name, then renamed."""

import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from brixel.errors import BrixelError

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.part(\..*)?")  # temporary names


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; it is renamed to ``path`` on success, and removed on an error.

    It has the suffix of ``path``, since some writers choose the format by the suffix. The file gets the permissions of
    any new file, even if the writer makes it private. ``durable``: it is on the disk before it gets its name, so that
    a power cut leaves the earlier file or the new one.
    """
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex}.part{target.suffix}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(permissions)
        if durable:
            _to_disk(temporary)
        os.replace(temporary, target)
        if durable and os.name == "posix":  # the name too; other systems do not open folders
            _to_disk(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it is renamed to ``path`` on success, and removed on an error.

    A folder that is there is removed first: unlike with files, for a moment there is none.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.part{path.suffix}")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left below a folder under temporary names; for folders that only one job writes."""
    for path in list(folder.rglob(".*.part*")):
        if not UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, completely or not at all; what UTF-8 lacks, in the names of some files, is escaped."""
    with atomic_path(path, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_output_folder(path: Path) -> None:
    """Raise BrixelError if a folder cannot be made at ``path``, since it or one of its parents is a file."""
    existing = next((each for each in (path, *path.parents) if each.exists()), None)
    if existing is not None and not existing.is_dir():
        raise BrixelError(f"{existing} is a file; expected a folder to write into")


def check_folder(path: Path) -> None:
    """Raise BrixelError if the folder of ``path`` does not exist."""
    if not path.parent.is_dir():
        raise BrixelError(f"no folder {path.parent} to write {path.name} into")


def check_output_file(path: Path, endings: Sequence[str], what: str) -> None:
    """Raise BrixelError if no file can be written to ``path``.

    Args:
        path: The file.
        endings: Those that its name may have, in lower case.
        what: What is written, such as "an image".
    """
    check_folder(path)
    if path.suffix.lower() not in endings:
        raise BrixelError(f"{path}: expected a name that ends in {', '.join(endings[:-1])} or {endings[-1]}")
    if path.is_dir():
        raise BrixelError(f"{path} is a folder; expected the name of {what} to write")
