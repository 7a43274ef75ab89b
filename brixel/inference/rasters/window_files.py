"""The finished windows of a run, as files in a folder beside its output; a run that was stopped goes on with them.

The folder `NAME.partial` holds `run.json` (settings and source), a lock, and for every finished window its cells
(D, h, w) as `.npy`, or an empty file where it has no data. Files appear whole or not at all.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from brixel.errors import BrixelError
from brixel.inference.rasters.windows import Window
from brixel.utils.atomic_files import atomic_path, remove_unfinished, write_text
from brixel.utils.fields import check_table, text_table, whole_number
from brixel.utils.locks import only_run
from brixel.utils.structured_files import checking_content, read_json

FORMAT_VERSION = 1
_RULES = {"format_version": whole_number(1, 2), "settings": text_table("texts by name")}
_AGAIN = "--overwrite starts again"
Cells = "npt.NDArray[np.floating]"


class WindowFiles:
    """The finished windows in a folder; made by :func:`open_window_files`.

    Args:
        folder: The folder.
        shape: Of the cells of every window, (D, h, w).
        dtype: Of their numbers.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], dtype: str) -> None:
        self.folder, self._shape, self._dtype = folder, shape, np.dtype(dtype)

    def is_finished(self, window: Window) -> bool:
        """Whether a window need not be computed again."""
        return self.is_empty(window) or self._is_whole(self._path(window))

    def is_empty(self, window: Window) -> bool:
        """Whether a window is finished and has no data."""
        return self._path(window).with_suffix(".empty").exists()

    def add(self, window: Window, cells: "npt.NDArray[np.generic] | None") -> None:
        """Keep the cells of a window; when this returns they are on the disk. None where it has no data."""
        path = self._path(window)
        if cells is None:
            path.with_suffix(".empty").touch()  # of a sparse scene there are thousands: none waits for the disk
            return
        assert cells.shape == self._shape, (cells.shape, self._shape)
        with atomic_path(path, durable=True) as unfinished:
            np.save(unfinished, cells.astype(self._dtype, copy=False))

    def cells(self, window: Window) -> "npt.NDArray[np.generic]":
        """The cells of a finished window with data: a file that is mapped into memory."""
        return np.load(self._path(window), mmap_mode="r")

    def _path(self, window: Window) -> Path:
        return self.folder / f"window-{window.row:05}-{window.column:05}.npy"

    def _is_whole(self, path: Path) -> bool:
        try:
            cells = np.load(path, mmap_mode="r")  # as long as its header says, or an error
        except (OSError, ValueError, EOFError):
            return False
        return cells.shape == self._shape and cells.dtype == self._dtype


@contextlib.contextmanager
def open_window_files(
    folder: Path, settings: Mapping[str, str], shape: tuple[int, int, int], dtype: str, *, overwrite: bool
) -> Iterator[WindowFiles]:
    """The finished windows of a run with these settings; the folder is locked meanwhile, and removed at the end.

    It stays where the block raises, so that the next run goes on.

    Args:
        folder: The folder; made if it is missing.
        settings: All that the windows depend on.
        shape: Of the cells of every window, (D, h, w).
        dtype: Of their numbers.
        overwrite: Forget windows of other settings, where otherwise they are an error.

    Raises:
        BrixelError: Another run writes there, or a run with other settings was stopped there.
    """
    folder.mkdir(exist_ok=True)
    with only_run(folder / ".lock", "another output"):
        remove_unfinished(folder)
        _begin(folder, settings, overwrite=overwrite)
        yield WindowFiles(folder, shape, dtype)
    shutil.rmtree(folder)  # when the lock in it is closed, as Windows wants it


def _begin(folder: Path, settings: Mapping[str, str], *, overwrite: bool) -> None:
    path = folder / "run.json"
    if path.exists():
        wrong = [] if overwrite else _differences(path, settings)
        if wrong:
            raise BrixelError(
                f"{folder} holds windows of a run with other settings ({'; '.join(wrong)}), which was stopped: give "
                "its settings to go on, another output, or --overwrite to forget it"
            )
        if not overwrite or _is_same(path, settings):
            return
        for finished in folder.glob("window-*"):
            finished.unlink()
    write_text(path, json.dumps({"format_version": FORMAT_VERSION, "settings": dict(settings)}, indent=1))


def _differences(path: Path, settings: Mapping[str, str]) -> list[str]:
    content = read_json(path)
    with checking_content(path, "what a run of brixel extract notes", _AGAIN):
        stored = check_table(path.name, content, _RULES)["settings"]
    return [
        f"{name}: {settings.get(name)}, not {stored.get(name)}"
        for name in stored | dict(settings)
        if settings.get(name) != stored.get(name)
    ]


def _is_same(path: Path, settings: Mapping[str, str]) -> bool:
    try:
        return not _differences(path, settings)
    except BrixelError:  # damaged, or of a newer brixel
        return False
