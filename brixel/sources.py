"""Where a model's files are: the one place that turns what a user names into a path on disk."""

import os
from pathlib import Path

from brixel.errors import BrixelError

BUNDLED = "brixel-tiny"  # the model that comes with the package


def locate(name_or_path: str | os.PathLike[str], *, what: str) -> Path:
    """The folder or file that a user named; ``what`` names it in the error ("model", "backbone").

    A model named :data:`BUNDLED` is the package's own; a folder of that name is reached as "./brixel-tiny".
    """
    if what == "model" and str(name_or_path) == BUNDLED:
        return Path(__file__).parent / "tiny"
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    raise BrixelError(
        f"no {what} at {str(name_or_path)!r}: expected a folder or a weight file on disk. "
        "This version does not download; a repository comes onto the disk with: hf download ORG/NAME --local-dir FOLDER"
    )
