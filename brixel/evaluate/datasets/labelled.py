"""Images with a class for every pixel, in the folder layouts in which people have them.

Each reader gives the same thing: pairs of image and mask, the classes, and what the numbers in a mask mean. Where a
folder is not as expected the error says which one was, and where the data set comes from. `docs/evaluation.md` names
the sources. Shapes: H x W pixels, K classes.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel.errors import BrixelError, did_you_mean
from brixel.evaluate.metrics import IGNORE
from brixel.images.decode import jpeg_hw, open_image_file
from brixel.images.find_images import IMAGE_SUFFIXES

_UNKNOWN = -2  # a number that no mask should hold

_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CITYSCAPES = {  # the number in `*_gtFine_labelIds.png` of each of the 19 classes that are evaluated
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}


@dataclass(frozen=True)
class Sample:
    """An image and what is known of it, as files."""

    image: Path
    target: Path


@dataclass(frozen=True)
class LabelledImages:
    """Images with masks. ``table``: (V,), the class of each number that a mask may hold, IGNORE for none."""

    name: str
    classes: Sequence[str]
    samples: Sequence[Sample]
    table: Tensor

    def first(self, count: int | None) -> "LabelledImages":
        """Only the first images; all where None."""
        return dataclasses.replace(self, samples=self.samples[:count])

    def labels(self, index: int) -> Tensor:
        """The classes of an image's pixels, IGNORE where there is none: (H, W), int64."""
        path = self.samples[index].target
        numbers = read_numbers(path)
        check_outlines(self.samples[index], numbers.shape)
        known = torch.where(numbers < len(self.table), self.table[numbers.clamp(max=len(self.table) - 1)], _UNKNOWN)
        if (known == _UNKNOWN).any():
            wrong = int(numbers[known == _UNKNOWN][0])
            raise BrixelError(
                f"{path} holds the number {wrong}; expected a class below {len(self.classes)} of {self.name}, "
                "or the number for pixels without one: see docs/evaluation.md for the layouts"
            )
        return known


def read_numbers(path: Path) -> Tensor:
    """An image of one number per pixel, palettes left aside: (H, W), int64."""
    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise BrixelError(f"{path} has mode {image.mode}; expected one whole number per pixel (grey or palette)")
        return torch.from_numpy(np.asarray(image).astype(np.int64))


def plain(folder: Path, split: str = "") -> LabelledImages:
    """`images/` and `masks/NAME.png` below ``folder/split``: numbers are classes from 0, 255 is none.

    `classes.json`, a list of names, beside them or one folder up; without it, as many classes as the masks show.
    """
    samples = paired(folder / split, "masks", (".png",))
    files = [
        path for path in (folder / split / "classes.json", folder / split / ".." / "classes.json") if path.exists()
    ]
    if files:
        classes = json.loads(files[0].read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not 1 < len(classes) <= 255:
            raise BrixelError(f"{files[0]} holds no list of 2 to 255 names")
    else:
        numbers = (read_numbers(sample.target) for sample in samples)
        count = 1 + max(int(torch.where(each == 255, 0, each).max()) for each in numbers)
        if count == 1:
            raise BrixelError(
                f"the masks of {folder / split} hold no number but 0 and 255, and 255 stands for no label; write "
                "classes as 0, 1, 2 and so on (for a black and white mask: 0 and 1)"
            )
        classes = [f"class {number}" for number in range(count)]
    return LabelledImages(folder.resolve().name, [str(name) for name in classes], samples, _table(range(len(classes))))


def voc2012(root: Path, split: str) -> LabelledImages:
    """Pascal VOC 2012 as `VOCtrainval_11-May-2012.tar` unpacks: 21 classes; the outlines, 255, have none."""
    where = "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    inner = next((path for path in (root / "VOCdevkit" / "VOC2012", root / "VOC2012") if path.is_dir()), root)
    listed = inner / "ImageSets" / "Segmentation" / f"{split}.txt"
    need(listed, "the list of images of Pascal VOC 2012", where)
    samples = [
        Sample(inner / "JPEGImages" / f"{name}.jpg", inner / "SegmentationClass" / f"{name}.png")
        for name in listed.read_text(encoding="utf-8").split()
    ]
    check_samples(samples, "Pascal VOC 2012", where)
    return LabelledImages("Pascal VOC 2012", _VOC, samples, _table(range(21)))


def ade20k(root: Path, split: str) -> LabelledImages:
    """ADE20K, 150 classes, as `ADEChallengeData2016.zip` unpacks: 0 is "other" and has no class, i is class i - 1."""
    where = "ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/"
    inner = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = inner / "images" / folder, inner / "annotations" / folder
    for path in (images, masks):
        need(path, "a folder of ADE20K", where)
    samples = [Sample(image, masks / f"{image.stem}.png") for image in sorted(images.glob("*.jpg"))]
    check_samples(samples, "ADE20K", where)
    names = inner / "objectInfo150.txt"  # a table with a head; the name is the last column
    lines = names.read_text(encoding="utf-8").splitlines()[1:151] if names.exists() else []
    classes = [line.split("\t")[-1].strip() for line in lines] or [f"class {number}" for number in range(1, 151)]
    return LabelledImages("ADE20K", classes, samples, _table(range(150), first=1, ignored=[0]))


def cityscapes(root: Path, split: str) -> LabelledImages:
    """Cityscapes, `leftImg8bit/` and `gtFine/` side by side: the 19 classes of its benchmark out of 34 numbers."""
    where = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (a login)"
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    for path in (images, masks):
        need(path, "a folder of Cityscapes", where)
    samples = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
        samples.append(Sample(image, masks / image.parent.name / name))
    check_samples(samples, "Cityscapes", where)
    table = torch.full((256,), IGNORE)
    table[list(_CITYSCAPES)] = torch.arange(len(_CITYSCAPES))
    return LabelledImages("Cityscapes", list(_CITYSCAPES.values()), samples, table)


LAYOUTS: dict[str, Callable[[Path, str], LabelledImages]] = {
    "plain": plain,
    "voc2012": voc2012,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
}


def read_labelled(layout: str, root: Path, split: str) -> LabelledImages:
    """The images of a split in a layout of ``LAYOUTS``. Raises BrixelError where something is not where it should."""
    if layout not in LAYOUTS:
        raise BrixelError(f"unknown layout {layout!r}; {did_you_mean(layout, LAYOUTS)}")
    return LAYOUTS[layout](root, split)


def paired(folder: Path, targets: str, endings: Sequence[str]) -> list[Sample]:
    """Images of `images/` with the file of the same stem in ``targets``, in order."""
    where = f"your own images in {folder / 'images'} and {folder / targets}/NAME{' or '.join(endings)}"
    for path in (folder / "images", folder / targets):
        need(path, "a folder of the plain layout", where)
    samples = []
    for image in sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        found = [folder / targets / f"{image.stem}{ending}" for ending in endings]
        samples.append(Sample(image, next((path for path in found if path.exists()), found[0])))
    check_samples(samples, f"images in {folder / 'images'}", where)
    return samples


def need(path: Path, what: str, where: str) -> None:
    """Raise BrixelError where a file or folder of a data set is missing."""
    if not path.exists():
        raise BrixelError(f"expected {what} at {path}, and there is none; to be had: {where}")


def check_samples(samples: Sequence[Sample], what: str, where: str) -> None:
    """Raise BrixelError where there are no samples, or a file of one is missing."""
    if not samples:
        raise BrixelError(f"no {what} found; to be had: {where}")
    missing = [path for sample in samples for path in (sample.image, sample.target) if not path.exists()]
    if missing:
        raise BrixelError(f"{len(missing)} files of {what} are missing, the first {missing[0]}; to be had: {where}")


def check_outlines(sample: Sample, target_hw: Sequence[int]) -> None:
    """Raise BrixelError where an image, upright, and what is known of it are not of one shape, within a pixel."""
    with open_image_file(str(sample.image)) as file:
        upright = jpeg_hw(file, str(sample.image))
        width, height = file.size
    possible = [upright] if upright else [(height, width), (width, height)]  # others tell of a turn when decoded
    if not any(_alike(each, target_hw) for each in possible):
        image_hw, target = " x ".join(map(str, possible[0])), " x ".join(map(str, target_hw))
        raise BrixelError(
            f"{sample.image} has {image_hw} px upright, {sample.target} has {target}: not one shape, so that they "
            "cannot belong together; turn or crop one as the other is"
        )


def _alike(one_hw: Sequence[int], other_hw: Sequence[int]) -> bool:
    """Whether one is the other resized, to whole pixels."""
    return abs(one_hw[0] * other_hw[1] - one_hw[1] * other_hw[0]) <= max(sum(one_hw), sum(other_hw))


def centre_square(planes: Tensor) -> Tensor:
    """The centre square of (..., H, W), just as the crop of the image is cut."""
    height, width = planes.shape[-2:]
    side = min(height, width)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return planes[..., top : top + side, left : left + side]


def _table(numbers: Sequence[int], *, first: int = 0, ignored: Sequence[int] = (255,)) -> Tensor:
    table = torch.full((256,), _UNKNOWN)
    table[list(ignored)] = IGNORE
    table[first : first + len(numbers)] = torch.tensor(list(numbers))
    return table
