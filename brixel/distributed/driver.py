"""The driver's part of a run on a cluster: what is left to do, and what is finished, in the manifest."""

from pathlib import Path
from typing import Any

import torch

from brixel.distributed.blocks import FinishedBlock, forget_block, list_recorded_blocks, remove_records
from brixel.distributed.sources import PathLike, StreamedSource, listed_dataset
from brixel.errors import ImageError
from brixel.extraction.extract import check_none_exists
from brixel.extraction.failed_images import failed_rows, write_failed_images
from brixel.extraction.manifest import Manifest, SourceImage, latest_by_image, read_manifests
from brixel.extraction.pending_images import ExtractionSummary, finished_images, pending_images, remove_unlisted_parts
from brixel.extraction.sinks import PARQUET, Sink
from brixel.extraction.writers import FileWriter
from brixel.feature_maps.containers.parquet import FailedImage
from brixel.utils.progress import progress_bar


class ExtractionRun:
    """The driver's part of a run: what is left to do, and the manifest."""

    def __init__(
        self,
        ray: Any,
        folder: Path,
        sink: Sink,
        manifest: Manifest,
        summary: ExtractionSummary,
        dtype: torch.dtype,
        overwrite: bool,
    ) -> None:
        self._ray, self._folder, self._sink, self._manifest = ray, folder, sink, manifest
        self._summary, self._dtype, self._overwrite = summary, dtype, overwrite
        self._failures: list[FailedImage] = []
        self._tried: set[str] = set()
        self._paths: dict[str, Path] = {}  # of local images, by their relative path
        self._files: dict[str, str] = {}  # by the image whose map was written into it in this run
        self._total: int | None = None

    def begin(self, found: Any, block_images: int) -> tuple[Any, Any]:
        """A dataset of what is left to do, and a reference to what is finished, where the actors must leave it out."""
        if self._overwrite or self._manifest.is_new:
            remove_records(self._folder)
        else:
            list_recorded_blocks(self._folder, self._manifest)
        remove_unlisted_parts(self._manifest)
        if not isinstance(found, list):
            self._manifest.begin()
            finished = self._ray.put(finished_images(self._manifest)) if self._manifest.written else None
            return (found.dataset() if isinstance(found, StreamedSource) else found), finished
        writer = self._sink.writer(self._folder, "0")
        pending = self._pending(found, writer)
        if isinstance(writer, FileWriter) and self._manifest.is_new and not self._overwrite:
            check_none_exists([writer.path(source.relative_path) for _, source in pending])
        self._manifest.begin()
        self._total = len(found)
        return (listed_dataset(pending, block_images) if pending else None), None

    def _pending(self, found: list[Any], writer: Any) -> list[tuple[PathLike, SourceImage]]:
        """What is left of a listed source, of local files or of objects with what they are."""
        if all(isinstance(image, SourceImage) for _, image in found):
            return self._pending_objects(found)
        self._paths = {relative.as_posix(): path for path, relative in found}
        self._tried = set(self._paths)
        pending = pending_images(found, self._manifest, writer, self._summary)
        names = {path: name for name, path in self._paths.items()}
        self._failures += failed_rows(self._summary, names)
        return [(each.path, each.source) for each in pending]

    def _pending_objects(self, found: list[tuple[str, SourceImage]]) -> list[tuple[PathLike, SourceImage]]:
        self._tried = {image.relative_path for _, image in found}
        entries, in_place = latest_by_image(self._manifest.written), finished_images(self._manifest)
        done = {image for image, _ in entries.values() if (image.relative_path, image.size_bytes) in in_place}
        left: list[tuple[PathLike, SourceImage]] = [(uri, image) for uri, image in found if image not in done]
        self._summary.skipped += len(found) - len(left)
        return left

    def list_blocks(self, blocks: Any) -> None:
        """Compute, and list every block in the manifest as soon as it is finished."""
        with progress_bar(total=self._total, initial=self._summary.skipped, unit="image") as bar:
            for table in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in table.to_pylist():
                    self._summary.skipped += row["skipped"]
                    block = FinishedBlock.from_json(row["name"], row["block"], self._folder)
                    self._list_block(block)
                    bar.update(sum(len(file.images) for file in block.files) + len(block.failures))

    def _list_block(self, block: FinishedBlock) -> None:
        for file in block.files:
            names = [image.relative_path for image in file.images]
            twice = [name for name in names if self._files.setdefault(name, file.file) != file.file]
            for name in twice:
                self._fail(name, f"{name}: another image has that name")
            self._manifest.add(file)
            self._tried.update(names)
            self._summary.add_written(len(file.images) - len(twice))
        for image, error in block.failures.items():
            self._fail(image, error)
        forget_block(self._folder, block.name)

    def _fail(self, image: str, error: str) -> None:
        self._tried.add(image)
        self._failures.append(FailedImage(image, error))
        self._summary.add_failure(self._paths.get(image, Path(image)), ImageError(error))

    def finish(self) -> None:
        """Remove what no longer counts, and write the rows of images that failed."""
        remove_records(self._folder)
        self._manifest.written = read_manifests(self._folder)
        remove_unlisted_parts(self._manifest)
        if self._sink.name == PARQUET:
            options: dict[str, Any] = {"rank": 0, "dtype": self._dtype, "overwrite": self._overwrite}
            write_failed_images(self._folder, self._tried, self._failures, **options)
