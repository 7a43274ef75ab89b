"""Features of folders into files: decoded ahead, written behind, noted when safe, taken up where a run stopped."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from brixel.ahead import Behind
from brixel.config import digest
from brixel.devices import dtype_name
from brixel.errors import BrixelError
from brixel.extraction.manifest import Manifest, Source, Written
from brixel.extraction.outputs import Files, Output, Shards, converted, size_of
from brixel.extraction.progress import Progress
from brixel.extraction.share import Share
from brixel.feature_map import FeatureMap
from brixel.features import BrixelFeatures

_LOG = logging.getLogger("brixel")
_WRITES_BEHIND = 2  # maps that may wait to be written


@dataclass
class Report:
    """What became of the pictures of this process."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[Path, Exception]] = field(default_factory=list)


def extract_files(
    model: BrixelFeatures,
    pictures: Sequence[tuple[Path, Path]],
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
) -> Report:
    """Write the map of every picture to ``folder / place + ending``; pictures and places as `find_pictures` gives them.

    ``shard_bytes``: into shards of that size instead, read by :class:`MapFolder`. ``save_dtype``: of what is written.
    What the folder's manifest says is finished, and whose picture has not changed, is skipped unless ``overwrite``; a
    picture that cannot be used is listed. Under `torchrun` every process takes its share. Interrupted once, it finishes
    what is in hand and raises KeyboardInterrupt. All others: as in :meth:`brixel.BrixelFeatures.stream`.
    Raises BrixelError where the folder cannot be written to, is another run's, or holds maps of other settings.
    """
    _check(ending, shard_bytes, save_dtype)
    share, kind = Share.of_environment(), ending if shard_bytes is None else "shards"
    settings = _settings(model, short_side_px, kind, save_dtype, tiles)
    report, own = Report(), [each for each in pictures if share.holds(each[1].as_posix())]
    with Manifest(folder, settings, share, overwrite=overwrite) as manifest, _stopping() as asked:
        output: Output = (
            Files(folder, ending) if shard_bytes is None else Shards(folder, shard_bytes, share.rank, manifest.written)
        )
        todo = _todo(own, manifest, folder, report)
        if isinstance(output, Files) and not manifest.written and not overwrite:
            _check_free([output.path(source.picture) for _, source in todo])
        results = model.stream_all(
            (picture for picture, _ in todo),
            batch_size=batch_size,
            short_side_px=short_side_px,
            memory_limit=memory_limit,
            tiles=tiles,
            workers=workers,
        )
        bar = Progress(len(pictures), report.skipped, manifest.path, share)
        behind = Behind[int](lambda count: _count(report, bar, count), depth=_WRITES_BEHIND)
        with bar, _explained(folder), behind as writer:
            for (picture, source), result in zip(todo, results, strict=False):
                made = _converted(result, save_dtype, picture)
                if isinstance(made, Exception):
                    report.failures.append((picture, made))
                    bar.add(1)
                else:
                    writer.do(partial(_note, manifest, partial(output.add, source, made)))
                if asked():
                    break
            writer.do(partial(_note, manifest, output.finish))
        if asked():
            raise KeyboardInterrupt
    return report


def _converted(result: FeatureMap | Exception, save_dtype: torch.dtype | None, picture: Path) -> FeatureMap | Exception:
    """The map as it is saved, or why there is none."""
    if isinstance(result, Exception):
        return result
    try:
        return converted(result, save_dtype, picture=picture.name)
    except BrixelError as error:
        return error


def _note(manifest: Manifest, write: Callable[[], Written | None]) -> int:
    """Write, and note the file, if one was written; how many maps are in it."""
    written = write()
    if written is None:
        return 0
    manifest.add(written)
    return len(written.pictures)


def _count(report: Report, bar: Progress, count: int) -> None:
    report.written += count
    bar.add(count)


def _check(ending: str, shard_bytes: int | None, save_dtype: torch.dtype | None) -> None:
    if shard_bytes is not None and (shard_bytes < 1 or ending != ".safetensors"):
        raise BrixelError(f"shards of {shard_bytes} bytes as {ending}: expected a positive size, and safetensors")
    if ending == ".npy" and save_dtype == torch.bfloat16:
        raise BrixelError("npy knows no bfloat16: write safetensors, or save as float16 or float32")


def _settings(
    model: BrixelFeatures, short_side_px: int | str | None, kind: str, save_dtype: torch.dtype | None, tiles: str
) -> Mapping[str, str]:
    """All that the maps depend on, beside the pictures."""
    return {
        "backbone": f"{model.config.backbone.title} {model.config.backbone.fingerprint[:4]}",
        "weights": digest((model.adapter, model.head)),
        "short_side_px": str(model.config.adapter.short_side_px if short_side_px is None else short_side_px),
        "dtype": dtype_name(model.dtype),
        "saved as": f"{kind}, {dtype_name(save_dtype or model.dtype)}",
        "tiles": tiles,
    }


def _todo(
    own: Sequence[tuple[Path, Path]], manifest: Manifest, folder: Path, report: Report
) -> list[tuple[Path, Source]]:
    """The pictures whose maps are not finished, as they are now; those that are gone are listed."""
    finished = {source for each in manifest.written if _is_there(folder, each) for source in each.pictures}
    todo = []
    for picture, place in own:
        try:
            facts = picture.stat()
        except OSError as error:
            report.failures.append((picture, error))
            continue
        source = Source(place.as_posix(), facts.st_size, facts.st_mtime_ns)
        if source in finished:
            report.skipped += 1
        else:
            todo.append((picture, source))
    return todo


def _is_there(folder: Path, written: Written) -> bool:
    """Whether a file is still there, whole; `verify` is for what is in it."""
    try:
        return size_of(folder / written.file) == written.bytes
    except OSError:
        return False


def _check_free(paths: Sequence[Path]) -> None:
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None:
        raise BrixelError(
            f"{taken} exists and is in no manifest, so that it may be something else: give another output folder, "
            "or --overwrite"
        )


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
