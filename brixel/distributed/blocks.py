"""Records of finished blocks of images: what a block wrote, until the manifest of the output folder lists it.

The worker that computed a block leaves a record once the files are on disk. A block that is given out again, because
an answer was lost, is found finished by its record; and a driver that starts again lists what it finds recorded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from brixel.errors import BrixelError
from brixel.extraction.manifest import Manifest, SourceImage, WrittenFile, file_record, parse_file
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import Rule, check_table, several, text_table
from brixel.utils.structured_files import checking_content, parse_json, read_bounded

_FOLDER = ".blocks"
_MAX_BYTES = 2**25
_RULES = {
    "files": several(Rule("a file", lambda value: value), "a list of files", single=False),
    "failures": text_table("errors by image"),
}


@dataclass(frozen=True)
class FinishedBlock:
    """What became of a block of images: the files with their maps, and the images that failed with their errors."""

    name: str
    files: tuple[WrittenFile, ...]
    failures: Mapping[str, str]

    def to_json(self) -> str:
        """The block without its name."""
        files = [file_record(file) for file in self.files]
        return json.dumps({"files": files, "failures": dict(self.failures)})

    @classmethod
    def from_json(cls, name: str, text: str | bytes, folder: Path) -> "FinishedBlock":
        """The block as :meth:`to_json` wrote it; its files are below ``folder``. Raises DamagedFileError."""
        path = _path(folder, name)
        with checking_content(path, "the record of a block", "delete it, and extract again"):
            fields = check_table("the record", parse_json(text, path, most_bytes=_MAX_BYTES), _RULES)
            files = tuple(parse_file(folder, path, 1, record) for record in fields["files"])
        return cls(name, files, fields["failures"])


def block_name(settings: Mapping[str, str], images: Sequence[SourceImage]) -> str:
    """A name that is the same for the same images with the same settings, on whatever machine and in every attempt."""
    content = [sorted(settings.items()), [(image.relative_path, image.size_bytes, image.mtime_ns) for image in images]]
    return "b" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:31]


def find_block(folder: Path, name: str) -> FinishedBlock | None:
    """The block of that name if an earlier attempt finished it."""
    path = _path(folder, name)
    if not path.exists():
        return None
    return FinishedBlock.from_json(name, read_bounded(path, _MAX_BYTES), folder)


def record_block(folder: Path, block: FinishedBlock) -> None:
    """Leave the record of a block whose files are on disk."""
    path = _path(folder, block.name)
    path.parent.mkdir(exist_ok=True)
    write_text(path, block.to_json())


def forget_block(folder: Path, name: str) -> None:
    """Remove the record of a block that the manifest lists."""
    _path(folder, name).unlink(missing_ok=True)


def list_recorded_blocks(folder: Path, manifest: Manifest) -> int:
    """List in the manifest what blocks of a killed run recorded, and remove the records. Returns how many maps."""
    listed = {file.file for file in manifest.written}
    count = 0
    for path in sorted((folder / _FOLDER).glob("*.json")):
        try:
            block = find_block(folder, path.stem)
        except BrixelError:  # its images are computed again
            block = None
        for file in block.files if block is not None else ():
            if file.file in listed:
                continue
            manifest.add(file)
            manifest.written.append(file)
            count += len(file.images)
        path.unlink(missing_ok=True)
    return count


def remove_records(folder: Path) -> None:
    """Remove all records, and their folder."""
    for path in (folder / _FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)
    if (folder / _FOLDER).is_dir():
        (folder / _FOLDER).rmdir()


def _path(folder: Path, name: str) -> Path:
    return folder / _FOLDER / f"{name}.json"
