"""Feature maps by Ray Data: an actor for `map_batches`, and folders or object stores of images into a folder of maps.

Ray gives out blocks of images to actors, starts actors again that died, and gives their blocks to others. Where the
maps lie is our part: the actor that computed a block writes its maps and leaves a record (`blocks.py`), and the driver
lists them in the manifest. Features never travel between processes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.distributed.actors import BlockActor, FeatureActor, Model, Reduction, load_model
from brixel.distributed.cluster import connected, on_an_actor, own_errors, pool_size, total
from brixel.distributed.driver import ExtractionRun
from brixel.distributed.sources import PARQUET_SUFFIXES, TAR_SUFFIXES, PathLike, StreamedSource, is_uri, list_objects
from brixel.errors import BrixelError, MissingFileError
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.extract import manifest_settings
from brixel.extraction.fitted_reduction import fitted_reduction
from brixel.extraction.manifest import Manifest
from brixel.extraction.pending_images import ExtractionSummary
from brixel.extraction.sinks import DEFAULT_ENDING, Sink
from brixel.feature_maps.reduction.reduce import REDUCE_KEY, Reduce
from brixel.images.find_images import FoundImages, find_images
from brixel.utils.fields import Rule, check_field, number, optional, path_like, whole_number
from brixel.utils.memory import parse_bytes

__all__ = ["FeatureActor", "extract_dataset"]


def __dir__() -> list[str]:
    return sorted(__all__)


_COUNT = Rule("a positive whole number", whole_number(1).convert)
_TASKS_PER_ACTOR = 2  # one runs, one waits


def extract_dataset(
    source: PathLike | Sequence[PathLike] | Any,
    folder: PathLike,
    *,
    model: Model,
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
    reduce: Reduction | str | None = None,
    address: str | None = None,
    actors: int | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float | None = None,
    block_images: int = 64,
    bytes_column: str | None = None,
    name_column: str | None = None,
) -> ExtractionSummary:
    """Extract the dense map of every image on a cluster, into what :func:`brixel.extraction.extract_files` writes.

    The same call continues a run that was stopped, and so does `extract_files` (`docs/clusters.md`).

    Args:
        source: Images and folders of images; URIs of object stores, such as "s3://bucket/photos"; Parquet files or
            webdataset tars; or a ``ray.data.Dataset`` with the columns ``image`` (or ``path``) and ``bytes``.
        folder: The output folder, on storage that all machines share under this path.
        model: As in :class:`FeatureActor`; loaded once in each actor.
        sink, ending, shard_bytes, save_dtype, overwrite, batch_size, workers, scale, short_side_px, tiles: As in
            :func:`brixel.extraction.extract_files`.
        memory_limit: As there, for each actor.
        reduce: What becomes of every map before it is stored: as in :func:`brixel.extraction.extract_files`, but with
            the basis fitted before (`brixel extract --fit-only`); or a function of your own from map to map.
        address: The cluster, as ``ray.init`` takes it; by default that of RAY_ADDRESS or of this
            machine, or else a new one on this machine.
        actors: How many actors; None for as many as the cluster has room for.
        cpus_per_actor: CPU cores that an actor takes; on the CPU torch computes with as many threads.
        gpus_per_actor: GPUs that an actor takes, also a fraction; None for one where the cluster has GPUs, or else 0.
        block_images: Images that are given out at a time: what a lost actor computes again at most.
        bytes_column, name_column: In Parquet files, the columns of the images' bytes and names; by default found.

    Returns:
        How many maps were written and skipped, and the images that failed.

    Raises:
        BrixelError: As `extract_files`; Ray is not installed; or the source or the model cannot be read.
    """
    target = Sink.choose(sink, ending, shard_bytes)
    check_field("block_images", block_images, _COUNT)
    check_field("actors", actors, optional(_COUNT))
    check_field("cpus_per_actor", cpus_per_actor, number(above=0))
    check_field("gpus_per_actor", gpus_per_actor, optional(number(0)))
    out = _shared_folder(folder)
    options: dict[str, Any] = {
        "scale": scale,
        "short_side_px": short_side_px,
        "memory_limit": memory_limit,
        "tiles": tiles,
    }
    found = _find(source, bytes_column, name_column)
    with connected(address) as ray:
        gpus = (1.0 if total(ray, "GPU") else 0.0) if gpus_per_actor is None else gpus_per_actor
        resources: dict[str, Any] = {"num_cpus": cpus_per_actor, "num_gpus": gpus}
        if memory_limit is not None and not gpus:
            resources["memory"] = parse_bytes(memory_limit)
        of_run: dict[str, Any] = {"short_side_px": short_side_px, "kind": target.kind, "tiles": tiles}
        describe = partial(manifest_settings, save_dtype=save_dtype, **of_run)
        with own_errors(ray):
            described = partial(_describe, model, scale, target, save_dtype, reduce, out, overwrite, describe)
            settings, dtype, reduce = on_an_actor(ray, resources, described) if gpus else described()
        size = pool_size(ray, actors, resources, is_streamed=not isinstance(found, list))
        options |= {"save_dtype": save_dtype, "batch_size": batch_size, "workers": workers, "reduce": reduce}
        options |= {"threads": max(1, int(cpus_per_actor))}
        summary = ExtractionSummary(left_out=found.left_out if isinstance(found, FoundImages) else {})
        with Manifest(out, settings, ProcessShare(), overwrite=overwrite) as manifest:
            run = ExtractionRun(ray, out, target, manifest, summary, dtype, overwrite)
            dataset, finished = run.begin(found, block_images)
            if isinstance(found, list) and dataset is not None:
                size = min(size, dataset.num_blocks())
            if dataset is not None:
                arguments = {"model": model, "folder": out, "sink": target, "settings": settings, "finished": finished}
                blocks = dataset.map_batches(
                    BlockActor,
                    fn_constructor_kwargs={**arguments, **options},
                    batch_size=block_images,
                    batch_format="numpy",
                    compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=_TASKS_PER_ACTOR),
                    **resources,
                )
                with own_errors(ray):
                    run.list_blocks(blocks)
            run.finish()
    return summary


def _describe(
    model: Model,
    scale: int | None,
    sink: Sink,
    save_dtype: torch.dtype | None,
    reduce: Reduction | str | None,
    folder: Path,
    overwrite: bool,
    settings: Callable[[BrixelFeatures], Mapping[str, str]],
) -> tuple[Mapping[str, str], torch.dtype, Reduction | None]:
    """The settings of a run, the dtype of its maps and the fitted reduction, from where the model will be."""
    loaded = load_model(model).at_scale(scale)
    of_run = settings(loaded)
    if not isinstance(reduce, (str, Reduce)):
        name = {} if reduce is None else {REDUCE_KEY: getattr(reduce, "__qualname__", None) or str(reduce)}
        return {**of_run, **name}, sink.stored_dtype(save_dtype, loaded.dtype), reduce
    fitted = fitted_reduction(folder, sink.checked_reduction(reduce, save_dtype), loaded, overwrite=overwrite)
    dtype = sink.stored_dtype(save_dtype, loaded.dtype, fitted)
    return {**of_run, REDUCE_KEY: fitted.identity}, dtype, fitted


def _find(source: Any, bytes_column: str | None, name_column: str | None) -> Any:
    """Pairs of a path and a relative path or a SourceImage; a StreamedSource; or the dataset as it is."""
    if hasattr(source, "map_batches"):
        return source
    paths: list[PathLike] = [source] if isinstance(source, str | Path) else list(source)
    if not paths:
        raise BrixelError("no images: give files, folders, or URIs of object stores")
    for suffixes in (PARQUET_SUFFIXES, TAR_SUFFIXES):
        matching = [str(path) for path in paths if str(path).endswith(suffixes)]
        if len(matching) == len(paths):
            _check_exist(matching)
            return StreamedSource(tuple(matching), bytes_column, name_column)
        if matching:
            raise BrixelError(f"{matching[0]} is given with paths of other kinds: extract them separately")
    if bytes_column is not None or name_column is not None:
        raise BrixelError("bytes_column= and name_column= go with Parquet files")
    uris = [path for path in paths if is_uri(path)]
    if not uris:
        return find_images([Path(path) for path in paths])
    if len(uris) < len(paths):
        raise BrixelError(f"{uris[0]} beside local paths: extract them separately")
    listed = [pair for uri in uris for pair in list_objects(str(uri))]
    names = [image.relative_path for _, image in listed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BrixelError(f"two objects would be written as {twice}; extract them separately")
    return listed


def _check_exist(paths: Sequence[str]) -> None:
    for path in paths:
        if not is_uri(path) and not Path(path).is_file():
            raise MissingFileError(f"no file at {path}", path)


def _shared_folder(folder: PathLike) -> Path:
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder)):  # also a URI that became a path, and lost a slash
        raise BrixelError(
            f"{folder} is no folder: maps are written into a folder that all machines share, such as a network file "
            "system or a mounted bucket"
        )
    return Path(check_field("folder", folder, path_like())).absolute()
