"""Videos in an extraction: the names of their frames, which of them are left to do, and the list of all of them.

The map of frame 120 of `clip.mp4`, shown at 4.004 s, is named `clip.mp4/000120_4.004s`. When a video has been read to
its end, `clip.mp4/frames.json` lists the frames that were wanted, and the manifest lists that file with the video as
its source: a later run then knows without decoding whether any map is missing.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brixel.errors import BrixelError
from brixel.extraction.manifest import Manifest, SourceImage, WrittenFile, latest_by_image
from brixel.extraction.pending_images import ExtractionSummary, PendingImage, is_in_place
from brixel.extraction.writers import MapWriter, synced_file
from brixel.utils.atomic_files import write_text
from brixel.utils.fields import check_table, number, optional, several, whole_number
from brixel.utils.structured_files import checking_content, read_json_value
from brixel.video.frames import FrameSelection
from brixel.video.reading import DecodedFrame, decode

LIST_NAME = "frames.json"
_MOST_BYTES = 2**28  # of a list
_LOG = logging.getLogger("brixel")

_FRAME = several(number(0), "a frame's number and time", count=2)
_RULES = {
    "fps": optional(number(above=0)),
    "every": optional(whole_number(1)),
    "frames": several(_FRAME, "a list of pairs of number and time", single=False),
}


def is_frame_list(written: WrittenFile) -> bool:
    """Whether a file of the manifest is the list of a video's frames."""
    return written.file.endswith(f"/{LIST_NAME}")


def frame_name(clip: str, index: int, time_s: float) -> str:
    """The relative path of a frame of the video at a relative path; names sort as the frames do."""
    return f"{clip}/{index:06d}_{time_s:.3f}s"


def listed_frames(folder: Path, clip: str) -> tuple[FrameSelection, list[str]]:
    """Which frames of a video were wanted, and their relative paths, from its list in an output folder."""
    path = folder / clip / LIST_NAME
    with checking_content(path, "a list of frames of brixel", "delete it, and extract again"):
        content = check_table("it", read_json_value(path, most_bytes=_MOST_BYTES), _RULES)
    names = [frame_name(clip, int(index), time_s) for index, time_s in content["frames"]]
    return FrameSelection(content["fps"], content["every"]), names


@dataclass
class Clip:
    """A video whose frames are to be extracted.

    Args:
        path: The video.
        source: Its relative path, and what shows whether it has changed.
        selection: Which of its frames are wanted.
    """

    path: Path
    source: SourceImage
    selection: FrameSelection
    _manifest: Manifest
    _writer: MapWriter
    _summary: ExtractionSummary
    _entries: Mapping[str, tuple[SourceImage, WrittenFile]] = field(repr=False)

    def is_finished(self) -> bool:
        """Whether every map of this process is in place; they are then counted. Nothing is decoded."""
        listed, file = self._entries.get(self.source.relative_path, (None, None))
        folder = self._manifest.path.parent
        if listed != self.source or file is None or not is_in_place(folder, file):
            return False
        selection, names = listed_frames(folder, self.source.relative_path)
        own = [name for name in names if self._manifest.share.contains(name)]
        if selection != self.selection or not all(map(self._has_map, own)):
            return False
        self._summary.skipped += len(own)
        self._summary.of_others += len(names) - len(own)
        return True

    def pending(self, submit: Callable[[Callable[[], None]], None]) -> Iterator[PendingImage]:
        """The frames of this process that are left to do.

        At the end of the video, the function that writes its list is given to ``submit``, for the writing thread. A
        video that cannot be read to its end counts as a failure, after the frames before.
        """
        found: list[tuple[int, float]] = []
        self._warn_if_changed()
        try:
            for decoded in self.selection.of(decode(self.path)):
                found.append((decoded.index, decoded.time_s))
                if (pending := self._pending(decoded)) is not None:
                    yield pending
        except BrixelError as error:
            self._summary.add_failure(self.path, error)
            return
        self._warn_of_others(found)
        if self._manifest.share.contains(self.source.relative_path):
            submit(lambda: self._write_list(found))

    def _pending(self, decoded: DecodedFrame) -> PendingImage | None:
        name = frame_name(self.source.relative_path, decoded.index, decoded.time_s)
        if not self._manifest.share.contains(name):
            self._summary.of_others += 1
            return None
        if self._has_map(name):
            self._summary.skipped += 1
            return None
        self._writer.check_name(name)
        source = dataclasses.replace(self.source, relative_path=name)
        return PendingImage(decoded.convert(), source, self.path / Path(name).name)

    def _has_map(self, name: str) -> bool:
        source, file = self._entries.get(name, (None, None))
        if source is None or file is None or source != dataclasses.replace(self.source, relative_path=name):
            return False
        return is_in_place(self._manifest.path.parent, file)

    def _known(self) -> list[SourceImage]:
        """The frames of this video, as it is or was, that have maps."""
        prefix = f"{self.source.relative_path}/"
        return [source for name, (source, _) in self._entries.items() if name.startswith(prefix)]

    def _warn_if_changed(self) -> None:
        for known in self._known():
            if known != dataclasses.replace(self.source, relative_path=known.relative_path):
                folder = self._manifest.path.parent
                _LOG.warning("%s differs from the video whose maps are in %s: it is extracted again", self.path, folder)
                return

    def _warn_of_others(self, found: Sequence[tuple[int, float]]) -> None:
        """Name the maps of a changed video that the new one does not replace."""
        names = {frame_name(self.source.relative_path, *frame) for frame in found}
        left = [
            known.relative_path
            for known in self._known()
            if known.relative_path not in names and known.mtime_ns != self.source.mtime_ns
        ]
        if left:
            _LOG.warning(
                "%d maps, such as %s, are of frames that %s had and has no more: extract it into another folder to be "
                "rid of them",
                *(len(left), left[0], self.path),
            )

    def _write_list(self, found: Sequence[tuple[int, float]]) -> None:
        folder = self._manifest.path.parent
        path = folder / self.source.relative_path / LIST_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"fps": self.selection.fps, "every": self.selection.every, "frames": found}
        write_text(path, json.dumps(content) + "\n")
        self._manifest.add(synced_file(folder, path, (self.source,)))


def find_clips(
    paths: Sequence[tuple[Path, Path]],
    selection: FrameSelection,
    manifest: Manifest,
    writer: MapWriter,
    summary: ExtractionSummary,
) -> list[Clip]:
    """The videos, of pairs of path and relative path, that are not finished; ``summary`` gets the others."""
    entries = latest_by_image(manifest.written)
    clips = []
    for path, relative in paths:
        try:
            stat = path.stat()
        except OSError as error:
            summary.add_failure(path, error)
            continue
        source = SourceImage(relative.as_posix(), stat.st_size, stat.st_mtime_ns)
        clip = Clip(path, source, selection, manifest, writer, summary, entries)
        if not clip.is_finished():
            clips.append(clip)
    return clips
