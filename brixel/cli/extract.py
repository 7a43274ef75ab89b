"""`brixel extract`: the dense maps of many images, written into a folder."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from brixel.brixel_features import BrixelFeatures
from brixel.cli.extract_raster import add_raster_options, any_raster_flag, extract_raster, is_raster
from brixel.cli.options import (
    add_flag,
    add_frame_options,
    add_map_options,
    add_model_options,
    add_output,
    amount,
    command,
    deprecated,
    given,
    load,
    loader,
    positive,
    print_json,
    shard_size,
)
from brixel.distributed.ray import extract_dataset
from brixel.errors import BrixelError, printable
from brixel.extraction import ExtractionSummary, extract_files
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.fitted_reduction import SAMPLE, fit_reduction
from brixel.extraction.map_folder import missing_maps, verify
from brixel.extraction.sinks import FILES, SINKS, Sink
from brixel.extraction.writers import convert
from brixel.feature_maps.storage import check_writable
from brixel.images.find_images import FoundImages, describe_left_out, find_images
from brixel.utils.atomic_files import check_output_folder
from brixel.utils.devices import DTYPES
from brixel.utils.processes import own_device
from brixel.video.frames import VIDEO_SUFFIXES, is_video

_ENDINGS = (".safetensors", ".npy")
_LOG = logging.getLogger("brixel")
_OF_MAPS = ("scale", "short_side_px", "memory_limit", "tiles")
_OF_RAY = {  # arguments of `extract_dataset` by the name of their flag
    "address": "ray_address",
    **{name: name for name in ("actors", "cpus_per_actor", "gpus_per_actor", "block_images")},
    **{name: name for name in ("bytes_column", "name_column")},
}


def add(commands: Any) -> None:
    """Add the command."""
    text = "write the dense map of every image into a folder; a second run continues where the first stopped"
    parser = command(commands, "extract", _extract, text, "brixel extract photos -o maps")
    text = "images, videos, and folders of images; with --engine ray also URIs, Parquet files and webdataset tars"
    parser.add_argument("paths", nargs="*", type=_path_or_uri, metavar="PATH", help=text)
    note = f"for one image also a file that ends in {' or '.join(_ENDINGS)}"
    add_output(parser, required=True, metavar="FOLDER", note=note)
    formats = [ending[1:] for ending in _ENDINGS]
    add_flag(parser, "--format", choices=formats, help="file format", usual=f"{formats[0]}, or the ending of the file")
    text = "a file for each image (files), or files of many maps: shards (safetensors), parquet, zarr, webdataset"
    add_flag(parser, "--sink", choices=SINKS, help=text, usual="files; with --shard-size, shards")
    text = "size of the files of many maps, such as 1GiB"
    add_flag(parser, "--shard-size", type=shard_size, metavar="SIZE", help=text, usual="256MiB, where there are any")
    deprecated(parser, "--shard-gib", "--shard-size", type=lambda text: shard_size(f"{text}GiB"))
    dtypes = ("float32", "float16", "bfloat16")
    add_flag(
        parser, "--save-dtype", choices=dtypes, help="dtype of the maps that are written", usual="that of the model"
    )
    add_flag(parser, "--batch-size", default=1)
    add_flag(parser, "--workers", default=2)
    add_flag(parser, "--reduce")
    text = "with pca: fit its basis to this many of the images; the basis is kept in FOLDER"
    add_flag(parser, "--reduce-sample", type=positive, default=SAMPLE, metavar="N", help=text)
    text = "with --reduce pca: only fit the basis and keep it in FOLDER, before several processes extract"
    parser.add_argument("--fit-only", action="store_true", help=text)
    text = "compile the model with torch.compile first, for a minute or more; on GPUs; not with --memory-limit"
    parser.add_argument("--compile", action="store_true", help=text)
    add_flag(parser, "--overwrite", note="every map is computed again")
    _add_ray(parser)
    text = "compute nothing: compare the files in FOLDER with its manifest, and the images at PATH with their maps"
    parser.add_argument("--verify", action="store_true", help=text)
    add_flag(parser, "--json")
    add_frame_options(parser)
    add_model_options(parser)
    add_map_options(parser)
    add_raster_options(parser)


def _extract(options: argparse.Namespace) -> int:
    if options.verify:
        return _verify(options)
    if options.compile and options.memory_limit is not None:
        raise BrixelError("--compile does not go with --memory-limit: what compiled code allocates is not known before")
    if not options.paths:
        raise BrixelError("no PATH: give images, or folders of images; only --verify needs none")
    if options.fit_only and (options.reduce is None or options.overwrite):
        raise BrixelError("--fit-only goes with --reduce, such as --reduce pca:32,int8, and without --overwrite")
    options.save_dtype = None if options.save_dtype is None else DTYPES[options.save_dtype]
    if options.engine == "ray" and not options.fit_only:
        return _extract_with_ray(options)
    if of_ray := [f"--{name.replace('_', '-')}" for name in _OF_RAY.values() if getattr(options, name) is not None]:
        raise BrixelError(f"{', '.join(of_ray)} without --engine ray")
    if uri := next((path for path in options.paths if isinstance(path, str)), None):
        raise BrixelError(f"{uri} is on another machine: --engine ray reads object stores; or download it first")
    if is_raster(options):
        return extract_raster(options, _model)
    images = _find(options)
    if options.output.suffix in _ENDINGS and not options.output.is_dir():
        return _extract_one(options)
    if _is_one_image(options.paths) and options.output.suffix and not options.output.exists():
        endings = " or ".join(_ENDINGS)
        raise BrixelError(
            f"{options.output} looks like the name of a file, and a map is a file that ends in {endings}; give such a "
            "name, or that of a folder"
        )
    check_output_folder(options.output)
    options.device = own_device(options.device)
    if options.fit_only:
        return _fit(options, images)
    summary = extract_files(
        _model(options),
        images,
        options.output,
        **_of_run(options),
        **given(options, "reduce_sample", "fps", "every"),
    )
    return _report(options, summary, ProcessShare.from_environment())


def _add_ray(parser: argparse.ArgumentParser) -> None:
    """Where the maps are computed, and on what of a cluster."""
    text = "what gives out the images: the process itself (local), or Ray on a cluster (ray)"
    add_flag(parser, "--engine", choices=("local", "ray"), default="local", help=text)
    text = "with --engine ray: the cluster, as ray.init takes it"
    add_flag(
        parser,
        "--ray-address",
        metavar="ADDRESS",
        help=text,
        usual="that of RAY_ADDRESS or of this machine, or else a new one",
    )
    text = "with --engine ray: processes that hold the model"
    add_flag(parser, "--actors", type=positive, metavar="N", help=text, usual="as many as the cluster has room for")
    text = "with --engine ray: CPU cores of an actor"
    add_flag(parser, "--cpus-per-actor", type=amount, metavar="N", help=text, usual="1")
    text = "with --engine ray: GPUs of an actor, also a fraction"
    add_flag(parser, "--gpus-per-actor", type=amount, metavar="N", help=text, usual="1 where the cluster has GPUs")
    text = "with --engine ray: images that are given out at a time"
    add_flag(parser, "--block-images", type=positive, metavar="N", help=text, usual="64")
    text = "with --engine ray: in Parquet files, the column of the images' bytes"
    add_flag(parser, "--bytes-column", metavar="NAME", help=text, usual="found by its name")
    text = "with --engine ray: in Parquet files, the column of the images' names"
    add_flag(parser, "--name-column", metavar="NAME", help=text, usual="found by its name")


def _extract_with_ray(options: argparse.Namespace) -> int:
    if options.compile:
        raise BrixelError("--compile does not go with --engine ray: every actor would compile for minutes")
    if options.fps is not None or options.every is not None or any_raster_flag(options):
        raise BrixelError("flags of videos and rasters do not go with --engine ray, which reads images")
    if options.output.suffix in _ENDINGS:
        raise BrixelError(f"{options.output} looks like the name of one map; --engine ray writes into a folder")
    check_output_folder(options.output)
    of_ray = {name: getattr(options, flag) for name, flag in _OF_RAY.items() if getattr(options, flag) is not None}
    summary = extract_dataset(options.paths, options.output, model=loader(options), **of_ray, **_of_run(options))
    return _report(options, summary, ProcessShare())


def _of_run(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run, on whatever engine."""
    return {
        "ending": _ENDINGS[0] if options.format is None else f".{options.format}",
        "shard_bytes": options.shard_size,
        **given(options, "sink", "save_dtype", "overwrite", "batch_size", "workers", "reduce", *_OF_MAPS),
    }


def _report(options: argparse.Namespace, summary: ExtractionSummary, share: ProcessShare) -> int:
    if options.json:
        print_json(_facts(summary, share))
    else:
        print(_sentence(summary, share))
    return 1 if summary.failures and share.processes == 1 else 0  # torchrun would stop the other processes


def _extract_one(options: argparse.Namespace) -> int:
    """The map of one image as the file that was named."""
    path = options.output
    if not _is_one_image(options.paths):
        raise BrixelError(f"{path} is the name of one map; for several images give a folder, such as {path.stem}")
    if is_video(options.paths[0]):
        raise BrixelError(f"{path} is the name of one map; for a video, which has many, give a folder")
    if options.sink or options.shard_size is not None or options.format not in (None, path.suffix[1:]):
        raise BrixelError(f"{path} is the name of one map: --sink, --format and --shard-size go with a folder")
    check_writable(path)
    if path.exists() and not options.overwrite:
        raise BrixelError(f"{path} exists: give another name, or --overwrite")
    reduce = None
    if options.reduce is not None:
        reduce = Sink(FILES, path.suffix).checked_reduction(options.reduce, options.save_dtype)
        if not reduce.is_fitted:
            raise BrixelError(
                f"{reduce.spec} needs a basis, which is fitted to many images: extract a folder, or give the "
                "reduce.safetensors of one with --reduce"
            )
        Sink(FILES, path.suffix).stored_dtype(options.save_dtype, torch.float32, reduce)
        reduce = reduce.for_images({str(options.paths[0]): options.paths[0].name})
    feature_map = _model(options).extract(options.paths[0], **given(options, *_OF_MAPS), reduce=reduce)
    convert(feature_map, options.save_dtype, picture=options.paths[0].name).save(path)
    print_json({"written": 1, "file": str(path)}) if options.json else print(path)
    return 0


def _fit(options: argparse.Namespace, images: Sequence[tuple[Path, Path]]) -> int:
    """The basis of a reduction alone."""
    settings = given(options, "batch_size", "workers", "fps", "every", *_OF_MAPS)
    reduce = fit_reduction(_model(options), images, options.output, options.reduce, options.reduce_sample, **settings)
    basis = reduce.basis
    if basis is None:
        raise BrixelError(f"{reduce.spec} needs no basis; --fit-only is for pca")
    facts = {"reduce": reduce.spec, "basis": basis.digest, "kept_variance": basis.kept_variance}
    print_json(facts) if options.json else print(f"{reduce.identity}: {basis.kept_variance:.1%} of the variance kept")
    return 0


def _find(options: argparse.Namespace) -> FoundImages:
    """The images and videos; videos in folders only where it is said which of their frames are meant."""
    chosen = options.fps is not None or options.every is not None
    images = find_images(options.paths, also=VIDEO_SUFFIXES if chosen else ())
    if any(ending in VIDEO_SUFFIXES for ending in images.left_out):
        _LOG.warning("videos in folders are extracted with --fps or --every, and without when they are named")
    if chosen and not any(is_video(path) for path, _ in images):
        raise BrixelError("--fps and --every choose frames of videos, and none is among the paths")
    return images


def _model(options: argparse.Namespace) -> BrixelFeatures:
    model = load(options)
    if options.compile:
        model.compile()
    return model


def _path_or_uri(text: str) -> Path | str:
    """A path; a URI as it is, since a path would lose one of its slashes."""
    return text if "://" in text else Path(text)


def _is_one_image(paths: Sequence[Path]) -> bool:
    return len(paths) == 1 and not paths[0].is_dir()


def _sentence(summary: ExtractionSummary, share: ProcessShare) -> str:
    several = share.processes > 1
    process = f"process {share.rank} of {share.processes}: " if several else ""
    counts = f"{summary.written} written, {summary.skipped} already there, {len(summary.failures)} failed"
    others = f"{summary.of_others} images belong to the other processes" if several else ""
    return process + "; ".join(filter(None, (counts, others, describe_left_out(summary.left_out))))


def _facts(summary: ExtractionSummary, share: ProcessShare) -> dict[str, Any]:
    return {
        "written": summary.written,
        "already_there": summary.skipped,
        "failed": [{"image": str(image), "error": str(error)} for image, error in summary.failures],
        "left_out": dict(summary.left_out),
        "process": share.rank,
        "processes": share.processes,
        "images_of_other_processes": summary.of_others,
    }


def _verify(options: argparse.Namespace) -> int:
    images = _find(options)
    files, without_map = verify(options.output), missing_maps(options.output, images)
    if options.json:
        print_json({"files": files, "images": without_map, "images_checked": len(images)})
        return 1 if files or without_map else 0
    for problem in (*files, *without_map):
        print(printable(f"brixel: {problem}"), file=sys.stderr)
    if files:
        print(f"{len(files)} files differ from the manifest: delete them, and run the same extraction again")
    else:
        print("every file matches the manifest")
    if without_map:
        print(f"{len(without_map)} of {len(images)} images have no map as they are now: run the same extraction again")
    elif images:
        print(f"every one of {len(images)} images has a map")
    return 1 if files or without_map else 0
