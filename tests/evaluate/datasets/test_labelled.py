"""Readers on tiny samples of each layout, and what they say of a folder that is not as expected."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.evaluate.datasets.labelled import centre_square, read_labelled
from brixel.images.crops import CropSettings, teacher_crop


def write(path, numbers, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(numbers, dtype=np.uint8))
    if palette:
        image.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    image.save(path)


def photograph(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), "red").save(path)


def test_plain(tmp_path):
    for name in ("b", "a"):
        photograph(tmp_path / "train" / "images" / f"{name}.jpg")
        write(tmp_path / "train" / "masks" / f"{name}.png", [[0, 1, 255], [2, 2, 0]])
    (tmp_path / "train" / "images" / "notes.txt").write_text("no image")
    data = read_labelled("plain", tmp_path, "train")
    assert [sample.image.name for sample in data.samples] == ["a.jpg", "b.jpg"]
    assert data.target(0).tolist() == [[0, 1, -1], [2, 2, 0]]
    assert data.classes == ["class 0", "class 1", "class 2"]
    (tmp_path / "classes.json").write_text(json.dumps(["nothing", "cat"]))
    data = read_labelled("plain", tmp_path / "train", "")
    assert data.classes == ["nothing", "cat"]
    with pytest.raises(BrixelError, match=r"a\.png contains the number 2; expected a class below 2"):
        data.target(0)


def test_black_and_white_masks_are_no_classes(tmp_path):
    photograph(tmp_path / "val" / "images" / "a.jpg")
    write(tmp_path / "val" / "masks" / "a.png", [[0, 255, 255], [0, 0, 255]])
    with pytest.raises(BrixelError, match="contain only 0 and 255, and 255 means no label"):
        read_labelled("plain", tmp_path, "val")


def test_a_mask_of_another_shape_is_refused(tmp_path):
    image, mask = tmp_path / "val" / "images" / "a.jpg", tmp_path / "val" / "masks" / "a.png"
    for size, turned, mask_hw, fits in (
        ((30, 20), False, (20, 30), True),
        ((31, 20), False, (10, 15), True),  # resized, to whole pixels
        ((30, 20), False, (30, 20), False),
        ((30, 20), True, (30, 20), True),
        ((30, 20), True, (20, 30), False),
        ((300, 200), False, (20, 64), False),
    ):
        image.parent.mkdir(parents=True, exist_ok=True)
        drawn, exif = Image.new("RGB", size), Image.Exif()
        if turned:
            exif[0x0112] = 6
        drawn.save(image, exif=exif)
        write(mask, np.arange(mask_hw[0] * mask_hw[1]).reshape(mask_hw) % 2)
        data = read_labelled("plain", tmp_path, "val")
        if fits:
            assert data.target(0).shape == mask_hw
        else:
            with pytest.raises(BrixelError, match=r"a\.jpg has .* px upright, .*a\.png has .*: different aspects"):
                data.target(0)


def test_voc(tmp_path):
    inner = tmp_path / "VOCdevkit" / "VOC2012"
    photograph(inner / "JPEGImages" / "2007_000033.jpg")
    write(inner / "SegmentationClass" / "2007_000033.png", [[0, 20, 255], [15, 1, 0]], palette=True)
    (inner / "ImageSets" / "Segmentation").mkdir(parents=True)
    (inner / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000033\n")
    for root in (tmp_path, tmp_path / "VOCdevkit", inner):
        data = read_labelled("voc2012", root, "val")
        assert data.target(0).tolist() == [[0, 20, -1], [15, 1, 0]]
    assert (len(data.classes), data.classes[15], data.classes[20]) == (21, "person", "tvmonitor")
    with pytest.raises(BrixelError, match=r"train\.txt, which does not exist; source: VOCtrainval"):
        read_labelled("voc2012", tmp_path, "train")
    (inner / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000033\n2007_000042\n")
    with pytest.raises(BrixelError, match=r"2 files of Pascal VOC 2012 are missing, the first .*2007_000042\.jpg"):
        read_labelled("voc2012", tmp_path, "val")


def test_ade20k(tmp_path):
    inner = tmp_path / "ADEChallengeData2016"
    photograph(inner / "images" / "validation" / "ADE_val_00000001.jpg")
    write(inner / "annotations" / "validation" / "ADE_val_00000001.png", [[0, 1, 150], [3, 3, 0]])
    data = read_labelled("ade20k", tmp_path, "val")
    assert data.target(0).tolist() == [[-1, 0, 149], [2, 2, -1]]
    assert (len(data.classes), data.classes[0]) == (150, "class 1")
    rows = [f"{number}\t0.1\t5\t2\tthing {number}, other word" for number in range(1, 151)]
    (inner / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert read_labelled("ade20k", inner, "val").classes[149] == "thing 150, other word"
    write(inner / "annotations" / "validation" / "ADE_val_00000001.png", [[151]])
    with pytest.raises(BrixelError, match="contains the number 151"):
        data.target(0)
    with pytest.raises(BrixelError, match=r"training, which does not exist; source: ADEChallengeData2016\.zip"):
        read_labelled("ade20k", tmp_path, "train")


def test_cityscapes(tmp_path):
    photograph(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    mask = tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
    write(mask, [[7, 8, 33], [0, 29, 255]])
    data = read_labelled("cityscapes", tmp_path, "val")
    assert data.target(0).tolist() == [[0, 1, 18], [-1, -1, -1]]  # 29 is "caravan", 255 a licence plate
    assert [data.classes[number] for number in (0, 13, 18)] == ["road", "car", "bicycle"]
    mask.unlink()
    with pytest.raises(BrixelError, match="1 files of Cityscapes are missing.*a login"):
        read_labelled("cityscapes", tmp_path, "val")


def test_what_is_not_there(tmp_path):
    with pytest.raises(BrixelError, match="unknown layout 'voc'; did you mean 'voc2012'"):
        read_labelled("voc", tmp_path, "val")
    with pytest.raises(BrixelError, match=r"expected a folder of the plain layout at .*images, which does not exist"):
        read_labelled("plain", tmp_path, "")
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(BrixelError, match="no images in .*images found"):
        read_labelled("plain", tmp_path, "")
    photograph(tmp_path / "images" / "a.png")
    photograph(tmp_path / "masks" / "a.png")
    with pytest.raises(BrixelError, match=r"masks.a\.png has mode RGB; expected one whole number per pixel"):
        read_labelled("plain", tmp_path, "")


@pytest.mark.parametrize("image_hw", [(5, 8), (8, 5), (7, 7), (6, 9)])
def test_targets_are_cut_as_images_are(image_hw):
    planes = torch.rand(3, *image_hw)
    side = min(image_hw)
    settings = CropSettings(4 * side, random=False)
    expected = teacher_crop(planes, settings, torch.Generator())
    square = centre_square(planes)
    again = teacher_crop(square, settings, torch.Generator())
    assert square.shape == (3, side, side)
    assert torch.equal(again, expected)


def test_no_ending_of_an_image_is_passed_over_and_no_line_counts_twice(tmp_path):
    images, masks = tmp_path / "ade" / "images" / "validation", tmp_path / "ade" / "annotations" / "validation"
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for number, ending in enumerate(("jpg", "jpeg", "JPG", "png")):
        Image.new("RGB", (8, 8)).save(images / f"{number}.{ending}")
        Image.new("L", (8, 8), 1).save(masks / f"{number}.png")
    assert len(read_labelled("ade20k", tmp_path / "ade", "val").samples) == 4
    inner = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (inner / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(inner / "JPEGImages" / "a.jpg")
    Image.new("P", (8, 8)).save(inner / "SegmentationClass" / "a.png")
    (inner / "ImageSets" / "Segmentation" / "val.txt").write_text("a\na\n")
    assert len(read_labelled("voc2012", tmp_path, "val").samples) == 1
