"""Videos: their frames as images, labels carried through them, and MP4 files. Needs the extra `video`.

>>> from brixel import BrixelFeatures
>>> from brixel.video import frames, propagate
>>> model = BrixelFeatures.from_pretrained()
>>> for feature_map in model.stream(frames("clip.mp4", fps=2)):
...     print(feature_map.meta["time_s"])

`docs/video.md` says more.
"""

from brixel.images.frame import Frame
from brixel.video.frames import frames
from brixel.video.propagation import propagate
from brixel.video.writing import write_video

__all__ = ["Frame", "frames", "propagate", "write_video"]


def __dir__() -> list[str]:
    return sorted(__all__)
