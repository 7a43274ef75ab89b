"""Reading TOML files: settings of a training run, suites of evaluations."""

import tomllib
from pathlib import Path
from typing import Any

from brixel.errors import BrixelError


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file. Raises BrixelError, with ``what`` as its name, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrixelError(f"no {what} at {path}: {error.strerror}") from error
    except ValueError as error:
        raise BrixelError(f"{path} is no TOML in UTF-8: {error}") from error
