"""Optional packages, imported where they are used."""

import importlib
from typing import Any

from brixel.errors import BrixelError


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: The module, such as "matplotlib.figure".
        extra: The extra of brixel that installs it.
        purpose: What it is needed for; opens the error: "plots need 'matplotlib'".

    Raises:
        BrixelError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise BrixelError(f"{purpose} need {package!r}: pip install 'brixel[{extra}]'") from error
