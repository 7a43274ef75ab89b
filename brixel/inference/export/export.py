"""Exporting a model: traced, written, run and compared, and only then given its name."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brixel.errors import BrixelError
from brixel.feature_maps.storage import check_writable
from brixel.images.patch_grid import whole_patches
from brixel.inference.dense_features import DenseFeatures
from brixel.inference.export.facts import facts_of
from brixel.inference.export.formats import FORMATS
from brixel.inference.export.parity import as_record, as_table, check_parity, compare, sizes_to_compare
from brixel.inference.export.tracing import BATCH, HEIGHT, WIDTH, InputSize, plain_copy, trace, traced_size
from brixel.utils.devices import DTYPES, dtype_name
from brixel.utils.fields import boolean, check_field, one_of, optional, path_like, several, whole_number
from brixel.utils.torch_defaults import plain_defaults

_OPSETS = whole_number(18, 24)
_SIZE = optional(several(whole_number(1), "height and width in pixels, such as (224, 224)", count=2))


@dataclass(frozen=True)
class Export:
    """An exported file.

    Args:
        path: The file.
        facts: What it says of itself, also of its comparison with the model under "parity", None where it was not made.
    """

    path: Path
    facts: dict[str, Any]

    def __str__(self) -> str:
        size = f"{self.path}: {self.path.stat().st_size / 1e6:.1f} MB"
        parity = self.facts["parity"]
        return f"{as_table(parity)}\n{size}" if parity else f"{size}, not compared with the model"


@plain_defaults(dtype=True)
def export_model(
    model: DenseFeatures,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dynamic: bool = True,
    image_hw: tuple[int, int] | None = None,
    batch: int = 1,
    dtype: str | torch.dtype | None = None,
    opset: int = 18,
    verify: bool = True,
) -> Export:
    """Write a model as a file for other engines; see :meth:`brixel.BrixelFeatures.export`."""
    target = check_field("path", path, path_like())
    name = _format_of(target, format)
    kind = FORMATS[name]
    chosen = _dtype(dtype, name)
    check_field("opset", opset, _OPSETS)
    check_field("verify", verify, boolean())
    check_writable(target)
    if target.exists() and target.suffix != kind.ending:
        raise BrixelError(f"{target} exists and does not end in {kind.ending}; name a new file, or *{kind.ending}")
    if check_field("dynamic", dynamic, boolean()):
        if image_hw is not None or batch != 1:
            raise BrixelError("image_hw and batch are of a file for one size; give dynamic=False as well")
        size = traced_size(model.patch_px)
    else:
        size = _fixed_size(model, image_hw, batch)
    engine = kind.engine() if verify else None  # a missing package is said before the work
    with _folder_beside(target) as folder:
        student = plain_copy(model, chosen)
        content = kind.convert(trace(student, size, dynamic=dynamic), opset)
        facts = facts_of(model, chosen, _shapes(model, size, dynamic=dynamic), version("brixel"))
        written = folder / target.name
        kind.write(content, facts, written)
        if engine is not None:
            reference = student if chosen == torch.float32 else plain_copy(model, torch.float32)
            sizes = sizes_to_compare(size, model.patch_px, model.config.adapter.short_side_px, dynamic=dynamic)
            rows = compare(kind.load(written), reference, sizes, chosen)
            check_parity(rows, chosen)
            facts["parity"] = as_record(rows, engine, chosen)
            kind.write(content, facts, written)
        for file in sorted(folder.iterdir(), key=lambda file: file == written):  # weights beside it come first
            os.replace(file, target.with_name(file.name))
    return Export(target, facts)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the disk of ``path``, which is removed at the end with what is left in it."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".brixel-export-", dir=path.parent)
    except OSError as error:
        raise BrixelError(f"{path} cannot be written ({error.strerror}); give a file in a folder of yours") from error
    with folder:
        yield Path(folder.name)


def _format_of(path: Path, format: str | None) -> str:
    if format is not None:
        return str(check_field("format", format, one_of(*FORMATS)))
    for name, kind in FORMATS.items():
        if path.suffix == kind.ending:
            return name
    endings = ", ".join(f"{kind.ending} for {name!r}" for name, kind in FORMATS.items())
    raise BrixelError(f"the ending of {path} does not say the format; expected {endings}, or give format=")


def _dtype(dtype: str | torch.dtype | None, format: str) -> torch.dtype:
    allowed = FORMATS[format].dtypes
    chosen = torch.float32 if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in allowed:
        names = ", ".join(map(repr, map(dtype_name, allowed)))
        raise BrixelError(f"dtype is {dtype!r}; expected one of {names} for the format {format!r}")
    return chosen


def _fixed_size(model: DenseFeatures, image_hw: tuple[int, int] | None, batch: int) -> InputSize:
    """The size of a file for one size; by default a square of the size that the adapter was trained on."""
    patch_px = model.patch_px
    side = whole_patches(model.config.adapter.short_side_px, patch_px)
    height, width = check_field("image_hw", image_hw, _SIZE) or (side, side)
    if height % patch_px or width % patch_px:
        raise BrixelError(f"image_hw is {height} x {width} px; expected multiples of the patch, {patch_px} px")
    return InputSize(check_field("batch", batch, whole_number(1)), height, width)


def _shapes(model: DenseFeatures, size: InputSize, *, dynamic: bool) -> tuple[list[int | str], list[int | str]]:
    """The shapes of input and output; names stand for sizes that are free."""
    cells = [model.scale * side // model.patch_px for side in (size.height_px, size.width_px)]
    if not dynamic:
        return list(size.shape), [size.batch, model.embed_dim, *cells]
    return [BATCH, 3, HEIGHT, WIDTH], [BATCH, model.embed_dim, f"map_{HEIGHT}", f"map_{WIDTH}"]
