"""What runs on the machines of a cluster: actors that load the model once, and compute batches of images."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from brixel.brixel_features import BrixelFeatures
from brixel.distributed.blocks import (
    FinishedBlock,
    block_name,
    find_block,
    record_block,
)
from brixel.distributed.sources import (
    PathLike,
    import_ray,
    is_uri,
    read_object,
)
from brixel.errors import BrixelError, ImageError
from brixel.extraction.background_writer import BackgroundWriter
from brixel.extraction.extract import disk_errors_explained
from brixel.extraction.failed_images import printable_name
from brixel.extraction.manifest import SourceImage, WrittenFile
from brixel.extraction.sinks import PARQUET, Sink
from brixel.extraction.writers import convert, stored_map
from brixel.feature_maps.containers.base import StoredMap
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.containers.parquet import FailedImage, maps_table
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.feature_table import FeatureTable
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.images.decode import ImageFile
from brixel.images.load import ImageInput
from brixel.utils.contained_paths import path_below
from brixel.utils.devices import DTYPES
from brixel.utils.fields import short_repr

Model = PathLike | Callable[[], BrixelFeatures]
"""What names a model on every machine: what `from_pretrained` takes, or a function that can be pickled."""

Reduction = Reduce | Callable[[FeatureMap], FeatureMap]
"""What becomes of a map before it is stored; can be pickled."""

_MAX_WAITING_WRITES = 2


class FeatureActor:
    """Computes the maps of images in a batch; for ``Dataset.map_batches``, which loads the model once in each actor.

    A batch has the column ``bytes``, the content of image files, and ``path`` or ``image``, their names, as
    ``ray.data.read_binary_files(..., include_paths=True)`` gives them. Without ``bytes``, ``path`` names local files.
    The result is an Arrow table as the sink "parquet" writes it: a row per image in the same order, with ``error`` in
    place of a map where the image cannot be used (`docs/clusters.md`).

    Args:
        model: A folder, a repository or a name as :meth:`brixel.BrixelFeatures.from_pretrained` takes it, or a function
            that returns a model and can be pickled.
        save_dtype: Dtype of the features; None for the model's.
        batch_size: Images of one size that the model computes at once.
        workers: Threads that decode images ahead; 0 for none.
        threads: Threads that torch computes with on the CPU; None for its own choice.
        reduce: What becomes of every map before it is stored: a fitted :class:`brixel.Reduce`, or a function of your
            own from map to map.
        scale, short_side_px, memory_limit, tiles: As in :meth:`brixel.BrixelFeatures.extract`. The memory limit is that
            of one actor.

    Raises:
        BrixelError: As ``from_pretrained`` does.
    """

    def __init__(
        self,
        model: Model,
        *,
        save_dtype: torch.dtype | str | None = None,
        batch_size: int = 1,
        workers: int = 2,
        threads: int | None = None,
        reduce: Reduction | None = None,
        scale: int | None = None,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(model).at_scale(scale)
        self.save_dtype = DTYPES[save_dtype] if isinstance(save_dtype, str) else save_dtype
        self._reduce = reduce
        self._stream_options: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
        self._stream_options |= {"short_side_px": short_side_px, "memory_limit": memory_limit, "tiles": tiles}

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """The rows of a batch's images."""
        reduce = self._reduce if isinstance(self._reduce, Reduce) else None
        dtype = Sink(PARQUET).stored_dtype(self.save_dtype, self.model.dtype, reduce)
        rows: list[StoredMap | FailedImage] = []
        for name, result in self.results(batch):
            if isinstance(result, Exception):
                rows.append(FailedImage(printable_name(name), str(result)))
            else:
                rows.append(stored_map(name, result, CONTAINERS[PARQUET]))
        return maps_table(rows, dtype)

    def results(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, FeatureMap | FeatureTable | Exception]]:
        """The name of every image with its map, or with what is wrong."""
        images = _images_of(batch)
        usable = [image for _, image in images if not isinstance(image, Exception)]
        maps = iter(self.model.stream_all(usable, **self._stream_options))
        for name, image in images:
            yield name, image if isinstance(image, Exception) else self._finish(image, next(maps))

    def _finish(self, image: ImageInput, result: FeatureMap | Exception) -> FeatureMap | FeatureTable | Exception:
        if isinstance(result, Exception):
            return result
        try:
            reduced = result if self._reduce is None else self._reduce(result)
            name = PurePosixPath(os.fspath(image)).name  # type: ignore[arg-type]
            return convert(reduced, self.save_dtype, picture=name)
        except BrixelError as error:
            return error


class BlockActor(FeatureActor):
    """Computes a block of images and writes their maps into an output folder.

    Args:
        model: As in :class:`FeatureActor`.
        folder: The output folder, on storage that all machines share.
        sink: The kind of output.
        settings: Of the run, as in its manifest.
        finished: A reference to names and sizes of images that are finished, of sources that are not listed before.
        options: As in :class:`FeatureActor`.
    """

    def __init__(
        self, model: Model, folder: Path, sink: Sink, settings: Mapping[str, str], finished: Any, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._sink, limit = sink.split_memory(options["memory_limit"], self.model.device)
        self._stream_options["memory_limit"] = limit
        self._folder, self._settings = folder, settings
        self._finished = frozenset() if finished is None else import_ray().get(finished)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the block: its name, what :meth:`FinishedBlock.to_json` says, and how many images it left out."""
        sources = _sources_of(batch)
        done = self._finished
        left = np.array([(each.relative_path, each.size_bytes) not in done for each in sources], dtype=bool)
        batch = {name: column[left] for name, column in batch.items()}
        sources = [source for source, is_left in zip(sources, left, strict=True) if is_left]
        name = block_name(self._settings, sources)
        block = find_block(self._folder, name)
        if block is None:
            with disk_errors_explained(self._folder):
                block = self._compute(name, sources, batch)
                record_block(self._folder, block)
        return {"name": [name], "block": [block.to_json()], "skipped": [len(left) - len(sources)]}

    def _compute(self, name: str, sources: Sequence[SourceImage], batch: Mapping[str, Any]) -> FinishedBlock:
        writer = self._sink.writer(self._folder, name)
        files: list[WrittenFile | None] = []
        failures: dict[str, str] = {}
        seen: set[str] = set()
        with BackgroundWriter[WrittenFile | None](files.append, depth=_MAX_WAITING_WRITES) as background:
            for source, (image, result) in zip(sources, self.results(batch), strict=True):
                try:
                    if isinstance(result, Exception):
                        raise result
                    if image in seen:
                        raise BrixelError(f"{image}: another image has that name")
                    path_below(self._folder, image, "the source")
                    writer.check_name(image)
                except BrixelError as error:
                    failures[printable_name(image)] = str(error)
                    continue
                seen.add(image)
                background.submit(partial(writer.add, source, result))
            background.submit(writer.finish)
        return FinishedBlock(name, tuple(file for file in files if file is not None), failures)


def load_model(model: Model) -> BrixelFeatures:
    """The model that a name or a function stands for."""
    if isinstance(model, str | Path):
        return BrixelFeatures.from_pretrained(model)
    if isinstance(model, torch.nn.Module) or not callable(model):
        raise BrixelError(
            f"model is a {type(model).__name__}, and every machine loads its own: give the folder that "
            "save_pretrained wrote, a name, or a function that returns the model"
        )
    return model()


def _images_of(batch: Mapping[str, Any]) -> list[tuple[str, ImageInput | Exception]]:
    """Names and images of a batch; an error in place of an image that could not be read."""
    if "image" not in batch and "path" not in batch:
        raise BrixelError(f"a batch has the columns {', '.join(batch)}; expected 'image' or 'path', and 'bytes'")
    names = [str(name) for name in batch["image" if "image" in batch else "path"]]
    if "bytes" not in batch:
        return [(name, _image_at(str(path))) for name, path in zip(names, batch["path"], strict=True)]
    errors = batch.get("error", [None] * len(names))
    return [
        (name, ImageError(str(error)) if error else ImageFile(name, partial(_content, content, name)))
        for name, content, error in zip(names, batch["bytes"], errors, strict=True)
    ]


def _image_at(path: str) -> ImageInput:
    return ImageFile(path, partial(read_object, path)) if is_uri(path) else Path(path)


def _content(content: object, name: str) -> bytes:
    if not isinstance(content, bytes):
        raise ImageError(f"{name}: its bytes are {short_repr(content)}; expected the content of an image file")
    return content


def _sources_of(batch: Mapping[str, Any]) -> list[SourceImage]:
    names = [str(name) for name in batch["image" if "image" in batch else "path"]]
    if "size_bytes" in batch:
        return [
            SourceImage(name, int(size_bytes), int(mtime_ns))
            for name, size_bytes, mtime_ns in zip(names, batch["size_bytes"], batch["mtime_ns"], strict=True)
        ]
    return [SourceImage(name, len(content or b""), 0) for name, content in zip(names, batch["bytes"], strict=True)]
