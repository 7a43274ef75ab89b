"""Predictions as images: masks with a palette, and colours laid over the image.

Shapes: H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from brixel.errors import BrixelError

_SHARE = 0.55  # of a colour that lies over an image
_RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])  # of low to high values


def voc_colour(number: int) -> list[int]:
    """The colour of a class in VOC's palette: its bits in turn go to red, green and blue, from the highest bit down."""
    return [sum((number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]


def mask_image(labels: npt.NDArray[np.int64]) -> Image.Image:
    """Classes (H, W) as an image of their numbers: up to 255 with a palette, up to 65535 as grey of 16 bits."""
    check_writable_classes([int(labels.min()), int(labels.max())])
    if labels.max() > 255:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([value for number in range(256) for value in voc_colour(number)])
    return image


def check_writable_classes(classes: Sequence[int]) -> None:
    """Raise BrixelError for classes that no mask can hold."""
    if wrong := [label for label in classes if not 0 <= label <= 65535]:
        raise BrixelError(f"the class {wrong[0]} cannot be written into a PNG; expected classes from 0 to 65535")


def labels_over(rgb: npt.NDArray[np.generic], labels: npt.NDArray[np.int64]) -> Image.Image:
    """The colours of classes (H, W) over their image (3, H, W), uint8 or floats in [0, 1]."""
    classes, places = np.unique(labels, return_inverse=True)
    colours = np.array([voc_colour(int(label) % 256) for label in classes], np.uint8)
    return _over(rgb, colours[places.reshape(labels.shape)])


def values_over(rgb: npt.NDArray[np.generic], values: npt.NDArray[np.float32]) -> Image.Image:
    """Values (H, W), from the 1st to the 99th percentile in a colour ramp from violet to yellow, over their image."""
    low, high = np.percentile(values, (1, 99))
    shares = ((values - low) / max(float(high - low), 1e-12)).clip(0, 1)
    stops = np.linspace(0, 1, len(_RAMP))
    return _over(rgb, np.stack([np.interp(shares, stops, channel) for channel in _RAMP.T], -1))


def _over(rgb: npt.NDArray[np.generic], colours: npt.NDArray[np.generic]) -> Image.Image:
    """Colours (H, W, 3), 0 to 255, laid over an image."""
    below = rgb.transpose(1, 2, 0).astype(np.float32) * (1 if rgb.dtype == np.uint8 else 255)
    mixed: npt.NDArray[np.float32] = (1 - _SHARE) * below + _SHARE * colours.astype(np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))
