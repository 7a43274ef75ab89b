"""Data sets in other variants than their readers expect: what is named, and what is read all the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from brixel import BrixelError
from brixel.errors import DamagedFileError
from brixel.evaluate.datasets.depth_normals import read_measured
from brixel.evaluate.datasets.labelled import read_labelled
from brixel.evaluate.tasks import Task
from brixel.images import target_files

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)
RNG = np.random.default_rng(0)


def photograph(path, size=(48, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)


def write(path, numbers, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(numbers, dtype=dtype)).save(path)


def some(values):
    """A mask that holds all of some numbers."""
    return np.resize(np.array(values), (40, 48))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# ---------------------------------------------------------------- hidden files


def test_hidden_files_are_no_part_of_any_data_set(tmp_path):
    mask, depth = some([0, 1, 2]), some([900, 2000])
    photograph(tmp_path / "pl/t/images/a.jpg")
    write(tmp_path / "pl/t/masks/a.png", mask)
    photograph(tmp_path / "ade/images/validation/x.jpg")
    write(tmp_path / "ade/annotations/validation/x.png", mask)
    photograph(tmp_path / "city/leftImg8bit/val/u/u_leftImg8bit.png")
    write(tmp_path / "city/gtFine/val/u/u_gtFine_labelIds.png", mask)
    photograph(tmp_path / "nyu/test/k/rgb_1.jpg")
    write(tmp_path / "nyu/test/k/sync_depth_1.png", depth, np.uint16)
    photograph(tmp_path / "navi/duck/wild_set/images/0.jpg")
    write(tmp_path / "navi/duck/wild_set/depth/0.png", depth, np.uint16)
    photograph(tmp_path / "dsine/nyuv2/test/0_img.png")
    photograph(tmp_path / "dsine/nyuv2/test/0_normal.png")
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.with_name("._" + path.name).write_bytes(APPLE_DOUBLE)
    for top in list(tmp_path.iterdir()):
        for folder in [path for path in top.rglob("*") if path.is_dir() and path.name in ("u", "k", "duck")]:
            shutil.copytree(folder, folder.with_name("." + folder.name))
    read = [
        read_labelled("plain", tmp_path / "pl", "t"),
        read_labelled("ade20k", tmp_path / "ade", "val"),
        read_labelled("cityscapes", tmp_path / "city", "val"),
        read_measured("depth", "nyuv2", tmp_path / "nyu", "val"),
        read_measured("depth", "navi", tmp_path / "navi", "val"),
        read_measured("normals", "nyuv2", tmp_path / "dsine", "val"),
    ]
    assert [len(data.samples) for data in read] == [1] * 6


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path):
    photograph(tmp_path / ".data/t/images/a.jpg")
    write(tmp_path / ".data/t/masks/a.png", some([0, 1]))
    assert len(read_labelled("plain", tmp_path / ".data", "t").samples) == 1


# ---------------------------------------------------------------- numbers of masks


@pytest.fixture
def city(tmp_path):
    """A function that writes a mask of Cityscapes and reads it."""
    photograph(tmp_path / "leftImg8bit/val/u/u_leftImg8bit.png")

    def read(values, dtype=np.uint8):
        write(tmp_path / "gtFine/val/u/u_gtFine_labelIds.png", some(values), dtype)
        return read_labelled("cityscapes", tmp_path, "val").target(0)

    return read


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([*range(19), 255], "look like trainIds"),
        (range(19), "look like trainIds"),
        ([0, 255], "look like trainIds"),
        ([0, 1, 2, 8, 10, 13], "look like trainIds"),
        ([7, 8, 200], "contains the number 200; expected a class below 19 of Cityscapes"),
        ([7, 34], "contains the number 34"),
        ([7, 26001], "look like instanceIds"),
    ],
)
def test_other_numbers_of_cityscapes_are_named(city, values, message):
    with pytest.raises(BrixelError, match=message):
        city(values, np.uint16)


@pytest.mark.parametrize("values", [range(34), [1, 2, 3, 4, 7, 8, 11, 17, 23], [7, 8], [7, 33, 255]])
def test_numbers_of_cityscapes_are_read(city, values):
    assert city(values).max() >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([*range(150), 255], "look like numbers that were reduced by one"),
        ([3, 255], "look like numbers that were reduced by one"),
        ([3, 150, 255], "contains the number 255"),
        ([3, 151], "contains the number 151"),
    ],
)
def test_other_numbers_of_ade20k_are_named(tmp_path, values, message):
    photograph(tmp_path / "images/validation/x.jpg")
    write(tmp_path / "annotations/validation/x.png", some(values))
    with pytest.raises(BrixelError, match=message):
        read_labelled("ade20k", tmp_path, "val").target(0)


@pytest.mark.parametrize(
    ("content", "message"), [(b"Name\n1\twall\n", "lists 1 classes"), (b"\xff", "no text in UTF-8")]
)
def test_names_of_ade20k_that_are_not_whole(tmp_path, content, message):
    photograph(tmp_path / "images/validation/x.jpg")
    write(tmp_path / "annotations/validation/x.png", some([0, 1]))
    (tmp_path / "objectInfo150.txt").write_bytes(content)
    with pytest.raises(BrixelError, match=rf"objectInfo150\.txt {'is ' * ('text' in message)}{message}"):
        read_labelled("ade20k", tmp_path, "val")


@pytest.mark.parametrize("number", [256, 300, 1000, 65535])
def test_plain_masks_of_more_classes_than_are_read(tmp_path, number):
    photograph(tmp_path / "t/images/a.jpg")
    write(tmp_path / "t/masks/a.png", some([0, 1, number]), np.uint16)
    with pytest.raises(BrixelError, match=rf"contains the number {number}; expected classes from 0 to 254, and 255"):
        read_labelled("plain", tmp_path, "t")
    (tmp_path / "classes.json").write_text('["a", "b"]')
    with pytest.raises(BrixelError, match=rf"contains the number {number}; expected a class below 2"):
        read_labelled("plain", tmp_path, "t").target(0)


def test_plain_masks_of_16_bits_are_read(tmp_path):
    photograph(tmp_path / "t/images/a.jpg")
    write(tmp_path / "t/masks/a.png", some([0, 1, 254, 255]), np.uint16)
    data = read_labelled("plain", tmp_path, "t")
    assert (len(data.classes), data.target(0).unique().tolist()) == (255, [-1, 0, 1, 254])


def test_numbers_below_0_are_refused(tmp_path):
    photograph(tmp_path / "t/images/a.jpg")
    (tmp_path / "t/masks").mkdir()
    Image.fromarray(some([0, 1, -1]).astype(np.int32)).save(tmp_path / "t/masks/a.png", "TIFF")
    with pytest.raises(BrixelError, match="contains the number -1; expected"):
        read_labelled("plain", tmp_path, "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100000, "is nested deeper"),
        ('{"0": "a"}', "is not a list of 2 to 255 names"),
        ('["a"]', "is not a list of 2 to 255 names"),
        ('"abc"', "is not a list of 2 to 255 names"),
    ],
)
def test_names_of_classes_that_are_no_list(tmp_path, content, message):
    photograph(tmp_path / "t/images/a.jpg")
    write(tmp_path / "t/masks/a.png", some([0, 1]))
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(BrixelError, match=rf"classes\.json {message}"):
        read_labelled("plain", tmp_path, "t")


# ---------------------------------------------------------------- files of masks


def save_mask(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


MASK = Image.fromarray(some([0, 1, 2]).astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (MASK.convert("RGB"), {}, "has mode RGB; expected one whole number per pixel .*its channels are equal"),
        (Image.new("RGBA", (48, 40), "red"), {}, "has mode RGBA; .*looks like a mask for people, with a colour for"),
        (MASK.convert("LA"), {}, "has mode LA; expected one whole number per pixel .grey or palette."),
        (MASK, {"format": "JPEG"}, "is a JPEG, whose compression changes the numbers"),
        (MASK, {"exif": turned(6)}, "has the EXIF orientation 6"),
    ],
)
def test_files_that_are_no_masks_are_named(tmp_path, image, options, message):
    photograph(tmp_path / "t/images/a.jpg")
    save_mask(image, tmp_path / "t/masks/a.png", **options)
    with pytest.raises(BrixelError, match=rf"a\.png {message}"):
        read_labelled("plain", tmp_path, "t")


@pytest.mark.parametrize("content", [b"", b"text", APPLE_DOUBLE, None])
def test_damaged_masks_are_named(tmp_path, content):
    photograph(tmp_path / "t/images/a.jpg")
    path = tmp_path / "t/masks/a.png"
    write(path, RNG.integers(0, 5, (40, 48)))
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(BrixelError, match=r"a\.png"):
        read_labelled("plain", tmp_path, "t")


# ---------------------------------------------------------------- image and target


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("orientation", "mask_wh", "fits"),
    [(1, (48, 40), True), (1, (40, 48), False), (6, (40, 48), True), (6, (48, 40), False), (8, (48, 40), False)],
)
def test_a_mask_lies_on_the_image_as_exif_turns_it(tmp_path, ending, orientation, mask_wh, fits):
    photograph(tmp_path / f"t/images/a.{ending}", exif=turned(orientation))
    write(tmp_path / "t/masks/a.png", np.resize([0, 1], mask_wh[::-1]))
    data = read_labelled("plain", tmp_path, "t")
    if fits:
        assert data.target(0).shape == mask_wh[::-1]
        return
    with pytest.raises(BrixelError, match="different aspects") as raised:
        data.target(0)
    assert (f"the EXIF orientation {orientation} of the image is applied" in str(raised.value)) == (orientation != 1)


def test_the_orientation_behind_the_pixels_of_a_png_is_seen(tmp_path):
    path = tmp_path / "t/images/a.png"
    photograph(path)
    content = path.read_bytes()
    chunks = turned(6).tobytes().removeprefix(b"Exif\x00\x00")
    end = content.rindex(b"IEND") - 4
    with path.open("wb") as file:
        file.write(content[:end])
        PngImagePlugin.putchunk(file, b"eXIf", chunks)
        file.write(content[end:])
    write(tmp_path / "t/masks/a.png", some([0, 1]))
    with pytest.raises(BrixelError, match="the EXIF orientation 6 of the image is applied"):
        read_labelled("plain", tmp_path, "t").target(0)


@pytest.mark.parametrize(("orientation", "size"), [(3, (48, 40)), (2, (48, 40)), (6, (40, 40))])
def test_where_the_sizes_cannot_tell_a_warning_says_what_is_assumed(tmp_path, caplog, orientation, size):
    target_files._warn_once.cache_clear()
    for name in ("a", "b"):
        photograph(tmp_path / f"t/images/{name}.jpg", size, exif=turned(orientation))
        write(tmp_path / f"t/masks/{name}.png", np.resize([0, 1], size[::-1]))
    data = read_labelled("plain", tmp_path, "t")
    for index in range(2):
        data.target(index)
    assert caplog.text.count(f"such as a.jpg, are turned by their EXIF orientation ({orientation}), and their tar") == 1


# ---------------------------------------------------------------- lists and palettes of VOC


@pytest.fixture
def voc(tmp_path):
    """A function that writes a list of VOC and reads it; masks of p0 and p1 in both folders, of p2 in SBD's alone."""
    inner = tmp_path / "VOC2012"
    for number in range(3):
        photograph(inner / f"JPEGImages/p{number}.jpg")
        write(inner / f"SegmentationClassAug/p{number}.png", some([0, 15, 255]))
        if number < 2:
            write(inner / f"SegmentationClass/p{number}.png", some([0, 15, 255]))
    (inner / "ImageSets/Segmentation").mkdir(parents=True)

    def read(text):
        content = text if isinstance(text, bytes) else text.encode()
        (inner / "ImageSets/Segmentation/trainaug.txt").write_bytes(content)
        samples = read_labelled("voc2012", tmp_path, "trainaug").samples
        return [(sample.image.stem, sample.target.parent.name) for sample in samples]

    return read


OURS, SBD = "SegmentationClass", "SegmentationClassAug"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p0\np2\n", [("p0", OURS), ("p2", SBD)]),
        ("p0\r\n\r\np1\r\n", [("p0", OURS), ("p1", OURS)]),
        ("\ufeffp0\n  \n\np1", [("p0", OURS), ("p1", OURS)]),
        ("p0.jpg\n", [("p0", OURS)]),
        ("/JPEGImages/p0.jpg /SegmentationClassAug/p0.png\n", [("p0", SBD)]),
        ("JPEGImages/p0.jpg\tSegmentationClass/p0.png\r\n", [("p0", OURS)]),
        ("\\JPEGImages\\p1.jpg \\SegmentationClassAug\\p1.png\n", [("p1", SBD)]),
        ("/JPEGImages/p2.jpg\n", [("p2", SBD)]),
    ],
)
def test_lists_of_voc_as_others_write_them(voc, text, expected):
    assert voc(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p0 1 x\n", "line 1 of .*trainaug.txt is 'p0 1 x'; expected a name, or an image and a mask"),
        ("p0\n../../p1.jpg x.png\n", "names a file outside of its folder: '../../p1.jpg'"),
        ("p0 -1\n", "1 files of Pascal VOC 2012 are missing, the first .*-1"),
        ("p9\n", r"2 files of Pascal VOC 2012 are missing, the first .*p9\.jpg"),
        ("\n\n", "no Pascal VOC 2012 found"),
        (b"p\xff\n", "is no text in UTF-8"),
        (b"p\x00\n", "expected a relative path"),
    ],
)
def test_lists_of_voc_that_are_refused(voc, text, message):
    with pytest.raises(BrixelError, match=message):
        voc(text)


def test_a_palette_that_a_program_sorted_is_named(tmp_path):
    inner = tmp_path / "VOC2012"
    photograph(inner / "JPEGImages/p.jpg")
    (inner / "ImageSets/Segmentation").mkdir(parents=True)
    (inner / "ImageSets/Segmentation/val.txt").write_text("p")
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 9: (192, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192)}
    for numbers, meant, fits in (
        ([0, 1, 9, 15, 255], [0, 1, 9, 15, 255], True),
        ([0, 1, 2], [0, 15, 255], False),
        ([0, 1], [1, 0], False),
    ):
        image = Image.fromarray(some(numbers).astype(np.uint8))
        palette = [200] * 768
        for number, colour in zip(numbers, meant, strict=True):
            palette[3 * number : 3 * number + 3] = colours[colour]
        image.putpalette(palette)
        save_mask(image, inner / "SegmentationClass/p.png")
        data = read_labelled("voc2012", tmp_path, "val")
        if fits:
            assert data.target(0).unique().tolist() == [-1, 0, 1, 9, 15]
        else:
            with pytest.raises(
                BrixelError, match=r"has the colour of class \d+ under the number \d: a program has sor"
            ):
                data.target(0)


# ---------------------------------------------------------------- depth


@pytest.fixture
def nyu(tmp_path):
    photograph(tmp_path / "test/k/rgb_1.jpg")

    def read(numbers, dtype=np.uint16):
        write(tmp_path / "test/k/sync_depth_1.png", numbers, dtype)
        return read_measured("depth", "nyuv2", tmp_path, "test").target(0)

    return read


MM = RNG.random((40, 48)) * 9000 + 600


@pytest.mark.parametrize(
    ("numbers", "dtype", "message"),
    [
        (MM / 10000 * 65535, np.uint16, "scaled so that 65535 = 10 m"),
        (MM.astype(np.uint16).byteswap(), np.uint16, "or of which the bytes were swapped"),
        (MM / 10, np.uint16, "looks like centimetres"),
        (MM / 1000, np.uint16, "looks like centimetres"),
        (MM / 10000 * 255, np.uint8, "has mode L, 8 bits; expected 16 bits with millimetres of depth"),
    ],
)
def test_depth_of_nyu_in_other_units_is_named(nyu, numbers, dtype, message):
    with pytest.raises(BrixelError, match=message):
        nyu(numbers, dtype)


def test_depth_of_nyu_is_read(nyu):
    assert nyu(np.where(RNG.random((40, 48)) < 0.3, 0, MM)).amax() == pytest.approx(MM.max() / 1000, rel=0.05)
    assert nyu(np.zeros((40, 48))).max() == 0  # nothing was measured


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (MM, "these look like millimetres, not metres"),
        (MM.astype(np.float32)[None], r"contains float32 \(1, 40, 48\); expected floats \(H, W\)"),
        (MM.astype(np.uint16), "contains uint16"),
        (MM.astype(complex), "its header does not describe an array of numbers"),
        (MM.astype(np.longdouble), "contains float128|longdouble"),
        (np.zeros((0, 4)), "is damaged or not an array of measurements"),
    ],
)
def test_plain_depth_of_other_kinds_is_named(tmp_path, array, message):
    photograph(tmp_path / "t/images/a.jpg")
    (tmp_path / "t/depth").mkdir()
    np.save(tmp_path / "t/depth/a.npy", array)
    with pytest.raises(BrixelError, match=message):
        read_measured("depth", "plain", tmp_path, "t").target(0)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_plain_depth_of_all_floats_is_read(tmp_path, dtype, order):
    photograph(tmp_path / "t/images/a.jpg")
    (tmp_path / "t/depth").mkdir()
    metres = np.where(MM > 9000, np.nan, MM / 1000)
    np.save(tmp_path / "t/depth/a.npy", np.array(metres, dtype=dtype, order=order))
    found = read_measured("depth", "plain", tmp_path, "t").target(0)
    assert torch.allclose(found[0], torch.from_numpy(np.nan_to_num(metres)).float(), rtol=1e-3)


def test_depth_of_navi_has_16_bits(tmp_path):
    photograph(tmp_path / "duck/wild_set/images/0.jpg")
    write(tmp_path / "duck/wild_set/depth/0.png", some([0, 200]))
    with pytest.raises(BrixelError, match="has mode L, 8 bits; expected 16 bits with 1 / depth"):
        read_measured("depth", "navi", tmp_path, "val").target(0)


@pytest.mark.parametrize(
    "entry",
    [
        {"filename": 5},
        {"filename": "../x.jpg"},
        {"image_size": [40, 0]},
        {"image_size": {"a": 1, "b": 2}},
        {"camera": [1]},
        {"camera": {"focal_length": "50"}},
        {"camera": {"focal_length": 10**400}},
    ],
)
def test_odd_cameras_of_navi_are_named(tmp_path, entry):
    scene = tmp_path / "duck/wild_set"
    photograph(scene / "images/0.jpg")
    write(scene / "depth/0.png", some([0, 900]), np.uint16)
    usual = {"filename": "0.jpg", "image_size": [40, 48], "camera": {"focal_length": 50.0}}
    (scene / "annotations.json").write_text(json.dumps([{**usual, **entry}]))
    with pytest.raises(BrixelError, match=r"annotations\.json cannot be used .*; expected a list with filename"):
        read_measured("normals", "navi", tmp_path, "val")


# ---------------------------------------------------------------- normals


def unit_vectors(z):
    xy = RNG.normal(size=(40, 48, 2))
    vectors = np.concatenate([xy, np.full((40, 48, 1), 2.0 * z)], axis=-1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_normals_of_nyu_point_away_from_the_camera(tmp_path):
    photograph(tmp_path / "nyuv2/test/0_img.png")
    path = tmp_path / "nyuv2/test/0_normal.png"
    write(path, (unit_vectors(1) + 1) * 127.5)
    assert (read_measured("normals", "nyuv2", tmp_path, "val").target(0)[2] < 0).all()
    write(path, (unit_vectors(-1) + 1) * 127.5)
    with pytest.raises(BrixelError, match=r"0_normal\.png: its normals point to the camera; those of dsine_eval\.zip"):
        read_measured("normals", "nyuv2", tmp_path, "val").target(0)


@pytest.mark.parametrize(
    ("colours", "message"),
    [
        (np.abs(unit_vectors(1)) * 255, "its colours are not those of unit vectors"),
        ((unit_vectors(1) + 1) * 63.75, "its colours are not those of unit vectors"),
        (some([0, 100, 200]), "has mode L; expected three numbers per pixel"),
    ],
)
def test_other_codes_of_normals_are_named(tmp_path, colours, message):
    photograph(tmp_path / "t/images/a.jpg")
    write(tmp_path / "t/normals/a.png", colours)
    with pytest.raises(BrixelError, match=message):
        read_measured("normals", "plain", tmp_path, "t").target(0)


def test_a_file_of_measurements_is_damaged_or_whole(tmp_path):
    photograph(tmp_path / "t/images/a.jpg")
    (tmp_path / "t/normals").mkdir()
    path = tmp_path / "t/normals/a.npy"
    np.save(path, unit_vectors(-1))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedFileError, match=r"a\.npy is damaged or not an array of measurements .*numpy\.save"):
        read_measured("normals", "plain", tmp_path, "t").target(0)


def test_a_task_looks_at_the_first_files_before_it_begins(tmp_path):
    for split in ("train", "val"):
        photograph(tmp_path / split / "images/a.jpg")
        write(tmp_path / split / "masks/a.png", some([0, 1]))
    Task("segmentation", (56,), data=tmp_path).check()
    write(tmp_path / "val/masks/a.png", np.resize([0, 1], (20, 60)))
    with pytest.raises(BrixelError, match="different aspects"):
        Task("segmentation", (56,), data=tmp_path).check()
