"""Features of folders of images, extracted into files: decode, compute, write, list in the manifest."""

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from brixel.extraction.clips import Clip, find_clips
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.failed_images import failed_rows, write_failed_images
from brixel.extraction.fitted_reduction import SAMPLE, reduction_for
from brixel.extraction.manifest import Manifest, WrittenFile
from brixel.extraction.pending_images import (
    ExtractionSummary,
    PendingImage,
    count_finished_elsewhere,
    pending_images,
    remove_unlisted_parts,
)
from brixel.extraction.progress import ProgressBar
from brixel.extraction.sinks import DEFAULT_ENDING, PARQUET, Sink
from brixel.extraction.writers import FileWriter, MapWriter, convert
from brixel.feature_maps.reduction.reduce import REDUCE_KEY, Reduce
from brixel.images.find_images import FoundImages
from brixel.images.frame import Frame
from brixel.model.upsampler import UPSCALE
from brixel.utils.devices import dtype_name
from brixel.video.frames import FrameSelection, is_video
from brixel.video.reading import import_av

_LOG = logging.getLogger("brixel")
_MAX_WAITING_WRITES = 2


def extract_files(
    model: BrixelFeatures,
    images: Sequence[tuple[Path, Path]],
    folder: Path,
    *,
    sink: str | None = None,
    ending: str = DEFAULT_ENDING,
    shard_bytes: int | None = None,
    save_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    batch_size: int = 1,
    workers: int = 2,
    scale: int | None = None,
    short_side_px: int | str | None = None,
    memory_limit: int | str | None = None,
    tiles: str = "auto",
    reduce: Reduce | str | None = None,
    reduce_sample: int = SAMPLE,
    fps: float | None = None,
    every: int | None = None,
) -> ExtractionSummary:
    """Extract the dense map of every image, and of the frames of videos, into files that :class:`MapFolder` reads.

    The manifest of the folder lists what is finished, so the same call continues a run that was stopped. Under
    `torchrun` every process extracts its share of the images. The first Ctrl-C finishes the maps in progress and raises
    KeyboardInterrupt, the second stops at once.

    Args:
        model: the model to extract with.
        images: pairs of an image's path and its relative path, as `find_images` returns them. The relative path names
            the map in the output folder. A path that ends as those of videos do is a video; the maps of its frames are
            named by their number and time, such as "clip.mp4/000120_4.004s".
        folder: the output folder; created if it is missing.
        sink: "files", a file for each image; or files of many maps: "shards" (safetensors), "parquet", "zarr" or
            "webdataset" (`docs/folders.md`). None for files, or for shards where ``shard_bytes`` is given.
        ending: ".safetensors" or ".npy": the map of an image is the file ``folder / relative_path + ending``.
        shard_bytes: bytes of the features in a file of many maps, about; None for 256 MiB.
        save_dtype: dtype of the features in the files; None for the model's.
        overwrite: extract everything again, over files that exist.
        batch_size: images of one size that are computed at once.
        workers: threads that decode images ahead; 0 for none.
        scale: cells of the maps per patch, on each axis, as in :meth:`brixel.BrixelFeatures.extract`.
        short_side_px: length in pixels that the short side of an image is resized to, or "native"; None for the
            length that the adapter was trained on.
        memory_limit: limit of the memory on the model's device, in bytes or as text such as "4GiB"; on the CPU it
            includes the shards. None for what is free.
        tiles: "auto", "never" or "always", as in :meth:`brixel.BrixelFeatures.extract`.
        reduce: what becomes of every map before it is written, such as "pca:32,int8" or a :class:`brixel.Reduce`
            (`docs/reduction.md`). A basis that it lacks is fitted first, and kept in the folder as
            `reduce.safetensors`, where a later run finds it.
        reduce_sample: images that a basis is fitted to; the same ones in every run.
        fps: of videos, so many frames per second, as in :func:`brixel.video.frames`; all where neither is given.
        every: of videos, the frames whose number is a multiple of it.

    Returns:
        How many maps were written and skipped in this process, the images that failed (those that cannot be read, that
        do not fit into memory, or whose name is too long), and what was left out.

    Raises:
        BrixelError: if the folder cannot be written to, another run writes there, it holds maps of other settings, or
            a file that is in no manifest is in the way.
        KeyboardInterrupt: after the first Ctrl-C, once the maps in progress are written.
    """
    target = Sink.choose(sink, ending, shard_bytes)
    reduce = None if reduce is None else target.checked_reduction(reduce, save_dtype)
    dtype = target.stored_dtype(save_dtype, model.dtype, reduce)
    share, selection = ProcessShare.from_environment(), FrameSelection(fps, every)
    videos = [pair for pair in images if is_video(pair[0])]
    if videos:
        import_av()
    stills = [pair for pair in images if not is_video(pair[0])] if videos else images
    summary = ExtractionSummary(left_out=images.left_out if isinstance(images, FoundImages) else {})
    model = model.at_scale(scale)
    settings = manifest_settings(model, short_side_px, target.kind, save_dtype, tiles)
    target, memory_limit = target.split_memory(memory_limit, model.device)
    options: dict[str, Any] = {"short_side_px": short_side_px, "memory_limit": memory_limit, "tiles": tiles}
    if reduce is not None:
        of_sample = {**options, "batch_size": batch_size, "workers": workers}
        reduction = reduction_for(
            folder, reduce, model, images, share, of_sample, reduce_sample, selection=selection, overwrite=overwrite
        )
        settings = {**settings, REDUCE_KEY: reduction.reduce.identity}
        options["reduce"] = reduction.reduce
    with Manifest(folder, settings, share, overwrite=overwrite) as manifest, finish_on_interrupt() as interrupted:
        remove_unlisted_parts(manifest)
        writer = target.writer(folder, str(share.rank), manifest.written)
        pending = pending_images(stills, manifest, writer, summary)
        clips = find_clips(videos, selection, manifest, writer, summary)
        if isinstance(writer, FileWriter) and manifest.is_new and not manifest.written and not overwrite:
            paths = [writer.path(still.source.relative_path) for still in pending]
            check_none_exists([*paths, *(folder / clip.source.relative_path for clip in clips)])
        if reduce is not None:
            reduction.save()
        manifest.begin()
        done = summary.skipped + count_finished_elsewhere(stills, manifest, share)
        with (
            ProgressBar(None if clips else done + len(pending), done, manifest) as bar,
            disk_errors_explained(folder),
            BackgroundWriter[int](summary.add_written, depth=_MAX_WAITING_WRITES) as background,
        ):
            run = _Run(model, options, save_dtype, writer, manifest, summary, bar, background, interrupted)
            everything = run.with_frames(pending, clips)
            run.extract_to_disk(run.extract_stream(everything, batch_size=batch_size, workers=workers))
            run.submit(writer.finish)
        if target.name == PARQUET:
            names = {image: path.as_posix() for image, path in images}
            rows = failed_rows(summary, names)
            write_failed_images(folder, names.values(), rows, rank=share.rank, dtype=dtype, overwrite=overwrite)
        if interrupted():
            raise KeyboardInterrupt
    return summary


@dataclass(frozen=True)
class _Run:
    """The parts of a run, while it lasts."""

    model: BrixelFeatures
    options: Mapping[str, Any]
    save_dtype: torch.dtype | None
    writer: MapWriter
    manifest: Manifest
    summary: ExtractionSummary
    bar: ProgressBar
    background: BackgroundWriter[int]
    interrupted: Callable[[], bool]

    def with_frames(self, stills: Sequence[PendingImage], clips: Sequence[Clip]) -> Iterator[PendingImage]:
        """The images, then the frames of one video after the other, decoded when they are asked for."""
        yield from stills
        for clip in clips:
            yield from clip.pending(self.submit)

    def extract_stream(self, pending: Iterable[PendingImage], *, batch_size: int, workers: int) -> list[PendingImage]:
        """Extract images and submit their maps; returns those too large for memory that a `.npy` file can take."""
        waiting: deque[PendingImage] = deque()  # handed to the stream, without a result yet
        too_large = []
        is_whole = self.options.get("reduce") is None and self.save_dtype in (None, self.model.dtype)
        to_disk = self.writer.supports_memmap and is_whole

        def images() -> Iterator[Path | Frame]:
            for each in pending:
                waiting.append(each)
                yield each.image

        for result in self.model.stream_all(images(), batch_size=batch_size, workers=workers, **self.options):
            each = waiting.popleft()
            # a frame is gone when its video has been read on
            if to_disk and isinstance(result, MemoryLimitError) and not isinstance(each.image, Frame):
                too_large.append(each)
                continue
            self.bar.add()
            if not isinstance(result, Exception):
                try:
                    result = convert(result, self.save_dtype, picture=each.path.name)  # the key of version 0.1
                except BrixelError as error:
                    result = error
            if isinstance(result, Exception):
                self.summary.add_failure(each.path, result)
            else:
                self.submit(partial(self.writer.add, each.source, result))
            if self.interrupted():
                break
        return too_large

    def extract_to_disk(self, too_large: Sequence[PendingImage]) -> None:
        """Compute maps straight into their files, one by one, when no other map is in memory."""
        for each in too_large:
            if self.interrupted():
                return
            assert isinstance(self.writer, FileWriter)
            try:
                self.model.extract(each.image, out=self.writer.prepare_path(each.source), **self.options)
            except BrixelError as error:
                self.summary.add_failure(each.path, error)
            else:
                self.submit(partial(self.writer.sync, each.source))
            self.bar.add()

    def submit(self, write: Callable[[], WrittenFile | None]) -> None:
        """Write in the background, and list the file that results in the manifest."""

        def write_and_list() -> int:
            written = write()
            if written is None:
                return 0
            self.manifest.add(written)
            return len(written.images)

        self.background.submit(write_and_list)


def check_none_exists(paths: Sequence[Path]) -> None:
    """Raise BrixelError where a first run would write over a file."""
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None:
        raise BrixelError(
            f"{existing} exists and is in no manifest, so it may not be a map: give another output folder, "
            "or --overwrite"
        )


def manifest_settings(
    model: BrixelFeatures, short_side_px: int | str | None, kind: str, save_dtype: torch.dtype | None, tiles: str
) -> Mapping[str, str]:
    """Everything but the images that the maps depend on, as version 0.1 wrote it into manifests."""
    return {
        "backbone": f"{model.config.backbone.title} {model.config.backbone.fingerprint[:4]}",
        "weights": digest(model.upsampler.children()),
        "short_side_px": str(model.config.adapter.short_side_px if short_side_px is None else short_side_px),
        "dtype": dtype_name(model.dtype),
        "saved as": f"{kind}, {dtype_name(save_dtype or model.dtype)}",
        "tiles": tiles,
        **({} if model.scale == UPSCALE else {"scale": str(model.scale)}),
    }


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Raise BrixelError, which says what to do, where a folder cannot be written into."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise BrixelError(
            f"cannot write into {folder} ({error}); the maps that were finished are kept: free some space, and start "
            "the same command again"
        ) from error


@contextmanager
def finish_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the first Ctrl-C came; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        _LOG.warning("interrupted: the maps in progress are finished and kept; interrupt again to stop at once")
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)
