"""Where a model's files are: the one place that turns what a user names into a path on disk."""

import os
from pathlib import Path

from brixel.errors import BrixelError


def locate(name_or_path: str | os.PathLike[str], *, what: str) -> Path:
    """The folder or file that a user named; ``what`` names it in the error ("model", "backbone")."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    raise BrixelError(
        f"no {what} at {str(name_or_path)!r}: expected a folder or a weight file on disk. "
        "This version does not download; a repository comes onto the disk with: hf download ORG/NAME --local-dir FOLDER"
    )
