"""A progress bar over the images of all processes, shown by the first process."""

import time
from pathlib import Path

from brixel.extraction.manifest import Manifest, manifest_paths
from brixel.utils.progress import progress_bar

_EVERY_S = 5.0


class ProgressBar:
    """Counts the images of this process, and those of the others by what is appended to their manifests."""

    def __init__(self, total: int | None, done: int, manifest: Manifest) -> None:
        self._own_manifest, share = manifest.path, manifest.share
        self._bar = progress_bar(total=total, initial=done, unit="image", disable=share.rank != 0)
        self._has_others = share.processes > 1 and not self._bar.disable
        self._read_bytes = {path: path.stat().st_size for path in self._other_manifests()}
        self._next_s = time.monotonic() + _EVERY_S

    def add(self) -> None:
        """Advance the bar by an image that is finished in this process."""
        self._bar.update()
        if self._has_others and time.monotonic() > self._next_s:
            self._bar.update(self._count_others())
            self._next_s = time.monotonic() + _EVERY_S

    def _other_manifests(self) -> list[Path]:
        return [path for path in manifest_paths(self._own_manifest.parent) if path != self._own_manifest]

    def _count_others(self) -> int:
        count = 0
        for path in self._other_manifests():
            with open(path, "rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                added = file.read()
            self._read_bytes[path] = self._read_bytes.get(path, 0) + len(added)
            count += added.count(b'"picture":')  # the key that the manifest has for an image
        return count

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_others:
            self._bar.update(self._count_others())
        self._bar.close()
