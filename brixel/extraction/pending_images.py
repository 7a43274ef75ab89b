"""What of the images is left to do: all that is noted, still there, and of the image as it is now, is finished."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brixel.errors import BrixelError
from brixel.extraction.distributed import Share
from brixel.extraction.manifest import Manifest, SourceImage, Written, current
from brixel.extraction.writers import Output, size_of

_LOG = logging.getLogger("brixel")


@dataclass
class ExtractionSummary:
    """What became of the images of this process."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Path, Exception]] = field(default_factory=list)

    def add(self, count: int) -> None:
        """So many more maps are safely on disk."""
        self.written += count

    def fail(self, image: Path, error: Exception) -> None:
        """List an image that has no map, and say so now: a run may take long, and be killed."""
        self.failures.append((image, error))
        message = str(error) if image.name in str(error) else f"{image}: {error}"
        _LOG.warning("skipped: %s", message.encode("utf-8", "backslashreplace").decode())


def to_do(
    own: Sequence[tuple[Path, Path]], manifest: Manifest, output: Output, report: ExtractionSummary
) -> list[tuple[Path, SourceImage]]:
    """The images of this process whose maps are not finished, as they are now; those without a chance are listed."""
    noted = current(manifest.written)
    there = {each.file: _is_there(manifest.path.parent, each) for _, each in noted.values()}
    todo, changed = [], 0
    for image, place in own:
        name = place.as_posix()
        try:
            facts = image.stat()
            output.check_name(name)
        except (OSError, BrixelError) as error:
            report.fail(image, error)
            continue
        source = SourceImage(name, facts.st_size, facts.st_mtime_ns)
        if name in noted and noted[name][0] == source and there[noted[name][1].file]:
            report.skipped += 1
            continue
        changed += name in noted and noted[name][0] != source
        todo.append((image, source))
    if changed:
        _LOG.warning("%d images are others than those whose maps are in %s: made anew", changed, manifest.path.parent)
    return todo


def finished_elsewhere(images: Sequence[tuple[Path, Path]], manifest: Manifest, share: Share) -> int:
    """How many of the other processes' images have a note, for the bar."""
    noted: Mapping[str, object] = current(manifest.written)
    return sum(place.as_posix() in noted and not share.holds(place.as_posix()) for _, place in images)


def check_free(paths: Sequence[Path]) -> None:
    """Raise BrixelError where a file is in the way of a first run."""
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None:
        raise BrixelError(
            f"{taken} exists and is in no manifest, so that it may be something else: give another output folder, "
            "or --overwrite"
        )


def _is_there(folder: Path, written: Written) -> bool:
    """Whether a file is still there, whole; `verify` is for what is in it."""
    try:
        return size_of(folder / written.file) == written.bytes
    except OSError:
        return False
