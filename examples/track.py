"""Carry two objects through a video, and say how well: it is drawn here, so that the truth is known.

    python examples/track.py [MODEL]

Writes drawn.mp4, and tracked.mp4 with the objects that were found, in colours.
"""

import sys

import numpy as np
from draw_videos import draw_video
from PIL import Image

from brixel import BrixelFeatures
from brixel.video import frames, propagate, write_video

COLOURS = np.array([[0, 0, 0], [255, 60, 40], [60, 140, 255]], np.uint8)


def main(name: str = "brixel-small") -> None:
    images, truth = draw_video(seed=7, kinds=("disk", "square"))
    write_video("drawn.mp4", images, fps=12)
    model = BrixelFeatures.from_pretrained(name)
    drawn, overlap, union = [], np.zeros(2), np.zeros(2)
    for image, true, found in zip(images, truth, propagate(truth[0], frames("drawn.mp4"), model), strict=True):
        for number in (1, 2):
            ours, theirs = found.numpy() == number, true == number
            overlap[number - 1] += (ours & theirs).sum()
            union[number - 1] += (ours | theirs).sum()
        drawn.append(Image.blend(image, Image.fromarray(COLOURS[found.numpy()]), 0.4))
    write_video("tracked.mp4", drawn, fps=12)
    for shape, iou in zip(("disk", "square"), overlap / union, strict=True):
        print(f"{shape}: IoU {iou:.3f} over {len(images)} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
