"""`brixel show`: images or a video beside the backbone's maps and the dense maps, as a panel or a video."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from brixel.cli.options import (
    add_flag,
    add_frame_options,
    add_map_options,
    add_model_options,
    add_panel_output,
    add_shown_images,
    command,
    frame_selection,
    given,
    load,
    shown_images,
)
from brixel.errors import BrixelError
from brixel.feature_maps.panel import check_panel_path, save_panel
from brixel.images.load import ImageInput
from brixel.inference.comparison_panel import comparison_panel
from brixel.video.comparison import comparison_video
from brixel.video.frames import FrameSelection, is_video, sample_frames
from brixel.video.reading import check_video
from brixel.video.writing import ENDING, check_video_path

_FRAMES_OF_VIDEO = 4  # in a panel


def add(commands: Any) -> None:
    """Add the command."""
    text = "draw images, backbone maps and dense maps side by side; of a video also as a video"
    parser = command(commands, "show", _show, text, "brixel show photo.jpg --teacher -o panel.png")
    add_shown_images(parser, note=f"of a video {_FRAMES_OF_VIDEO} frames are drawn")
    add_panel_output(parser, note=f"with one video also a name that ends in {ENDING}: every frame")
    add_flag(parser, "--teacher")
    add_frame_options(parser)
    add_model_options(parser)
    add_map_options(parser)


def _show(options: argparse.Namespace) -> int:
    selection = frame_selection(options)
    paths = shown_images(options.images)
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
