"""A frame of a video: an image that knows when it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a video, which is taken wherever an image is. Its feature map has both numbers in its ``meta``.

    Args:
        rgb: (H, W, 3), uint8; not to be changed while a stream reads it.
        index: Its number in the video, from 0, whichever frames are left out.
        time_s: When it is shown, in seconds from the start of the video.
    """

    rgb: npt.NDArray[np.uint8] = field(repr=False)
    index: int
    time_s: float

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    @property
    def meta(self) -> Mapping[str, str]:
        """The texts that its feature map gets."""
        return {"frame": str(self.index), "time_s": f"{self.time_s:.6f}"}

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """For ``np.asarray(frame)``: the pixels (H, W, 3)."""
        return np.array(self.rgb, dtype=dtype, copy=copy)
