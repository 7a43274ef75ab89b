"""Features of folders into files: decoded ahead, written behind, noted when safe, taken up where a run stopped."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.fingerprint import digest
from brixel.errors import BrixelError, MemoryLimitError
from brixel.extraction.background_writer import BackgroundWriter
from brixel.extraction.distributed import Share
from brixel.extraction.manifest import Manifest, SourceImage, Written
from brixel.extraction.pending_images import ExtractionSummary, check_free, finished_elsewhere, to_do
from brixel.extraction.progress import Progress
from brixel.extraction.writers import Files, Shards, converted
from brixel.feature_maps.feature_map import FeatureMap
from brixel.utils.devices import dtype_name
from brixel.utils.memory import parse_bytes

_LOG = logging.getLogger("brixel")
_WRITES_BEHIND = 2  # maps that may wait to be written


def extract_files(
    model: BrixelFeatures,
    images: Sequence[tuple[Path, Path]],
    folder: Path,
    *,
    ending: str = ".safetensors",
    shard_bytes: int | None = None,
    save_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    batch_size: int = 1,
    workers: int = 2,
    short_side_px: int | str | None = None,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
) -> ExtractionSummary:
    """Write the map of every image to ``folder / place + ending``; images and places as `find_images` gives them.

    ``shard_bytes``: into shards of that size instead, read by :class:`MapFolder`. ``save_dtype``: of what is written.
    What the folder's manifest says is finished, and whose image has not changed, is skipped unless ``overwrite``; a
    image that cannot be used is listed. Under `torchrun` every process takes its share. Interrupted once, it finishes
    what is in hand and raises KeyboardInterrupt. All others: as in :meth:`brixel.BrixelFeatures.stream`.
    Raises BrixelError where the folder cannot be written to, is another run's, or holds maps of other settings.
    """
    _check(ending, shard_bytes, save_dtype)
    share, kind = Share.of_environment(), ending if shard_bytes is None else "shards"
    settings = _settings(model, short_side_px, kind, save_dtype, tiles)
    report, own = ExtractionSummary(), [each for each in images if share.holds(each[1].as_posix())]
    shard_bytes, memory_limit = _within(shard_bytes, memory_limit, model.device)
    ways: dict[str, Any] = {"short_side_px": short_side_px, "memory_limit": memory_limit, "tiles": tiles}
    with Manifest(folder, settings, share, overwrite=overwrite) as manifest, _stopping() as asked:
        output: Files | Shards = (
            Files(folder, ending) if shard_bytes is None else Shards(folder, shard_bytes, share.rank, manifest.written)
        )
        todo = to_do(own, manifest, output, report)
        if isinstance(output, Files) and manifest.is_new and not manifest.written and not overwrite:
            check_free([output.path(source.image) for _, source in todo])
        manifest.begin()
        done = report.skipped + finished_elsewhere(images, manifest, share)
        bar, behind = (
            Progress(len(images), done, manifest.path, share),
            BackgroundWriter[int](report.add, depth=_WRITES_BEHIND),
        )
        with bar, _explained(folder), behind as writer:
            run = _Run(model, ways, output, manifest, report, bar, writer, asked)
            run.make_in_files(run.stream(todo, save_dtype, batch_size=batch_size, workers=workers))
            run.write(output.finish)
        if asked():
            raise KeyboardInterrupt
    return report


@dataclass(frozen=True)
class _Run:
    """What a run goes on with while it lasts."""

    model: BrixelFeatures
    ways: Mapping[str, Any]
    output: Files | Shards
    manifest: Manifest
    report: ExtractionSummary
    bar: Progress
    writer: BackgroundWriter[int]
    asked: Callable[[], bool]

    def stream(
        self, todo: Sequence[tuple[Path, SourceImage]], save_dtype: torch.dtype | None, *, batch_size: int, workers: int
    ) -> list[tuple[Path, SourceImage]]:
        """Have the maps written; gives the images whose maps are too large for memory, and fit into files."""
        images, too_large = (image for image, _ in todo), []
        as_made = isinstance(self.output, Files) and self.output.takes_parts and save_dtype in (None, self.model.dtype)
        results = self.model.stream_all(images, batch_size=batch_size, workers=workers, **self.ways)
        for (image, source), result in zip(todo, results, strict=False):
            made = _converted(result, save_dtype, image)
            if as_made and isinstance(made, MemoryLimitError):
                too_large.append((image, source))
                continue
            self.bar.add(1)
            if isinstance(made, Exception):
                self.report.fail(image, made)
            else:
                self.write(partial(self.output.add, source, made))
            if self.asked():
                break
        return too_large

    def make_in_files(self, too_large: Sequence[tuple[Path, SourceImage]]) -> None:
        """Maps that are written as they are made, one by one, when nothing else is in memory."""
        for image, source in too_large:
            if self.asked():
                return
            assert isinstance(self.output, Files)
            try:
                self.model.extract(image, out=self.output.place(source), **self.ways)
            except (BrixelError, FileNotFoundError) as error:
                self.report.fail(image, error)
            else:
                self.write(partial(self.output.noted, source))
            self.bar.add(1)

    def write(self, write: Callable[[], Written | None]) -> None:
        """Have something written and noted, behind what is computed."""

        def noted() -> int:
            written = write()
            if written is None:
                return 0
            self.manifest.add(written)
            return len(written.images)

        self.writer.do(noted)


def _converted(result: FeatureMap | Exception, save_dtype: torch.dtype | None, image: Path) -> FeatureMap | Exception:
    """The map as it is saved, or why there is none."""
    if isinstance(result, Exception):
        return result
    try:
        return converted(result, save_dtype, image=image.name)
    except BrixelError as error:
        return error


def _within(
    shard_bytes: int | None, memory_limit: int | str | None, device: torch.device
) -> tuple[int | None, int | str | None]:
    """Sizes of shards and limit for the rest, where both are of one memory: maps wait there for theirs to fill.

    Twice its bytes, as it is written. A shard is half of the limit at most.
    """
    if shard_bytes is None or memory_limit is None or device.type != "cpu":
        return shard_bytes, memory_limit
    limit = parse_bytes(memory_limit)
    shard_bytes = max(1, min(shard_bytes, limit // 4))
    return shard_bytes, limit - 2 * shard_bytes


def _check(ending: str, shard_bytes: int | None, save_dtype: torch.dtype | None) -> None:
    if shard_bytes is not None and (shard_bytes < 1 or ending != ".safetensors"):
        raise BrixelError(f"shards of {shard_bytes} bytes as {ending}: expected a positive size, and safetensors")
    if ending == ".npy" and save_dtype == torch.bfloat16:
        raise BrixelError("npy knows no bfloat16: write safetensors, or save as float16 or float32")


def _settings(
    model: BrixelFeatures, short_side_px: int | str | None, kind: str, save_dtype: torch.dtype | None, tiles: str
) -> Mapping[str, str]:
    """All that the maps depend on, beside the images."""
    return {
        "backbone": f"{model.config.backbone.title} {model.config.backbone.fingerprint[:4]}",
        "weights": digest((model.adapter, model.head)),
        "short_side_px": str(model.config.adapter.short_side_px if short_side_px is None else short_side_px),
        "dtype": dtype_name(model.dtype),
        "saved as": f"{kind}, {dtype_name(save_dtype or model.dtype)}",
        "tiles": tiles,
    }


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how that library says of a full disk
        raise BrixelError(
            f"cannot write into {folder} ({error}); what was finished before is kept: make room, and start the same "
            "command again"
        ) from error


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Inside, the first interruption only makes the function given here say so; the second one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        _LOG.warning("interrupted: what is in hand is finished first, and kept; once more stops at once")
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)
