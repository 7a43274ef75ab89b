"""Images with a class for every pixel, read from the folder layouts of common data sets.

Every reader gives pairs of image and mask, the classes, and the meaning of the numbers in a mask. Errors say which
folder was expected and where the data set comes from. `docs/evaluation.md` lists the layouts.
Shapes: H x W pixels, K classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.images.find_images import IMAGE_SUFFIXES, is_hidden
from brixel.images.target_files import check_aspect, read_black_and_white, read_numbers, read_palette
from brixel.probe.label_images import voc_colour
from brixel.probe.metrics import IGNORE
from brixel.utils.contained_paths import path_below
from brixel.utils.fields import check_field, check_names, path_like, short_repr, text
from brixel.utils.structured_files import read_bounded, read_json_value

NONE = 255
"""The number of pixels without a class, in most data sets."""

_UNKNOWN = -2  # for numbers that no mask should contain
_VOC_MASKS = ("SegmentationClass", "SegmentationClassAug")  # the second is SBD's, in the format of the first
_MOST_BYTES = 2**26  # of a list of images
_CITYSCAPES_NUMBERS = 34
_SEVERAL = 6  # different numbers in the masks of Cityscapes: among as many there is one above 18
_TRAIN_IDS = (
    "these look like trainIds, which number the 19 classes of the benchmark from 0; expected labelIds, 0 to 33, as in "
    "gtFine_trainvaltest.zip"
)

_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_CITYSCAPES = {  # by number in `*_gtFine_labelIds.png`, the 19 classes of the benchmark
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
_LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agriculture")
_LOVEDA_SCENES = ("Rural", "Urban")
_HELD_OUT = 5  # of Kvasir-SEG without lists, one image in five is for validation


@dataclass(frozen=True)
class Sample:
    """The files of an image and of its target: a mask, depth or normals."""

    image: Path
    target: Path


@dataclass(frozen=True)
class LabelledDataset:
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

    def first(self, count: int | None) -> "LabelledDataset":
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
        check_aspect(sample.image, sample.target, target.shape[-2:])
        return target


def _distinct(numbers: Tensor) -> Tensor:
    """The numbers in a mask, each once, ascending."""
    low, high = numbers.aminmax()
    if low < 0 or high >= 2**16:
        return numbers.unique()
    return torch.bincount(numbers.flatten()).nonzero()[:, 0]


Variant = Callable[[Path, Tensor], str | None]
"""From a mask's file and its numbers, each once, to what variant of the format it is; None where it is none."""


def _labelled(
    name: str, classes: Sequence[str], samples: Sequence[Sample], table: Tensor, variant: Variant = lambda *_: None
) -> LabelledDataset:
    """A data set of masks.

    Args:
        name: Of the data set.
        classes: Their names.
        samples: The files.
        table: (256,), the class of every number in a mask, IGNORE or _UNKNOWN.
        variant: Recognises masks in another variant of the format.
    """

    def read(path: Path) -> Tensor:
        numbers = read_numbers(path)
        found = _distinct(numbers)
        if explanation := variant(path, found):
            raise BrixelError(f"{path}: {explanation}; docs/evaluation.md describes the layouts")
        inside = (found >= 0) & (found < len(table))
        known = inside & (table[found.clamp(0, len(table) - 1)] != _UNKNOWN)
        if not known.all():
            raise BrixelError(
                f"{path} contains the number {int(found[~known][0])}; expected a class below {len(classes)} of {name}, "
                "or the number for pixels without one; docs/evaluation.md describes the layouts"
            )
        return table[numbers]

    return LabelledDataset(name, samples, read, classes)


def plain(folder: Path, split: str) -> LabelledDataset:
    """`images/` and `masks/NAME.png` in ``folder/split``: numbers are classes from 0, 255 means none.

    `classes.json` in the same folder or its parent lists the names; without it, the masks say how many there are.
    """
    samples = paired(folder / split, "masks", (".png",))
    paths = (folder / split / "classes.json", folder / split / ".." / "classes.json")
    files = [path for path in paths if path.exists()]
    if files:
        classes = read_json_value(files[0])
        if not isinstance(classes, list) or not 1 < len(classes) <= NONE:
            raise BrixelError(f"{files[0]} is not a list of 2 to {NONE} names")
    else:
        count = 1 + max(_highest_class(sample.target) for sample in samples)
        if count == 1:
            raise BrixelError(
                f"the masks of {folder / split} contain only 0 and 255, and 255 means no label; write "
                "classes as 0, 1, 2 and so on (for a black and white mask: 0 and 1)"
            )
        classes = [f"class {number}" for number in range(count)]
    return _labelled(folder.resolve().name, [str(name) for name in classes], samples, _table(range(len(classes))))


def _highest_class(path: Path) -> int:
    numbers = _distinct(read_numbers(path))
    if wrong := numbers[(numbers < 0) | (numbers > NONE)].tolist():
        raise BrixelError(
            f"{path} contains the number {wrong[0]}; expected classes from 0 to {NONE - 1}, and {NONE} for none: give "
            "the classes smaller numbers"
        )
    return int(numbers[numbers != NONE].amax()) if (numbers != NONE).any() else 0


def voc2012(root: Path, split: str) -> LabelledDataset:
    """Pascal VOC 2012 as unpacked from `VOCtrainval_11-May-2012.tar`: 21 classes; 255, the outlines, means none."""
    where = "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    inner = unpacked(root, "VOCdevkit/VOC2012", "VOC2012")
    listed = inner / "ImageSets" / "Segmentation" / f"{split}.txt"
    need("the list of images of Pascal VOC 2012", where, listed)
    samples = _voc_samples(inner, listed)
    check_samples(samples, "Pascal VOC 2012", where)
    return _labelled("Pascal VOC 2012", _VOC, samples, _table(range(21)), _explain_voc)


def _voc_samples(inner: Path, listed: Path) -> list[Sample]:
    """The images of a list of names; or, as those of SBD's "trainaug" are written, of paths of image and mask."""
    samples = []
    for number, line in enumerate(list_lines(listed), 1):
        paths = [path.lstrip("/") for path in line.replace("\\", "/").split()]
        if len(paths) > 2:
            raise BrixelError(
                f"line {number} of {listed} is {short_repr(line)}; expected a name, or an image and a mask"
            )
        if paths:
            image = paths[0] if "/" in paths[0] else f"JPEGImages/{paths[0].removesuffix('.jpg')}.jpg"
            masks = paths[1:] or [f"{folder}/{Path(image).stem}.png" for folder in _VOC_MASKS]
            places = [path_below(inner, mask, listed) for mask in masks]
            mask = next((place for place in places if place.exists()), places[0])
            samples.append(Sample(path_below(inner, image, listed), mask))
    return list(dict.fromkeys(samples))  # a line may stand there twice


def list_lines(path: Path) -> list[str]:
    """The lines of a list, such as that of a split. Raises BrixelError where it is no text."""
    try:
        return read_bounded(path, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BrixelError(f"{path} is no text in UTF-8 ({error}); fetch it again") from error


def _explain_voc(path: Path, numbers: Tensor) -> str | None:
    """Masks may have the colours of VOC under other numbers, as programs write that only care for the colours."""
    palette = read_palette(path)
    if palette is None:
        return None
    used = [number for number in numbers.tolist() if 0 <= number < len(palette)]
    ours = {tuple(voc_colour(number)): number for number in (*range(21), NONE)}
    meant = [ours.get(tuple(palette[number].tolist())) for number in used]
    if None in meant or meant == used:
        return None
    number, other = next((number, other) for number, other in zip(used, meant, strict=True) if number != other)
    return (
        f"it has the colour of class {other} under the number {number}: a program has sorted its palette; take the "
        "file from the archive"
    )


def ade20k(root: Path, split: str) -> LabelledDataset:
    """ADE20K as unpacked from `ADEChallengeData2016.zip`: 150 classes; 0, "other", means none, i is class i - 1."""
    where = "ADEChallengeData2016.zip from http://data.csail.mit.edu/places/ADEchallenge/"
    inner = unpacked(root, "ADEChallengeData2016")
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = inner / "images" / folder, inner / "annotations" / folder
    need("a folder of ADE20K", where, images, masks)
    samples = [Sample(image, masks / f"{image.stem}.png") for image in _images_in(images)]
    check_samples(samples, "ADE20K", where)
    names = inner / "objectInfo150.txt"  # a table with a head; the name is the last column
    lines = list_lines(names)[1:151] if names.exists() else []
    if lines and len(lines) < 150:
        raise BrixelError(f"{names} lists {len(lines)} classes; expected a heading and 150; source: {where}")
    classes = [line.split("\t")[-1].strip() for line in lines] or [f"class {number}" for number in range(1, 151)]
    return _labelled("ADE20K", classes, samples, _table(range(150), first=1, ignored=[0]), _explain_ade20k)


def _explain_ade20k(_: Path, numbers: Tensor) -> str | None:
    if (numbers == NONE).any() and ((numbers < 150) | (numbers == NONE)).all():
        return f"{NONE} is none, so these look like numbers that were reduced by one; expected 1 to 150, and 0 for none"
    return None


def cityscapes(root: Path, split: str) -> LabelledDataset:
    """Cityscapes, `leftImg8bit/` and `gtFine/` in one folder: the 19 classes of its benchmark out of 34 numbers."""
    where = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (a login)"
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    need("a folder of Cityscapes", where, images, masks)
    samples = [
        Sample(path, masks / path.parent.name / path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png"))
        for path in visible_files(images, "*/*_leftImg8bit.png")
    ]
    check_samples(samples, "Cityscapes", where)
    table = torch.full((256,), _UNKNOWN)
    table[[*range(_CITYSCAPES_NUMBERS), NONE]] = IGNORE
    table[list(_CITYSCAPES)] = torch.arange(len(_CITYSCAPES))
    data = _labelled("Cityscapes", list(_CITYSCAPES.values()), samples, table, _explain_cityscapes)
    some = torch.cat([_distinct(read_numbers(sample.target)) for sample in a_few(samples)]).unique()
    if len(some) >= _SEVERAL and some.max() < len(_CITYSCAPES):
        raise BrixelError(f"{samples[0].target} and others contain no number above 18: {_TRAIN_IDS}")
    return data


def _explain_cityscapes(_: Path, numbers: Tensor) -> str | None:
    rest = numbers[numbers != NONE]
    if len(rest) < len(numbers) and (rest < len(_CITYSCAPES)).all():
        return _TRAIN_IDS
    if (numbers >= 1000).any():
        return "these look like instanceIds, 1000 times the number and more; expected *_gtFine_labelIds.png"
    return None


def loveda(root: Path, split: str) -> LabelledDataset:
    """LoveDA as unpacked from `Train.zip` and `Val.zip`: 7 classes; 0 means none, i is class i - 1.

    "train" and "val" hold rural and urban scenes; "train-rural", "val-urban" and so on those of one kind.
    """
    where = "Train.zip and Val.zip from https://zenodo.org/records/5706578"
    inner = unpacked(root, "LoveDA", "2021LoveDA")
    name, _, scene = split.partition("-")
    scenes = [scene.capitalize()] if scene else list(_LOVEDA_SCENES)
    if not set(scenes) <= set(_LOVEDA_SCENES):
        raise BrixelError(f"LoveDA has no split {split!r}; expected train or val, or one kind of scene as in val-urban")
    samples = []
    for kind in scenes:
        images = inner / name.capitalize() / kind / "images_png"
        masks = images.with_name("masks_png")
        need("a folder of LoveDA (its test scenes have no masks)", where, images, masks)
        samples += [Sample(image, masks / image.name) for image in _images_in(images)]
    check_samples(samples, "LoveDA", where)
    table = _table(range(len(_LOVEDA)), first=1, ignored=[0])
    return _labelled("LoveDA", _LOVEDA, samples, table, _explain_loveda)


def _explain_loveda(_: Path, numbers: Tensor) -> str | None:
    if (numbers == NONE).any() and ((numbers < len(_LOVEDA)) | (numbers == NONE)).all():
        return f"{NONE} is none, so these look like numbers that were reduced by one; expected 1 to 7, and 0 for none"
    return None


def kvasir_seg(root: Path, split: str) -> LabelledDataset:
    """Kvasir-SEG as unpacked from `kvasir-seg.zip`: polyp or not; its masks are JPEGs, white from 128 up.

    Its authors' lists `train.txt` and `val.txt` are followed where they lie in its folder. Otherwise every fifth image
    by name, beginning with the fifth, is "val", and the others are "train".
    """
    where = "kvasir-seg.zip from https://datasets.simula.no/kvasir-seg/"
    inner = unpacked(root, "Kvasir-SEG/Kvasir-SEG", "Kvasir-SEG")
    images, masks, listed = inner / "images", inner / "masks", inner / f"{split}.txt"
    need("a folder of Kvasir-SEG", where, images, masks)
    found = _images_in(images)
    if listed.exists():
        stems = dict.fromkeys(Path(line.strip()).stem for line in list_lines(listed) if line.strip())
        by_stem = {image.stem: image for image in found}
        found = [by_stem.get(stem, images / f"{stem}.jpg") for stem in stems]
    elif split in ("train", "val"):
        found = [image for number, image in enumerate(found, 1) if (number % _HELD_OUT == 0) == (split == "val")]
    else:
        raise BrixelError(f"expected a list of images of Kvasir-SEG at {listed}; without lists it has train and val")
    return _black_and_white("Kvasir-SEG", "polyp", [Sample(image, masks / image.name) for image in found], where)


def isic2018(root: Path, split: str) -> LabelledDataset:
    """Task 1 of ISIC 2018: lesion or not. Splits "train", "val" and "test" are its own, in its archives' folders."""
    where = (
        "ISIC2018_Task1-2_*_Input.zip and ISIC2018_Task1_*_GroundTruth.zip from https://challenge.isic-archive.com/data"
    )
    name = {"train": "Training", "val": "Validation", "test": "Test"}.get(split, split)
    images, masks = root / f"ISIC2018_Task1-2_{name}_Input", root / f"ISIC2018_Task1_{name}_GroundTruth"
    need("a folder of ISIC 2018, task 1", where, images, masks)
    samples = [Sample(image, masks / f"{image.stem}_segmentation.png") for image in _images_in(images)]
    return _black_and_white("ISIC 2018, task 1", "lesion", samples, where)


def glas(root: Path, split: str) -> LabelledDataset:
    """GlaS, the glands of the Warwick-QU data set: gland or not, from masks that number the glands of an image.

    "train" is its own; "val" are both of its tests, "testA" and "testB" one of them.
    """
    where = "the archive of https://warwick.ac.uk/fac/cross_fac/tia/data/glascontest/"
    inner = unpacked(root, "Warwick QU Dataset (Released 2016_07_08)", "Warwick_QU_Dataset")
    need("a folder of GlaS", where, inner)
    prefix = {"val": "test"}.get(split, split)
    images = [path for path in visible_files(inner, f"{prefix}*.bmp") if not path.stem.endswith("_anno")]
    samples = [Sample(image, image.with_name(f"{image.stem}_anno.bmp")) for image in images]
    check_samples(samples, f"images of GlaS named {prefix}*.bmp in {inner}", where)
    return LabelledDataset("GlaS", samples, lambda path: (read_numbers(path) > 0).long(), ("background", "gland"))


def _black_and_white(name: str, what: str, samples: Sequence[Sample], where: str) -> LabelledDataset:
    """A data set of masks in black and white."""
    check_samples(samples, name, where)
    return LabelledDataset(name, samples, read_black_and_white, ("background", what))


LAYOUTS = {
    **{"plain": plain, "voc2012": voc2012, "ade20k": ade20k, "cityscapes": cityscapes},
    **{"loveda": loveda, "kvasir-seg": kvasir_seg, "isic2018": isic2018, "glas": glas},
}


def read_labelled(layout: str, root: str | Path, split: str) -> LabelledDataset:
    """Read a split of a data set for semantic segmentation.

    Args:
        layout: One of ``LAYOUTS``: "plain", "voc2012", "ade20k", "cityscapes", "loveda", "kvasir-seg", "isic2018",
            "glas".
        root: The data set's folder.
        split: Its name, such as "train" or "val".

    Returns:
        The images with their masks; masks are read when they are needed.

    Raises:
        BrixelError: The layout is unknown, or files are missing.
    """
    check_names([layout], LAYOUTS, "unknown layout")
    return LAYOUTS[layout](check_field("root", root, path_like()), check_field("split", split, text(empty=True)))


def paired(folder: Path, targets: str, endings: Sequence[str]) -> list[Sample]:
    """Images of `images/` with the file of the same stem in ``targets``, sorted by name."""
    where = f"your own images in {folder / 'images'} and {folder / targets}/NAME{' or '.join(endings)}"
    need("a folder of the plain layout", where, folder / "images", folder / targets)
    samples = []
    for image in _images_in(folder / "images"):
        found = [folder / targets / f"{image.stem}{ending}" for ending in endings]
        samples.append(Sample(image, next((path for path in found if path.exists()), found[0])))
    check_samples(samples, f"images in {folder / 'images'}", where)
    return samples


def _images_in(folder: Path) -> list[Path]:
    return [path for path in visible_files(folder, "*") if path.suffix.lower() in IMAGE_SUFFIXES]


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """What a pattern finds below a folder, sorted, without hidden files and what is in hidden folders."""
    found = folder.glob(pattern)
    return sorted(path for path in found if not any(is_hidden(Path(part)) for part in path.relative_to(folder).parts))


def a_few(samples: Sequence[Sample]) -> list[Sample]:
    """Some samples from all over a data set, to look at before the work begins."""
    return list(samples[:: max(1, -(-len(samples) // 4))])


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


def centre_square(target: Tensor) -> Tensor:
    """The centre square of (..., H, W), cut as the crop of the image is."""
    height, width = target.shape[-2:]
    side = min(height, width)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return target[..., top : top + side, left : left + side]


def _table(numbers: Sequence[int], *, first: int = 0, ignored: Sequence[int] = (NONE,)) -> Tensor:
    table = torch.full((256,), _UNKNOWN)
    table[list(ignored)] = IGNORE
    table[first : first + len(numbers)] = torch.tensor(list(numbers))
    return table
