"""Files that are either whole or absent: written under a temporary name, then renamed."""

import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brixel.errors import BrixelError

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.part(\..*)?")  # names of files that are being written


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving without an error it becomes ``path``, else it is removed.

    The temporary name ends as ``path`` does, since some writers choose the format by the ending. The permissions are
    those of any new file, also where the writer makes its own private.
    """
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex}.part{target.suffix}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    permissions = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(path: Path) -> None:
    """Raise BrixelError where the folder to write ``path`` into is missing."""
    if not path.parent.is_dir():
        raise BrixelError(f"no folder {path.parent} to write {path.name} into")
