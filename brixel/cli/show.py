"""`brixel show`: images or a video beside the backbone's maps and the dense maps, as a panel or a video."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from brixel.cli.options import (
    add_frame_options,
    add_map_options,
    add_model_options,
    add_panel_output,
    command,
    frame_selection,
    given,
    load,
)
from brixel.errors import BrixelError
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.find_images import SCENE, find_images
from brixel.images.load import ImageInput
from brixel.inference.comparison_panel import comparison_panel
from brixel.video.comparison import comparison_video
from brixel.video.frames import FrameSelection, is_video, sample_frames
from brixel.video.reading import check_video
from brixel.video.writing import ENDING, check_video_path

_MAX_IMAGES = 8
_FRAMES_OF_VIDEO = 4  # in a panel
_LOG = logging.getLogger("brixel")


def add(commands: Any) -> None:
    """Add the command."""
    text = "draw images, backbone maps and dense maps side by side; of a video also as a video"
    parser = command(commands, "show", _show, text, "brixel show photo.jpg --teacher -o panel.png")
    text = (
        f"images, videos, of which {_FRAMES_OF_VIDEO} frames are drawn, and folders of images, of which the first "
        f"{_MAX_IMAGES} are; default: a scene that brixel contains"
    )
    parser.add_argument("images", nargs="*", metavar="PATH", help=text)
    add_panel_output(parser, note=f"with one video also a name that ends in {ENDING}: every frame")
    text = "also the backbone's map of the image at four times the size"
    parser.add_argument("--teacher", action="store_true", help=text)
    add_frame_options(parser)
    add_model_options(parser)
    add_map_options(parser)


def _show(options: argparse.Namespace) -> int:
    selection = frame_selection(options)
    paths: list[str | Path] = []
    for path in options.images or [SCENE]:
        paths += _in_folder(Path(path)) if os.path.isdir(path) else [path]
    if options.fps is not None or options.every is not None:
        _check_has_videos(paths)
    settings = given(options, "scale", "short_side_px", "teacher", "memory_limit", "tiles")
    if options.output.suffix.lower() == ENDING:
        video = _only_video(paths, options.output, overwrite=options.overwrite)
        comparison_video(load(options), video, options.output, selection, settings)
    else:
        check_panel_path(options.output, paths, overwrite=options.overwrite)
        images = list(_images(paths, selection))
        save_panel(comparison_panel(load(options), images, **settings), options.output)
    print(options.output)
    return 0


def _images(paths: Sequence[str | Path], selection: FrameSelection) -> Iterator[ImageInput]:
    """The images, and some frames of each video."""
    for path in paths:
        if is_video(path):
            yield from sample_frames(path, _FRAMES_OF_VIDEO, selection)
        else:
            yield path


def _check_has_videos(paths: Sequence[str | Path]) -> None:
    if not any(map(is_video, paths)):
        raise BrixelError("--fps and --every choose frames of a video, and none is among the paths")


def _only_video(paths: Sequence[str | Path], output: Path, *, overwrite: bool) -> Path:
    """The video to be drawn as a video; everything that can be wrong is found before the model is loaded."""
    videos = [Path(path) for path in paths if is_video(path)]
    if len(paths) != 1 or not videos:
        raise BrixelError(
            f"{output} is the name of a video, which shows one video, and there are {len(paths) - len(videos)} images "
            f"and {len(videos)} videos; give one video, or a name that ends in .png"
        )
    if videos[0].resolve() == output.resolve():
        raise BrixelError(f"{output} is itself the video to be shown; give another name")
    check_video_path(output, overwrite=overwrite)
    check_video(videos[0])
    return videos[0]


def _in_folder(folder: Path) -> list[Path]:
    found = [path for path, _ in find_images([folder])]
    if len(found) > _MAX_IMAGES:
        _LOG.warning("%s: the first %d of %d images are drawn", folder, _MAX_IMAGES, len(found))
    return found[:_MAX_IMAGES]
