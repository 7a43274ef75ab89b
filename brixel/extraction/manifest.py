"""What is finished in an output folder: a line for each file of maps, appended once the file is safely on disk.

Every process writes a manifest of its own and reads all. The first line holds the settings of the run. A last line that
was cut off is not counted, and is cut away by the process that goes on writing there.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from brixel.errors import BrixelError, DamagedFileError
from brixel.extraction.distributed import Share
from brixel.utils.atomic_files import UNFINISHED

FORMAT_VERSION = 1
_LOG = logging.getLogger("brixel")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as some file systems of clusters say
_NAME = "manifest-{}.jsonl"
_SHARD = re.compile(r"maps-\d+-\d{5,}\.safetensors")


@dataclass(frozen=True)
class SourceImage:
    """An image as it was read: where its map belongs, its bytes and its time of change, to see whether it changed."""

    image: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Written:
    """A file of maps: its bytes and their sha256, the images in it, and when it was written."""

    file: str
    bytes: int
    sha256: str
    images: tuple[SourceImage, ...]
    at: float = 0.0


class Manifest:
    """The finished work of a folder, and the part of it that this process writes; locked while it is open.

    ``is_new``: whether this process never began here before. :meth:`begin` comes before the first :meth:`add`.
    Raises BrixelError where another run writes there, or one with other settings has.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], share: Share, *, overwrite: bool = False) -> None:
        self.path = folder / _NAME.format(share.rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise BrixelError(
                f"cannot write into {folder} ({error}); give another folder, or mend its permissions"
            ) from error
        self._mark, self._settings = -1, dict(settings)
        try:
            _lock(self._file.fileno(), folder)
            self._mark = _mark(folder, share)
            if share.processes == 1:
                self._tidy(folder)
            if overwrite:
                self._forget(folder, share)
            self._keep_whole_lines()
            self.written = [] if overwrite else read_manifests(folder, settings)
            self.is_new = self._file.tell() == 0
        except BaseException:
            self._close()
            raise

    def begin(self) -> None:
        """Write what the run is, unless an earlier start did: from here on, files in the folder may be its own."""
        if self.is_new:
            self._append({"format_version": FORMAT_VERSION, "settings": self._settings})
        self.is_new = False

    def add(self, written: Written) -> None:
        """Note a file that is safely on disk; when this returns, so is the note."""
        self._append(_record(dataclasses.replace(written, at=time.time())))

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._mark >= 0:
            os.close(self._mark)
        self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _keep_whole_lines(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def _tidy(self, folder: Path) -> None:
        """Take away what a process that was killed had begun to write; nobody else writes here."""
        for path in folder.rglob(".*.part*"):
            if UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _forget(self, folder: Path, share: Share) -> None:
        """Empty this manifest, and take away shards, and manifests of processes that this run has not."""
        self._file.truncate(0)
        for path in manifests(folder):
            rank = int(path.stem.partition("-")[2])
            if rank >= share.processes and rank % share.processes == share.rank:
                path.unlink(missing_ok=True)
        for path in shards(folder):
            if int(path.stem.split("-")[1]) % share.processes == share.rank:
                path.unlink(missing_ok=True)


def manifests(folder: Path) -> list[Path]:
    """The manifests of a folder, by process."""
    paths = [path for path in folder.glob(_NAME.format("*")) if path.stem.partition("-")[2].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))


def shards(folder: Path) -> list[Path]:
    """The shards of a folder, named by process and number."""
    return [path for path in folder.glob("maps-*.safetensors") if _SHARD.fullmatch(path.name)]


def read_manifests(folder: Path, settings: Mapping[str, str] | None = None) -> list[Written]:
    """All that is noted in a folder, the latest last. BrixelError where it was made with other ``settings``."""
    written: list[Written] = []
    for path in manifests(folder):
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut off
        with _damage_explained(path):
            records = [json.loads(line) for line in lines]
            if records:
                _check_header(path, records[0], settings)
            written += [_read(record) for record in records[1:]]
    return sorted(written, key=lambda each: each.at)


def current(written: Iterable[Written]) -> dict[str, tuple[SourceImage, Written]]:
    """By image, its last note: the image as it was read, and the file that holds its map."""
    return {source.image: (source, each) for each in written for source in each.images}


def _read(record: dict[str, Any]) -> Written:
    images = tuple(SourceImage(each["picture"], each["bytes"], each["mtime_ns"]) for each in record["pictures"])
    return Written(record["file"], record["bytes"], record["sha256"], images, record.get("at", 0.0))


def _record(written: Written) -> dict[str, Any]:
    """A line of the manifest; its keys are those of version 0.1."""
    images = [{"picture": each.image, "bytes": each.bytes, "mtime_ns": each.mtime_ns} for each in written.images]
    return {
        **{"file": written.file, "bytes": written.bytes, "sha256": written.sha256},
        **{"pictures": images, "at": written.at},
    }


@contextlib.contextmanager
def _damage_explained(path: Path) -> Any:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, BrixelError):
            raise
        raise DamagedFileError(
            f"{path} is damaged or no manifest of ours ({error}); with --overwrite all is done anew"
        ) from error


def _check_header(path: Path, header: dict[str, Any], settings: Mapping[str, str] | None) -> None:
    version = header["format_version"]
    if version != FORMAT_VERSION:
        raise BrixelError(f"{path} has format {version!r}, this brixel reads {FORMAT_VERSION}; update brixel")
    theirs = header["settings"]
    wrong = [
        f"{name}: {settings.get(name)}, not {theirs.get(name)}"
        for name in (dict(theirs) | dict(settings) if settings is not None else {})
        if settings is not None and settings.get(name) != theirs.get(name)
    ]
    if wrong:
        raise BrixelError(
            f"{path.parent} holds maps made with other settings ({'; '.join(wrong)}): give those that it was started "
            "with, another output folder, or --overwrite"
        )


def _mark(folder: Path, share: Share) -> int:
    """Hold an empty file that tells how many processes this run has; an error where one of another number runs.

    The manifests' own locks would let processes of a larger run begin whose numbers the smaller one has not.
    """
    own = os.open(folder / f".run-{share.rank}-of-{share.processes}", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(own, folder)
        for path in folder.glob(".run-*-of-*"):
            if path.name.rpartition("-")[2] != str(share.processes):
                other = os.open(path, os.O_RDWR)
                try:
                    _lock(other, folder)
                finally:
                    os.close(other)
    except BaseException:
        os.close(own)
        raise
    return own


def _lock(handle: int, folder: Path) -> None:
    """Hold the file for this process until it is closed, also by the process's death."""
    busy = f"another run writes to {folder}: wait for its end, or give another output folder"
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 1 << 40, os.SEEK_SET)  # far behind what others read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BrixelError(busy) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _LOG.warning("the file system of %s has no locks: mind that no other run writes there", folder)
