"""The picture of a map, as notebooks show it: its own PCA colours, in the proportions of the image."""

import io
import math

from PIL import Image
from torch import Tensor

from brixel.feature_maps.pca import PcaBasis

LONG_SIDE_PX = 384


def png_picture(features: Tensor, image_hw: tuple[int, int], stride: tuple[float, float]) -> bytes:
    """Draw a map; of one with more cells than the picture has pixels, every n-th.

    Args:
        features: (D, Hf, Wf).
        image_hw: Height and width of the image in pixels.
        stride: Distance (y, x) between neighbouring cells in pixels of the image.

    Returns:
        A PNG file.

    Raises:
        BrixelError: Features are not finite.
    """
    step = math.ceil(max(features.shape[1:]) / LONG_SIDE_PX)
    some = features[:, ::step, ::step]
    cells = Image.fromarray(PcaBasis.fit([some]).project(some))
    height, width = (max(1, round(side * LONG_SIDE_PX / max(image_hw))) for side in image_hw)
    bottom, right = (
        min(side / (step * cell_px), cells_there)
        for side, cell_px, cells_there in zip(image_hw, stride, some.shape[1:], strict=True)
    )
    buffer = io.BytesIO()
    # the last cells may extend beyond the image
    cells.resize((width, height), Image.Resampling.NEAREST, box=(0, 0, right, bottom)).save(buffer, "PNG")
    return buffer.getvalue()
