"""Which images are left to do: an image is finished if its map is listed, in place, and of the image as it is now."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brixel.errors import BrixelError, printable
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import Manifest, SourceImage, WrittenFile, latest_by_image
from brixel.extraction.parts import remove_parts
from brixel.extraction.writers import MapWriter, file_size
from brixel.images.frame import Frame

_LOG = logging.getLogger("brixel")


@dataclass(frozen=True)
class PendingImage:
    """An image that is left to do.

    Args:
        image: What is read: a path, or a frame of a video.
        source: Its relative path, and what shows whether it has changed.
        path: Its name in messages.
    """

    image: Path | Frame
    source: SourceImage
    path: Path


@dataclass
class ExtractionSummary:
    """What became of the images of this process.

    Attributes:
        written: maps that are safely on disk.
        skipped: images whose maps were finished before.
        failures: images without a map, each with its error, in order.
        of_others: images that belong to other processes.
        left_out: how many files of the searched folders were no images, by ending; empty unless the images came from
            `find_images`.
    """

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Path, Exception]] = field(default_factory=list)
    of_others: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    def add_written(self, count: int) -> None:
        """Count maps that are safely on disk."""
        self.written += count

    def add_failure(self, image: Path, error: Exception) -> None:
        """List an image that has no map. It is logged at once, since a run may take long and be killed."""
        self.failures.append((image, error))
        message = str(error) if printable(image.name) in str(error) else f"{printable(str(image))}: {error}"
        _LOG.warning("skipped: %s", message)


def pending_images(
    images: Sequence[tuple[Path, Path]], manifest: Manifest, writer: MapWriter, summary: ExtractionSummary
) -> list[PendingImage]:
    """The images of this process that are left to do, as they are now; ``summary`` gets its others."""
    folder, entries = manifest.path.parent, latest_by_image(manifest.written)
    in_place = {file.file: is_in_place(folder, file) for _, file in entries.values()}
    pending: list[PendingImage] = []
    changed = 0
    for image, path in images:
        relative_path = path.as_posix()
        if not manifest.share.contains(relative_path):
            summary.of_others += 1
            continue
        try:
            stat = image.stat()
            writer.check_name(relative_path)
        except (OSError, BrixelError) as error:
            summary.add_failure(image, error)
            continue
        source = SourceImage(relative_path, stat.st_size, stat.st_mtime_ns)
        listed, file = entries.get(relative_path, (source, None))
        if file is not None and listed == source and in_place[file.file]:
            summary.skipped += 1
            continue
        changed += listed != source
        pending.append(PendingImage(image, source, image))
    if changed:
        _LOG.warning("%d images differ from those whose maps are in %s: they are extracted again", changed, folder)
    return pending


def finished_images(manifest: Manifest) -> frozenset[tuple[str, int]]:
    """Relative path and bytes of the images whose maps are listed and in place."""
    folder, entries = manifest.path.parent, latest_by_image(manifest.written)
    in_place = {file.file: is_in_place(folder, file) for _, file in entries.values()}
    return frozenset((name, image.size_bytes) for name, (image, file) in entries.items() if in_place[file.file])


def count_finished_elsewhere(images: Sequence[tuple[Path, Path]], manifest: Manifest, share: ProcessShare) -> int:
    """How many images of other processes have an entry, for the progress bar."""
    if share.processes == 1:
        return 0
    entries = latest_by_image(manifest.written)
    names = (path.as_posix() for _, path in images)
    return sum(name in entries and not share.contains(name) for name in names)


def remove_unlisted_parts(manifest: Manifest) -> None:
    """Remove files of many maps of which nothing counts: not listed, or written again since.

    A killed run may leave such files; whoever reads all files without the manifest would find images twice. Under
    `torchrun` they stay, since another process may be about to list one.
    """
    if manifest.share.processes == 1:
        listed = {file.file for _, file in latest_by_image(manifest.written).values()}
        remove_parts(manifest.path.parent, lambda file, _: file not in listed)


def is_in_place(folder: Path, written: WrittenFile) -> bool:
    """Whether a file exists with its listed size; `verify` compares the content."""
    try:
        return file_size(folder / written.file) == written.size_bytes
    except OSError:
        return False
