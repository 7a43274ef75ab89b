"""Videos with the objects of every frame, in the layout of DAVIS 2017 (https://davischallenge.org).

`JPEGImages/480p/NAME/00000.jpg`, `Annotations/480p/NAME/00000.png`, and `ImageSets/2017/val.txt` with a name on each
line. Numbers in an annotation are objects from 1, 0 is the background; 255 is counted as neither.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.datasets.labelled import NONE, Sample, check_samples, list_lines, need, unpacked, visible_files
from brixel.images.find_images import IMAGE_SUFFIXES
from brixel.images.target_files import check_aspect, read_numbers
from brixel.utils.contained_paths import path_below
from brixel.utils.fields import check_field, path_like, text

_WHERE = "DAVIS-2017-trainval-480p.zip from https://davischallenge.org/davis2017/code.html"
_SIZES = ("480p", "Full-Resolution")
_LEAST_FRAMES = 3  # the first and the last are not counted


@dataclass(frozen=True)
class VideoSequence:
    """A video as files: its frames in order, each with its annotation."""

    name: str
    samples: Sequence[Sample]

    def mask(self, index: int) -> Tensor:
        """The objects of a frame, (H, W), int64. Raises BrixelError where the file cannot be used."""
        sample = self.samples[index]
        mask = read_numbers(sample.target)
        check_aspect(sample.image, sample.target, mask.shape)
        return mask

    def objects(self) -> list[int]:
        """The objects that are annotated in the first frame. Raises BrixelError where there is none."""
        numbers = self.mask(0).unique().tolist()
        objects = [number for number in numbers if number not in (0, NONE)]
        if not objects:
            hint = (
                "255 alone looks like DAVIS 2016, which has one object: take the annotations of 2017"
                if NONE in numbers
                else "all its pixels are 0"
            )
            raise BrixelError(f"{self.samples[0].target} has no objects; expected numbers from 1 to 254: {hint}")
        return objects


@dataclass(frozen=True)
class VideoDataset:
    """Videos with annotations.

    Args:
        name: Of the data set.
        sequences: The videos.
    """

    name: str
    sequences: Sequence[VideoSequence]

    def first(self, count: int | None) -> "VideoDataset":
        """Keep the first videos; None for all."""
        return dataclasses.replace(self, sequences=self.sequences[:count])


def read_davis(root: str | Path, split: str = "val") -> VideoDataset:
    """Read a split of a data set in the layout of DAVIS 2017.

    Args:
        root: The folder with `JPEGImages`, `Annotations` and `ImageSets`, or the one around it.
        split: The name of the list, such as "val".

    Returns:
        The videos, at 480p where there is such a folder; annotations are read when they are needed.

    Raises:
        BrixelError: Files are missing, or a video has fewer than three frames.
    """
    folder: Path = check_field("root", root, path_like())
    split = check_field("split", split, text(empty=True))
    inner = unpacked(folder, "DAVIS", "DAVIS-2017")
    listed = inner / "ImageSets" / "2017" / f"{split}.txt"
    need("the list of videos of DAVIS 2017", _WHERE, listed)
    size = next((each for each in _SIZES if (inner / "JPEGImages" / each).is_dir()), _SIZES[0])
    names = list(dict.fromkeys(filter(None, map(str.strip, list_lines(listed)))))
    if not names:
        raise BrixelError(f"{listed} names no videos; source: {_WHERE}")
    return VideoDataset(folder.resolve().name, [_sequence(inner, size, name, listed) for name in names])


def _sequence(inner: Path, size: str, name: str, listed: Path) -> VideoSequence:
    images, masks = (path_below(inner, f"{kind}/{size}/{name}", listed) for kind in ("JPEGImages", "Annotations"))
    need("a folder of a video of DAVIS 2017", _WHERE, images, masks)
    frames = [path for path in visible_files(images, "*") if path.suffix.lower() in IMAGE_SUFFIXES]
    samples = [Sample(frame, masks / f"{frame.stem}.png") for frame in frames]
    check_samples(samples, f"frames of {images}", _WHERE)
    if len(samples) < _LEAST_FRAMES:
        raise BrixelError(f"{images} has {len(samples)} frames; expected at least {_LEAST_FRAMES}: a whole video")
    return VideoSequence(name, samples)
