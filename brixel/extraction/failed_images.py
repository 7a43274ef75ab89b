"""Rows of images without a map, in Parquet: a file beside the maps that every run writes anew."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from brixel.extraction.pending_images import ExtractionSummary
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.containers.parquet import FailedImage, maps_table, read_failed, write_table
from brixel.utils.atomic_files import atomic_path

_FOLDER = CONTAINERS["parquet"].folder
_ROWS_PER_GROUP = 2**16


def write_failed_images(
    folder: Path,
    tried: Iterable[str],
    failures: Sequence[FailedImage],
    *,
    rank: int,
    dtype: torch.dtype,
    overwrite: bool,
) -> None:
    """Write what failed in this run, with what failed in earlier runs and was not tried again; no file for nothing.

    Args:
        folder: The output folder.
        tried: Relative paths of the images of this run, finished ones among them.
        failures: The images without a map.
        rank: The process.
        dtype: Of the features in the other files, so that all have one schema.
        overwrite: Whether nothing of earlier runs is kept.
    """
    path = folder / _FOLDER / f"failed-{rank}.parquet"
    tried = set(tried)
    earlier = [row for row in read_failed(path) if row.image not in tried] if path.exists() and not overwrite else []
    rows = [*earlier, *failures]
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path, durable=True) as temporary:
        write_table(temporary, maps_table(rows, dtype), _ROWS_PER_GROUP)


def failed_rows(summary: ExtractionSummary, names: dict[Path, str]) -> list[FailedImage]:
    """The failures of a run as rows; ``names`` are the relative paths of the images."""
    named = ((names.get(image, image.as_posix()), error) for image, error in summary.failures)
    return [FailedImage(printable_name(name), str(error)) for name, error in named]


def printable_name(relative_path: str) -> str:
    """A name in UTF-8; what it lacks is escaped."""
    return relative_path.encode(errors="backslashreplace").decode()
