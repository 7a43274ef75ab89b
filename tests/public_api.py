"""The public API as text: `python tests/public_api.py` writes docs/api.txt."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from helpers import ROOT

MODULES = (
    "brixel",
    "brixel.backbones",
    "brixel.data",
    "brixel.distributed.ray",
    "brixel.evaluate",
    "brixel.extraction",
    "brixel.probe",
    "brixel.train",
    "brixel.video",
)
PATH = ROOT / "docs" / "api.txt"


def public_api() -> str:
    """A line for every public function and class, with its arguments, and for every public method and property."""
    return "".join(f"{line}\n" for module in MODULES for line in _module_lines(module))


def _module_lines(module: str) -> Iterator[str]:
    found = importlib.import_module(module)
    for name in sorted(found.__all__):
        value, path = getattr(found, name), f"{module}.{name}"
        if inspect.isclass(value):
            yield f"{path}{_arguments(value)}"
            yield from (f"{path}.{line}" for line in _member_lines(value))
        elif callable(value):
            yield f"{path}{_arguments(value)}"
        else:
            yield f"{path}"


def _member_lines(owner: type) -> Iterator[str]:
    """Public members that classes of ours define; those of torch and of exceptions are left out."""
    fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    ours = [base for base in owner.__mro__ if base.__module__.startswith("brixel.")]
    for name in sorted({name for base in ours for name in vars(base) if not name.startswith("_")} - fields):
        member = inspect.getattr_static(owner, name)
        value = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        yield f"{name}{_arguments(value)}" if inspect.isfunction(value) else name


def _arguments(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return ""
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    text = re.sub(r"\w*Path\('[^']*/([^'/]*)'\)", r"'\1'", text)  # files of the package, wherever it is installed
    return re.sub(r"\(self(, )?|\(cls(, )?", "(", text)


if __name__ == "__main__":
    PATH.write_text(public_api(), encoding="utf-8")
