"""`brixel probe`: linear probes on dense features, fitted, used and scored."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brixel.cli.options import (
    add_flag,
    add_model_options,
    add_output,
    command,
    given,
    load,
    pixels_or_native,
    print_json,
    print_table,
)
from brixel.errors import BrixelError, printable
from brixel.feature_maps.panel import check_replaceable, save_image
from brixel.images.find_images import describe_left_out, find_images
from brixel.images.load import load_image
from brixel.probe import RegressionProbe, SegmentationProbe, load_probe
from brixel.probe.label_images import check_writable_classes, labels_over, mask_image, values_over
from brixel.probe.labelled_folders import pair_by_name, read_class_names, read_clicks_file
from brixel.probe.probe_folder import DESCRIPTION, KINDS, check_is_probe_folder
from brixel.utils.atomic_files import atomic_path, check_output_folder

_LOG = logging.getLogger("brixel")
_REGULARISATION = {kind.KIND: kind().regularisation for kind in (SegmentationProbe, RegressionProbe)}
_ENDINGS = {SegmentationProbe.KIND: (".png",), RegressionProbe.KIND: (".npy", ".png")}


def add(commands: Any) -> None:
    """Add the command to the parser's, with one of its own for each step."""
    text = "fit a linear probe to your masks, clicks or values, and use it"
    parser = commands.add_parser("probe", help=text, description=f"{text[0].upper()}{text[1:]}.")
    steps = parser.add_subparsers(required=True, metavar="STEP")
    _add_fit(steps)
    _add_predict(steps)
    _add_score(steps)


def _add_fit(steps: Any) -> None:
    text = "fit a probe to images with masks, clicks or values"
    one = command(steps, "fit", _fit, text, "brixel probe fit --images photos --masks masks -o probe")
    _add_pairs(one, required=False)
    text = "in place of --masks: a JSON or CSV file of clicks, see docs/probes.md"
    one.add_argument("--clicks", type=Path, metavar="FILE", help=text)
    text = "what is predicted: classes, or values such as depth"
    add_flag(one, "--kind", choices=KINDS, default=KINDS[0], help=text)
    text = "names of classes: a JSON list by number, or a table by class"
    one.add_argument("--classes", type=Path, metavar="JSON", help=text)
    add_flag(one, "--ignore-label", type=int, metavar="N", default=255, help="number in masks that means no label")
    add_flag(one, "--log", action="store_true", help="fit the logarithm of values, as suits depth")
    text = "value of 1 in 16-bit PNG files of values"
    add_flag(one, "--png-unit", type=float, metavar="X", default=0.001, help=text, note="0.001: millimetres to metres")
    text = "number in files of values that means none, such as 0"
    add_flag(one, "--ignore-value", type=float, metavar="X", help=text)
    text = "weight of the penalty on the probe's weights"
    usual = ", ".join(f"{default:g} for {kind}" for kind, default in _REGULARISATION.items())
    add_flag(one, "--regularisation", type=float, metavar="X", help=text, usual=usual)
    add_output(one, required=True, metavar="FOLDER")
    add_flag(one, "--overwrite", note="a probe that is in FOLDER is replaced")
    note = "'native' keeps the size of an image"
    add_flag(one, "--short-side-px", type=pixels_or_native, note=note, usual="as the adapter was trained")
    add_flag(one, "--scale", usual="4; trained adapters of the first generation have no other")
    add_flag(one, "--memory-limit", usual="what is free, less a tenth")
    add_flag(one, "--batch-size", default=1)
    add_model_options(one)


def _add_predict(steps: Any) -> None:
    text = "predict the masks or values of images, and draw them over the images"
    one = command(steps, "predict", _predict, text, "brixel probe predict probe photos -o predicted")
    _add_probe(one)
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, and folders of images")
    note = "masks/NAME.png (values/NAME.npy for values), and overlays/NAME.jpg"
    add_output(one, required=True, metavar="FOLDER", note=note)
    one.add_argument("--no-overlays", action="store_true", help="do not draw the predictions over the images")
    add_flag(one, "--overwrite", note="without it, only masks that a probe has predicted are replaced")
    add_flag(one, "--json")
    add_model_options(one)


def _add_score(steps: Any) -> None:
    text = "compare a probe's predictions with masks or values"
    one = command(steps, "score", _score, text, "brixel probe score probe --images photos --masks masks")
    _add_probe(one)
    _add_pairs(one, required=True)
    add_flag(one, "--json")
    add_model_options(one)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("probe", type=Path, metavar="PROBE", help="folder that `brixel probe fit` wrote")


def _add_pairs(parser: argparse.ArgumentParser, *, required: bool) -> None:
    text, note = "images, and folders of them", "one folder, whose images belong to files of their name"
    add_flag(parser, "--images", type=Path, required=True, metavar="DIR", help=text, note=note)
    text = "folder of masks as NAME.png for NAME of an image, or of values as NAME.npy or 16-bit NAME.png"
    parser.add_argument("--masks", type=Path, required=required, metavar="DIR", help=text)


# ------------------------------------------------------------------------------------------------ fit


def _fit(options: argparse.Namespace) -> int:
    if (options.masks is None) == (options.clicks is None):
        raise BrixelError("expected --masks, or --clicks in their place")
    segments = options.kind == SegmentationProbe.KIND
    if not segments and (options.clicks is not None or options.classes is not None):
        raise BrixelError("--clicks and --classes go with --kind segmentation")
    check_is_probe_folder(options.output)
    if (options.output / DESCRIPTION).exists() and not options.overwrite:
        raise BrixelError(f"{options.output} holds a probe: give another folder, or --overwrite")
    if options.regularisation is None:
        options.regularisation = _REGULARISATION[options.kind]
    common = given(options, "regularisation", "scale", "short_side_px", "memory_limit", "batch_size")
    probe: SegmentationProbe | RegressionProbe
    if segments:
        names = None if options.classes is None else read_class_names(options.classes)
        probe = SegmentationProbe(class_names=names, ignore_label=options.ignore_label, **common)
    else:
        probe = RegressionProbe(**given(options, "log", "png_unit", "ignore_value"), **common)
    if options.clicks is not None:
        images, clicks = read_clicks_file(options.clicks, options.images)
        assert isinstance(probe, SegmentationProbe)
        probe.set_params(model=load(options)).fit(images, clicks=clicks)
    else:
        images, masks = _pairs(options, options.kind)
        probe.set_params(model=load(options)).fit(images, masks)
    if options.backbone is None:
        probe.model = options.model  # to be loaded by its name again, and not copied
    probe.save(options.output)
    classes = f", {len(probe.classes_)} classes" if isinstance(probe, SegmentationProbe) else ""
    print(f"{options.output}: fitted to {len(images)} images{classes}")
    return 0


def _pairs(options: argparse.Namespace, kind: str) -> tuple[list[Path], list[Path]]:
    pairs, without = pair_by_name(options.images, options.masks, _ENDINGS[kind])
    if without:
        count = without + len(pairs)
        _LOG.warning("%d of %d images have no file in %s, and are left out", without, count, options.masks)
    return [image for image, _ in pairs], [mask for _, mask in pairs]


# ------------------------------------------------------------------------------------------------ predict


def _predict(options: argparse.Namespace) -> int:
    images = find_images(options.images)
    check_output_folder(options.output)
    probe = _load(options)
    segments = isinstance(probe, SegmentationProbe)
    if isinstance(probe, SegmentationProbe):
        check_writable_classes(probe.classes_.tolist())
    folder, ending = ("masks", ".png") if segments else ("values", ".npy")
    targets = [options.output / folder / relative.with_suffix(ending) for _, relative in images]
    overlays = [options.output / "overlays" / relative.with_suffix(".jpg") for _, relative in images]
    _check_targets([image for image, _ in images], targets, overlays, overwrite=options.overwrite)
    failures: list[dict[str, str]] = []
    found = probe.stream_all([image for image, _ in images])
    for (image, _), target, overlay, result in zip(images, targets, overlays, found, strict=True):
        if isinstance(result, Exception):
            failures.append({"image": str(image), "error": str(result)})
            print(f"brixel: {printable(str(result))}", file=sys.stderr)
        else:
            _write(result, target, None if options.no_overlays else overlay, image)
    written = len(images) - len(failures)
    if options.json:
        print_json({"written": written, "failed": failures, "left_out": dict(images.left_out)})
    else:
        parts = (f"{written} written into {options.output}, {len(failures)} failed", describe_left_out(images.left_out))
        print("; ".join(filter(None, parts)))
    return 1 if failures else 0


def _check_targets(images: list[Path], targets: list[Path], overlays: list[Path], *, overwrite: bool) -> None:
    """Raise BrixelError where two images have one name, or something that is not ours would be replaced."""
    by_target: dict[Path, Path] = {}
    for image, target in zip(images, targets, strict=True):
        if other := by_target.get(target):
            raise BrixelError(f"{other} and {image} would both be written as {target.name}; predict them separately")
        by_target[target] = image
    for path in () if overwrite else (*targets, *overlays):
        if path.suffix == ".npy" and path.exists():
            raise BrixelError(f"{path} exists; give another folder, or --overwrite")
        check_replaceable(path)


def _write(found: npt.NDArray[Any], target: Path, overlay: Path | None, image: Path) -> None:
    """Write a mask or values, and the drawing of them over the image."""
    segments = target.suffix == ".png"
    for path in filter(None, (target, overlay)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if overlay is not None:
        rgb = load_image(image).numpy()
        save_image(labels_over(rgb, found) if segments else values_over(rgb, found), overlay)
    if segments:
        save_image(mask_image(found), target)
    else:
        with atomic_path(target) as temporary:
            np.save(temporary, found)


# ------------------------------------------------------------------------------------------------ score


def _score(options: argparse.Namespace) -> int:
    probe = _load(options)
    images, masks = _pairs(options, probe.KIND)
    found: dict[str, Any] = probe.evaluate(images, masks)
    if options.json:
        print_json(found)
        return 0
    if isinstance(probe, SegmentationProbe):
        by_class = {f"IoU of {probe.name_of(label)}": iou for label, iou in found.pop("iou_by_class").items()}
        found |= {name: "in no mask or prediction" if iou is None else iou for name, iou in by_class.items()}
    print_table({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in found.items()})
    return 0


def _load(options: argparse.Namespace) -> SegmentationProbe | RegressionProbe:
    """The probe with the model that the options name, or the one that it names itself."""
    if options.model is None and options.backbone is None:
        return load_probe(options.probe, device=options.device, dtype=options.dtype)
    return load_probe(options.probe, model=load(options))
