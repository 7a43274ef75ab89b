"""Manifests: what is finished in an output folder, a line for each file of maps, appended once the file is on disk.

Every process appends to its own manifest and reads all of them. The first line holds the settings of the run. A last
line without its newline was cut off: readers ignore it, and the process that goes on writing there removes it.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from brixel.errors import BrixelError
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.parts import remove_parts
from brixel.utils.atomic_files import remove_unfinished
from brixel.utils.contained_paths import path_below
from brixel.utils.fields import Rule, check_table, number, several, short_repr, text, text_table, whole_number
from brixel.utils.locks import only_run
from brixel.utils.structured_files import checking_content, read_json_lines

FORMAT_VERSION = 1
_OTHER_SIZE_S = 2.0  # processes that start together may try the same file; a run holds its own for longer
_NAME = "manifest-{}.jsonl"
_DAMAGED = ("a manifest of brixel", "--overwrite extracts everything again")

_HEADER_RULES = {"format_version": whole_number(1, 2), "settings": text_table("texts by name")}
_BYTES = whole_number(0, 2**63)
_IMAGE_RULES = {"picture": text(), "bytes": _BYTES, "mtime_ns": whole_number(-(2**63), 2**63)}
_FILE_RULES = {
    **{"file": text(), "bytes": _BYTES, "sha256": text()},
    **{"pictures": several(Rule("an image", lambda value: value), "a list of images", single=False), "at": number()},
}


@dataclass(frozen=True)
class SourceImage:
    """An image as it was read: its path below the input folder, and what shows whether it has changed since."""

    relative_path: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class WrittenFile:
    """A file of maps: its path below the output folder, size and sha256, the images in it, the time it was listed."""

    file: str
    size_bytes: int
    sha256: str
    images: tuple[SourceImage, ...]
    listed_s: float = 0.0


class Manifest:
    """The manifest of this process, and the content of all; the folder is locked while it is open.

    :meth:`begin` comes before the first :meth:`add`. ``written`` holds what all manifests list, oldest first; nothing
    with ``overwrite``. ``is_new`` says that this process has not begun in the folder before.
    Raises BrixelError where the folder cannot be written to, another run writes there, or its settings differ.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, str], share: ProcessShare, *, overwrite: bool = False
    ) -> None:
        self.share, self.path = share, folder / _NAME.format(share.rank)
        self._settings = dict(settings)
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_run_lock(folder, share))
                self._file = stack.enter_context(self.path.open("a+b"))
            except OSError as error:
                raise BrixelError(
                    f"cannot write into {folder} ({error}); give another folder, or correct its permissions"
                ) from error
            if share.processes == 1:
                remove_unfinished(folder)
            if overwrite:
                self._file.truncate(0)
                _remove_earlier_run(folder, share)
            self._cut_to_whole_lines()
            self.written = [] if overwrite else read_manifests(folder, settings)
            self.is_new = self._file.tell() == 0
            self._listed_s = max((file.listed_s for file in self.written), default=0.0)
            self._open = stack.pop_all()

    def begin(self) -> None:
        """Write the settings, unless an earlier start did. From then on, files in the folder may be of this run."""
        if self.is_new:
            self._append({"format_version": FORMAT_VERSION, "settings": self._settings})
        self.is_new = False

    def add(self, written: WrittenFile) -> None:
        """List a file that is safely on disk; when this returns, the line is on disk as well."""
        self._listed_s = max(time.time(), self._listed_s + 0.001)  # in order, also where a clock is set back
        self._append(file_record(dataclasses.replace(written, listed_s=self._listed_s)))

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        if not self._in_place():
            raise BrixelError(
                f"{self.path.parent} was moved or removed while maps were written into it; put it back, and start the "
                "same command again"
            )
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def _cut_to_whole_lines(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)


def manifest_paths(folder: Path) -> list[Path]:
    """The manifests of a folder, by rank."""
    paths = [path for path in folder.glob(_NAME.format("*")) if path.stem.partition("-")[2].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem.partition("-")[2]))


def read_manifests(folder: Path, settings: Mapping[str, str] | None = None) -> list[WrittenFile]:
    """The files that the manifests of a folder list, oldest first.

    Raises BrixelError for a damaged manifest, one of a newer format, and where ``settings`` are given and differ.
    """
    written: list[WrittenFile] = []
    for path in manifest_paths(folder):
        records = read_json_lines(path)
        with checking_content(path, *_DAMAGED):
            header = next(records, None)
        if header is not None:
            settings = _check_header(path, header, settings)
        with checking_content(path, *_DAMAGED):
            written += [parse_file(folder, path, number, record) for number, record in enumerate(records, 2)]
    return sorted(written, key=lambda file: file.listed_s)


def latest_by_image(written: Iterable[WrittenFile]) -> dict[str, tuple[SourceImage, WrittenFile]]:
    """For the relative path of every image, its last entry: the image as it was read, and the file with its map."""
    return {image.relative_path: (image, file) for file in written for image in file.images}


def parse_file(folder: Path, path: Path, number: int, record: object) -> WrittenFile:
    """A file from its line in a manifest at ``path``, by the number of the line. Raises BrixelError."""
    line = f"line {number}"
    fields = check_table(line, record, _FILE_RULES, {"at": 0.0})
    path_below(folder, fields["file"], path)
    images = [check_table(f"an image of {line}", image, _IMAGE_RULES) for image in fields["pictures"]]
    sources = tuple(SourceImage(image["picture"], image["bytes"], image["mtime_ns"]) for image in images)
    return WrittenFile(fields["file"], fields["bytes"], fields["sha256"], sources, fields["at"])


def file_record(written: WrittenFile) -> dict[str, Any]:
    """A line of the manifest; its keys are those of version 0.1."""
    images = [
        {"picture": image.relative_path, "bytes": image.size_bytes, "mtime_ns": image.mtime_ns}
        for image in written.images
    ]
    file = {"file": written.file, "bytes": written.size_bytes, "sha256": written.sha256}
    return {**file, "pictures": images, "at": written.listed_s}


def _check_header(path: Path, header: dict[str, Any], settings: Mapping[str, str] | None) -> Mapping[str, str]:
    """The settings that a manifest states. Raises BrixelError where they are others than ``settings``."""
    version = header.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise BrixelError(f"{path} has format {short_repr(version)}, this brixel reads {FORMAT_VERSION}; update brixel")
    with checking_content(path, *_DAMAGED):
        stored = check_table("line 1", header, _HEADER_RULES)["settings"]
    if settings is None:
        return cast("Mapping[str, str]", stored)
    wrong = [
        f"{name}: {settings.get(name)}, not {stored.get(name)}"
        for name in stored | dict(settings)
        if settings.get(name) != stored.get(name)
    ]
    if wrong:
        raise BrixelError(
            f"{path.parent} holds maps made with other settings ({'; '.join(wrong)}): give the settings of its first "
            "run, another output folder, or --overwrite"
        )
    return settings


def _remove_earlier_run(folder: Path, share: ProcessShare) -> None:
    """Remove this process's share of the files of many maps, and of the manifests of ranks that this run lacks."""
    for path in manifest_paths(folder):
        rank = int(path.stem.partition("-")[2])
        if rank >= share.processes and rank % share.processes == share.rank:
            path.unlink(missing_ok=True)
    remove_parts(folder, lambda _, part: part.rank % share.processes == share.rank)


def _run_lock(folder: Path, share: ProcessShare) -> contextlib.AbstractContextManager[None]:
    """Lock the empty file `.run-RANK-of-N`.

    A run with another N locks other files, so those that exist are locked for a moment to see that no such run is
    alive.
    """

    def of_other_sizes() -> Iterator[Path]:
        runs = folder.glob(".run-*-of-*")
        return (path for path in runs if path.name.rpartition("-")[2] != str(share.processes))

    own = folder / f".run-{share.rank}-of-{share.processes}"
    return only_run(own, "another output folder", others=of_other_sizes, others_s=_OTHER_SIZE_S)
