"""`brixel extract scene.tif -o features.tif`: the feature raster of a georeferenced raster or of a slide."""

import argparse
import dataclasses
from collections.abc import Callable

from brixel.brixel_features import BrixelFeatures
from brixel.cli.options import add_flag, given, positive, print_json, whole
from brixel.errors import BrixelError
from brixel.inference.rasters.sink import GeoTiffSink, ZarrSink
from brixel.inference.rasters.slide import ENDINGS

_RASTERS = (".tif", ".tiff", ".vrt", ".jp2", ".img", *ENDINGS)
_FLAGS = ("window", "overlap", "bands", "stretch", "value_range", "nodata", "level", "um_per_px")
_OF_FOLDERS = {  # and their defaults
    **dict.fromkeys(("sink", "format", "shard_size", "reduce", "short_side_px")),
    "tiles": "auto",
}


def add_raster_options(parser: argparse.ArgumentParser) -> None:
    """The flags of rasters; each of them says that the PATH is one."""
    group = parser.add_argument_group("rasters", "for a georeferenced raster or a slide, with -o NAME.tif or NAME.zarr")
    window, overlap = "side of the windows that a raster is read in, in pixels", "pixels that windows share at least"
    add_flag(group, "--window", type=positive, metavar="PX", help=window, usual="1024")
    add_flag(group, "--overlap", type=whole, metavar="PX", help=overlap, usual="128")
    text = "the band that becomes grey, or the three that become red, green and blue, counted from 1, such as 4,3,2"
    add_flag(group, "--bands", type=_numbers_of(int), metavar="N,N,N", help=text, usual="what the file says")
    text = "percentiles of each band that become black and white, such as 2,98"
    usual = "2,98, and for bytes 0 to 255 as they are"
    add_flag(group, "--stretch", type=_numbers_of(float, 2), metavar="LOW,HIGH", help=text, usual=usual)
    text = "numbers that become black and white in all bands, in place of --stretch"
    add_flag(group, "--value-range", type=_numbers_of(float, 2), metavar="LOW,HIGH", help=text)
    text = "a number that means that there is no data, beside what the file says"
    add_flag(group, "--nodata", type=float, metavar="VALUE", help=text)
    text = "micrometres per pixel of a slide: the coarsest level that is as fine, averaged to them"
    add_flag(group, "--um-per-px", type=float, metavar="UM", help=text, usual="the finest level")
    add_flag(group, "--level", type=whole, metavar="N", help="level of a slide, 0 for the finest")


def any_raster_flag(options: argparse.Namespace) -> bool:
    """Whether a flag is given that only rasters have."""
    return any(getattr(options, name) is not None for name in _FLAGS)


def is_raster(options: argparse.Namespace) -> bool:
    """Whether the options name a raster: by a flag of rasters, by an output *.tif, or by *.zarr of a raster's file."""
    if any_raster_flag(options):
        return True
    ending = options.output.suffix.lower()
    if ending in GeoTiffSink.endings:
        return not options.output.is_dir()
    is_one = len(options.paths) == 1 and options.paths[0].name.lower().endswith(_RASTERS)
    return ending in ZarrSink.endings and is_one


def extract_raster(options: argparse.Namespace, load: Callable[[argparse.Namespace], BrixelFeatures]) -> int:
    """Write the feature raster of the one raster that the options name."""
    if len(options.paths) != 1:
        raise BrixelError(f"{len(options.paths)} paths: a feature raster is made of one raster; call it for each")
    for name, default in _OF_FOLDERS.items():
        if getattr(options, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise BrixelError(f"{flag} does not go with rasters, which keep their resolution and are read in windows")
    chosen = {name: value for name, value in given(options, *_FLAGS, "save_dtype").items() if value is not None}
    summary = load(options).extract_raster(
        options.paths[0], options.output, **chosen, **given(options, "scale", "memory_limit", "overwrite")
    )
    if options.json:
        print_json({**dataclasses.asdict(summary), "path": str(summary.path)})
    else:
        print(summary)
    return 0


def _numbers_of(kind: type[int] | type[float], count: int | None = None) -> Callable[[str], tuple[float, ...]]:
    """A type of options: numbers between commas."""
    expected = f"{count or 'whole'} numbers" + (", with a comma between them" if count else ", such as 4,3,2")

    def numbers(text: str) -> tuple[float, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or (count is not None and len(found) != count):
            raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
        return found

    return numbers
