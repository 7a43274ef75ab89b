"""Segment with a few masks, or a few clicks: a probe that is fitted in seconds, kept in a folder, and used again.

python examples/segment_with_few_masks.py [MODEL]

Draws pictures of balls and boxes in random colours on a noisy ground, so that colour alone does not tell them apart.
The probe sees three masks, then three clicks a class on two pictures; both are scored on pictures that it has not seen.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from brixel.probe import SegmentationProbe, load_probe
from brixel.probe.label_images import labels_over, mask_image

SIDE_PX = 224
NAMES = ["ground", "ball", "box"]


def draw(seed):
    """A picture (H, W, 3) and its classes (H, W)."""
    numbers = np.random.default_rng(seed)
    ground = numbers.integers(60, 200, 3) + numbers.normal(0, 12, (SIDE_PX, SIDE_PX, 3))
    picture, mask = Image.fromarray(ground.clip(0, 255).astype(np.uint8)), Image.new("L", (SIDE_PX, SIDE_PX))
    for column, kind in enumerate(numbers.permutation([1, 1, 2, 2])):
        radius = int(numbers.integers(22, 38))
        x, y = 56 * column % 112 + 56 + 56 * (column % 2), 56 + 112 * (column // 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        colour = tuple(int(value) for value in numbers.integers(0, 256, 3))
        for drawing, fill in ((ImageDraw.Draw(picture), colour), (ImageDraw.Draw(mask), int(kind))):
            (drawing.ellipse if kind == 1 else drawing.rectangle)(box, fill=fill)
    return np.asarray(picture), np.asarray(mask)


def main(model=None):
    images, masks = zip(*(draw(seed) for seed in range(9)), strict=True)
    unseen = images[3:], masks[3:]

    probe = SegmentationProbe(model, class_names=NAMES).fit(images[:3], masks[:3])
    print(f"three masks: mean IoU {probe.score(*unseen):.3f} on {len(unseen[0])} unseen pictures")

    clicks = [
        [(y, x, label) for label in range(3) for y, x in np.argwhere(mask == label)[:: (mask == label).sum() // 3][:3]]
        for mask in masks[:2]
    ]
    clicked = SegmentationProbe(model).fit(images[:2], clicks=clicks)
    print(f"{sum(map(len, clicks))} clicks: mean IoU {clicked.score(*unseen):.3f}")

    probe.save("probe")
    labels = load_probe("probe").predict(images[3])  # (H, W), in another program
    mask_image(labels).save("mask.png")
    labels_over(images[3].transpose(2, 0, 1), labels).save("overlay.png")


if __name__ == "__main__":
    main(*sys.argv[1:2])
