"""A bar over the images of all processes, shown by the first."""

import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from brixel.extraction.distributed import Share
from brixel.extraction.manifest import manifests

_EVERY_S = 5.0


class Progress:
    """Counts this process's images, and those of the others by the lines that their manifests grow by."""

    def __init__(self, total: int, done: int, own: Path, share: Share) -> None:
        self._own, self._share = own, share
        self._bar = tqdm(total=total, initial=done, unit="picture", disable=None if share.rank == 0 else True)
        self._read = {path: path.stat().st_size for path in self._others()}
        self._next = time.monotonic() + _EVERY_S

    def add(self, count: int) -> None:
        """So many more images are finished here."""
        self._bar.update(count)
        if self._share.processes > 1 and not self._bar.disable and time.monotonic() > self._next:
            self._bar.update(self._count_others())
            self._next = time.monotonic() + _EVERY_S

    def _others(self) -> list[Path]:
        return [path for path in manifests(self._own.parent) if path != self._own]

    def _count_others(self) -> int:
        count = 0
        for path in self._others():
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                added = file.read()
            self._read[path] = self._read.get(path, 0) + len(added)
            count += added.count(b'"picture":')
        return count

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._share.processes > 1 and not self._bar.disable:
            self._bar.update(self._count_others())
        self._bar.close()
