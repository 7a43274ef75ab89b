"""Images with a class for every pixel, read from the folder layouts of common data sets.

Every reader gives pairs of image and mask, the classes, and the meaning of the numbers in a mask. Errors say which
folder was expected and where the data set comes from. `docs/evaluation.md` lists the layouts.
Shapes: H x W pixels, K classes.
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

from brixel.errors import BrixelError
from brixel.evaluate.metrics import IGNORE
from brixel.images.decode import jpeg_hw, open_image_file
from brixel.images.find_images import IMAGE_SUFFIXES
from brixel.utils.fields import check_names

_UNKNOWN = -2  # for numbers that no mask should contain

_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CITYSCAPES = {  # by number in `*_gtFine_labelIds.png`, the 19 classes of the benchmark
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}


@dataclass(frozen=True)
class Sample:
    """The files of an image and of its target: a mask, depth or normals."""

    image: Path
    target: Path


@dataclass(frozen=True)
class ImageDataset:
    """Images with a target for every pixel, read when it is needed.

    Args:
        name: Of the data set.
        samples: Pairs of image and target file.
        read: From a target file to classes (H, W), IGNORE where there is none, or to depth or normals (C, H, W).
        classes: Their names.
    """

    name: str
    samples: Sequence[Sample]
    read: Callable[[Path], Tensor]
    classes: Sequence[str] = ()

    def first(self, count: int | None) -> "ImageDataset":
        """Keep the first images.

        Args:
            count: How many; None for all.

        Returns:
            A data set of these images.
        """
        return dataclasses.replace(self, samples=self.samples[:count])

    def target(self, index: int) -> Tensor:
        """Read the target of an image.

        Args:
            index: Number of the image.

        Returns:
            The labels, depths or normals, as the reader of the data set gives them.

        Raises:
            BrixelError: The file cannot be used, or its aspect is not the image's.
        """
        sample = self.samples[index]
        target = self.read(sample.target)
        with open_image_file(str(sample.image)) as file:
            upright = jpeg_hw(file)
            width, height = file.size
        possible = [upright] if upright else [(height, width), (width, height)]  # only JPEG says so before decoding
        if not any(_same_aspect(image_hw, target.shape[-2:]) for image_hw in possible):
            image_px, target_px = (" x ".join(map(str, size)) for size in (possible[0], target.shape[-2:]))
            raise BrixelError(
                f"{sample.image} has {image_px} px upright, {sample.target} has {target_px}: different aspects, so "
                "they cannot belong together; rotate or crop one like the other"
            )
        return target


def _labelled(name: str, classes: Sequence[str], samples: Sequence[Sample], table: Tensor) -> ImageDataset:
    """A data set of masks; ``table``: (256,), the class of every number in a mask."""

    def read(path: Path) -> Tensor:
        numbers = read_numbers(path)
        known = torch.where(numbers < len(table), table[numbers.clamp(max=len(table) - 1)], _UNKNOWN)
        if (known == _UNKNOWN).any():
            wrong = int(numbers[known == _UNKNOWN][0])
            raise BrixelError(
                f"{path} contains the number {wrong}; expected a class below {len(classes)} of {name}, or the number "
                "for pixels without one; docs/evaluation.md describes the layouts"
            )
        return known

    return ImageDataset(name, samples, read, classes)


def read_numbers(path: Path) -> Tensor:
    """An image of one number per pixel, without applying a palette: (H, W), int64."""
    with Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise BrixelError(f"{path} has mode {image.mode}; expected one whole number per pixel (grey or palette)")
        return torch.from_numpy(np.asarray(image).astype(np.int64))


def plain(folder: Path, split: str) -> ImageDataset:
    """`images/` and `masks/NAME.png` in ``folder/split``: numbers are classes from 0, 255 means none.

    `classes.json` in the same folder or its parent lists the names; without it, the masks say how many there are.
    """
    samples = paired(folder / split, "masks", (".png",))
    paths = (folder / split / "classes.json", folder / split / ".." / "classes.json")
    files = [path for path in paths if path.exists()]
    if files:
        classes = json.loads(files[0].read_text(encoding="utf-8"))
        if not isinstance(classes, list) or not 1 < len(classes) <= 255:
            raise BrixelError(f"{files[0]} is not a list of 2 to 255 names")
    else:
        numbers = (read_numbers(sample.target) for sample in samples)
        count = 1 + max(int(torch.where(mask == 255, 0, mask).max()) for mask in numbers)
        if count == 1:
            raise BrixelError(
                f"the masks of {folder / split} contain only 0 and 255, and 255 means no label; write "
                "classes as 0, 1, 2 and so on (for a black and white mask: 0 and 1)"
            )
        classes = [f"class {number}" for number in range(count)]
    return _labelled(folder.resolve().name, [str(name) for name in classes], samples, _table(range(len(classes))))


def voc2012(root: Path, split: str) -> ImageDataset:
    """Pascal VOC 2012 as unpacked from `VOCtrainval_11-May-2012.tar`: 21 classes; 255, the outlines, means none."""
    where = "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    inner = unpacked(root, "VOCdevkit/VOC2012", "VOC2012")
    listed = inner / "ImageSets" / "Segmentation" / f"{split}.txt"
    need("the list of images of Pascal VOC 2012", where, listed)
    samples = [
        Sample(inner / "JPEGImages" / f"{name}.jpg", inner / "SegmentationClass" / f"{name}.png")
        for name in listed.read_text(encoding="utf-8").split()
    ]
    check_samples(samples, "Pascal VOC 2012", where)
    return _labelled("Pascal VOC 2012", _VOC, samples, _table(range(21)))


def ade20k(root: Path, split: str) -> ImageDataset:
    """ADE20K as unpacked from `ADEChallengeData2016.zip`: 150 classes; 0, "other", means none, i is class i - 1."""
    where = "ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/"
    inner = unpacked(root, "ADEChallengeData2016")
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = inner / "images" / folder, inner / "annotations" / folder
    need("a folder of ADE20K", where, images, masks)
    samples = [Sample(image, masks / f"{image.stem}.png") for image in sorted(images.glob("*.jpg"))]
    check_samples(samples, "ADE20K", where)
    names = inner / "objectInfo150.txt"  # a table with a head; the name is the last column
    lines = names.read_text(encoding="utf-8").splitlines()[1:151] if names.exists() else []
    classes = [line.split("\t")[-1].strip() for line in lines] or [f"class {number}" for number in range(1, 151)]
    return _labelled("ADE20K", classes, samples, _table(range(150), first=1, ignored=[0]))


def cityscapes(root: Path, split: str) -> ImageDataset:
    """Cityscapes, `leftImg8bit/` and `gtFine/` in one folder: the 19 classes of its benchmark out of 34 numbers."""
    where = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (a login)"
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    need("a folder of Cityscapes", where, images, masks)
    samples = [
        Sample(path, masks / path.parent.name / path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png"))
        for path in sorted(images.glob("*/*_leftImg8bit.png"))
    ]
    check_samples(samples, "Cityscapes", where)
    table = torch.full((256,), IGNORE)
    table[list(_CITYSCAPES)] = torch.arange(len(_CITYSCAPES))
    return _labelled("Cityscapes", list(_CITYSCAPES.values()), samples, table)


LAYOUTS = {"plain": plain, "voc2012": voc2012, "ade20k": ade20k, "cityscapes": cityscapes}


def read_labelled(layout: str, root: str | Path, split: str) -> ImageDataset:
    """Read a split of a data set for semantic segmentation.

    Args:
        layout: One of ``LAYOUTS``: "plain", "voc2012", "ade20k", "cityscapes".
        root: The data set's folder.
        split: Its name, such as "train" or "val".

    Returns:
        The images with their masks; masks are read when they are needed.

    Raises:
        BrixelError: The layout is unknown, or files are missing.
    """
    check_names([layout], LAYOUTS, "unknown layout")
    return LAYOUTS[layout](Path(root), split)


def paired(folder: Path, targets: str, endings: Sequence[str]) -> list[Sample]:
    """Images of `images/` with the file of the same stem in ``targets``, sorted by name."""
    where = f"your own images in {folder / 'images'} and {folder / targets}/NAME{' or '.join(endings)}"
    need("a folder of the plain layout", where, folder / "images", folder / targets)
    samples = []
    for image in sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        found = [folder / targets / f"{image.stem}{ending}" for ending in endings]
        samples.append(Sample(image, next((path for path in found if path.exists()), found[0])))
    check_samples(samples, f"images in {folder / 'images'}", where)
    return samples


def unpacked(root: Path, *names: str) -> Path:
    """The first of the folders in ``root`` that an archive unpacks to; ``root`` itself where there is none."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def need(what: str, where: str, *paths: Path) -> None:
    """Raise BrixelError where a file or folder of a data set is missing."""
    if missing := [path for path in paths if not path.exists()]:
        raise BrixelError(f"expected {what} at {missing[0]}, which does not exist; source: {where}")


def check_samples(samples: Sequence[Sample], what: str, where: str) -> None:
    """Raise BrixelError where there are no samples, or a file of one is missing."""
    if not samples:
        raise BrixelError(f"no {what} found; source: {where}")
    missing = [path for sample in samples for path in (sample.image, sample.target) if not path.exists()]
    if missing:
        raise BrixelError(f"{len(missing)} files of {what} are missing, the first {missing[0]}; source: {where}")


def _same_aspect(one_hw: Sequence[int], other_hw: Sequence[int]) -> bool:
    """Whether one is the other resized to whole pixels."""
    return abs(one_hw[0] * other_hw[1] - one_hw[1] * other_hw[0]) <= max(sum(one_hw), sum(other_hw))


def centre_square(target: Tensor) -> Tensor:
    """The centre square of (..., H, W), cut as the crop of the image is."""
    height, width = target.shape[-2:]
    side = min(height, width)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return target[..., top : top + side, left : left + side]


def _table(numbers: Sequence[int], *, first: int = 0, ignored: Sequence[int] = (255,)) -> Tensor:
    table = torch.full((256,), _UNKNOWN)
    table[list(ignored)] = IGNORE
    table[first : first + len(numbers)] = torch.tensor(list(numbers))
    return table
