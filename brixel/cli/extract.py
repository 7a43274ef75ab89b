"""`brixel extract`: the dense maps of many images, written into a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import (
    add_flag,
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
from brixel.extraction.map_folder import missing_maps, verify
from brixel.extraction.sinks import SINKS
from brixel.extraction.writers import convert
from brixel.feature_maps.storage import check_writable
from brixel.images.find_images import describe_left_out, find_images
from brixel.utils.atomic_files import check_output_folder
from brixel.utils.devices import DTYPES
from brixel.utils.processes import own_device

_ENDINGS = (".safetensors", ".npy")
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
    text = "images, and folders of images; with --engine ray also URIs, Parquet files and webdataset tars"
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
    text = "compile the model with torch.compile first, for a minute or more; on GPUs; not with --memory-limit"
    parser.add_argument("--compile", action="store_true", help=text)
    add_flag(parser, "--overwrite", note="every map is computed again")
    _add_ray(parser)
    text = "compute nothing: compare the files in FOLDER with its manifest, and the images at PATH with their maps"
    parser.add_argument("--verify", action="store_true", help=text)
    add_flag(parser, "--json")
    add_model_options(parser)
    add_map_options(parser)


def _extract(options: argparse.Namespace) -> int:
    if options.verify:
        return _verify(options)
    if options.compile and options.memory_limit is not None:
        raise BrixelError("--compile does not go with --memory-limit: what compiled code allocates is not known before")
    if not options.paths:
        raise BrixelError("no PATH: give images, or folders of images; only --verify needs none")
    options.save_dtype = None if options.save_dtype is None else DTYPES[options.save_dtype]
    if options.engine == "ray":
        return _extract_with_ray(options)
    if of_ray := [f"--{name.replace('_', '-')}" for name in _OF_RAY.values() if getattr(options, name) is not None]:
        raise BrixelError(f"{', '.join(of_ray)} without --engine ray")
    if uri := next((path for path in options.paths if isinstance(path, str)), None):
        raise BrixelError(f"{uri} is on another machine: --engine ray reads object stores; or download it first")
    images = find_images(options.paths)
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
    summary = extract_files(
        _model(options),
        images,
        options.output,
        **_of_run(options),
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
        **given(options, "sink", "save_dtype", "overwrite", "batch_size", "workers", *_OF_MAPS),
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
    if options.sink or options.shard_size is not None or options.format not in (None, path.suffix[1:]):
        raise BrixelError(f"{path} is the name of one map: --sink, --format and --shard-size go with a folder")
    check_writable(path)
    if path.exists() and not options.overwrite:
        raise BrixelError(f"{path} exists: give another name, or --overwrite")
    feature_map = _model(options).extract(options.paths[0], **given(options, *_OF_MAPS))
    convert(feature_map, options.save_dtype, picture=options.paths[0].name).save(path)
    print_json({"written": 1, "file": str(path)}) if options.json else print(path)
    return 0


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
    images = find_images(options.paths)
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
