"""Names of files that another file gives, which must lie below its folder."""

from pathlib import Path

from brixel.errors import DamagedFileError
from brixel.utils.fields import short_repr

_MAX_LENGTH = 4096  # characters of a path on Linux


def path_below(folder: Path, name: object, source: object) -> Path:
    """The path of a file below ``folder`` that the file ``source`` names; it need not exist.

    Links that somebody put there are followed: the cache of the Hub's client consists of them.

    Raises:
        DamagedFileError: ``name`` is no relative path of a file, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or len(name) > _MAX_LENGTH:
        raise DamagedFileError(f"{source} names the file {short_repr(name)}; expected a relative path")
    path = Path(name)
    if path.is_absolute() or path.drive or path.root or ".." in path.parts or not path.parts:
        raise DamagedFileError(f"{source} names a file outside of its folder: {short_repr(name)}; it is not followed")
    return folder / path
