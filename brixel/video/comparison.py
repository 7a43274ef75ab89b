"""The video of `brixel show`: every frame beside its maps, in the colours of one PCA basis for the whole video."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brixel.feature_maps.panel import build_panel
from brixel.feature_maps.pca import PcaBasis
from brixel.images.load import load_image
from brixel.inference.comparison_panel import comparison_maps, comparison_row
from brixel.inference.dense_features import DenseFeatures
from brixel.utils.progress import progress_bar
from brixel.video.frames import FrameSelection, sample_frames
from brixel.video.reading import decode
from brixel.video.writing import video_writer

_BASIS_FRAMES = 8


def comparison_video(
    model: DenseFeatures, video: Path, output: Path, selection: FrameSelection, settings: Mapping[str, Any]
) -> None:
    """Draw the frames of a video that are wanted, each beside its maps, as an MP4 file with their own times.

    The basis is fitted to a few frames from all over the video, in a first pass; the second one holds one frame at a
    time.

    Args:
        model: The model to show.
        video: The video to read.
        output: The file to write, ``*.mp4``.
        selection: Which frames are wanted.
        settings: As those of :func:`brixel.inference.comparison_panel.comparison_maps`.

    Raises:
        ImageError: The video cannot be read, or is damaged or cut off.
        BrixelError: Its frames change their size.
        MemoryLimitError: A map does not fit into the limit.
    """
    sampled = [load_image(frame) for frame in sample_frames(video, _BASIS_FRAMES, selection)]
    maps = [each for rgb in sampled for each in comparison_maps(model, rgb, **settings).values()]
    basis = PcaBasis.fit([each.features for each in maps])
    del maps, sampled
    with video_writer(output, selection.fps or 25.0) as writer:
        for decoded in progress_bar(selection.of(decode(video)), "frames"):
            rgb = load_image(decoded.convert())
            row = comparison_row(rgb, comparison_maps(model, rgb, **settings), basis, f"{decoded.time_s:.2f} s")
            writer.add(np.asarray(build_panel([row])), decoded.time_s)
