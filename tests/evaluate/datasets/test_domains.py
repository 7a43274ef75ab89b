"""Readers of satellite and medical data sets, on tiny samples of each layout, and the suite that uses them."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from brixel import BrixelError
from brixel.evaluate.datasets.labelled import LAYOUTS, read_labelled
from brixel.evaluate.suite_file import read_suite

SUITE = ROOT / "examples" / "suite_domains.toml"


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, **options)


def photograph(path, image_hw=(2, 3)):
    save(path, np.full((*image_hw, 3), 90))


@pytest.fixture
def loveda(tmp_path):
    for split, scene, name in (("Train", "Rural", "0"), ("Train", "Urban", "1366"), ("Val", "Rural", "2522")):
        photograph(tmp_path / split / scene / "images_png" / f"{name}.png")
        save(tmp_path / split / scene / "masks_png" / f"{name}.png", [[0, 1, 7], [2, 6, 1]])
    return tmp_path


def test_loveda(loveda):
    data = read_labelled("loveda", loveda, "train")
    assert [sample.image.stem for sample in data.samples] == ["0", "1366"]
    assert data.target(0).tolist() == [[-1, 0, 6], [1, 5, 0]]
    assert (len(data.classes), data.classes[0], data.classes[6]) == (7, "background", "agriculture")
    assert [sample.image.stem for sample in read_labelled("loveda", loveda, "train-urban").samples] == ["1366"]
    assert [sample.image.stem for sample in read_labelled("loveda", loveda, "val-rural").samples] == ["2522"]
    with pytest.raises(BrixelError, match=r"Val.Urban.images_png, which does not exist; source: Train\.zip and Val"):
        read_labelled("loveda", loveda, "val")
    with pytest.raises(BrixelError, match=r"no split 'val-forest'; expected train or val, or one kind .* val-urban"):
        read_labelled("loveda", loveda, "val-forest")


def test_loveda_whose_numbers_were_reduced(loveda):
    save(loveda / "Val" / "Rural" / "masks_png" / "2522.png", [[255, 0, 6], [1, 5, 0]])
    with pytest.raises(BrixelError, match="255 is none, so these look like numbers that were reduced by one"):
        read_labelled("loveda", loveda, "val-rural").target(0)
    save(loveda / "Val" / "Rural" / "masks_png" / "2522.png", [[8, 0, 6], [1, 5, 0]])
    with pytest.raises(BrixelError, match="contains the number 8"):
        read_labelled("loveda", loveda, "val-rural").target(0)


@pytest.fixture
def disc():
    """A mask of a disc: (60, 80) bool."""
    y, x = np.mgrid[:60, :80]
    return (y - 25) ** 2 + (x - 40) ** 2 < 300


def test_kvasir_seg(tmp_path, disc):
    """Masks are colour JPEGs; those of the authors' lists, or every fifth."""
    inner = tmp_path / "Kvasir-SEG"
    names = [f"cju{number:02}" for number in range(11)]
    for name in names:
        photograph(inner / "images" / f"{name}.jpg", disc.shape)
        save(inner / "masks" / f"{name}.jpg", 255 * np.stack([disc] * 3, axis=-1), quality=75)
    for root in (tmp_path, inner):
        data = read_labelled("kvasir-seg", root, "val")
        assert [sample.image.stem for sample in data.samples] == ["cju04", "cju09"]
        assert (data.target(0).numpy() == disc).all()
    train = read_labelled("kvasir-seg", inner, "train")
    assert [sample.image.stem for sample in train.samples] == [name for name in names if name not in ("cju04", "cju09")]
    assert train.classes == ("background", "polyp")
    with pytest.raises(BrixelError, match=r"a list of images of Kvasir-SEG at .*test\.txt; without lists"):
        read_labelled("kvasir-seg", inner, "test")
    (inner / "val.txt").write_text("cju07\ncju02.jpg\n\n")
    assert [sample.image.stem for sample in read_labelled("kvasir-seg", inner, "val").samples] == ["cju07", "cju02"]
    (inner / "val.txt").write_text("cju99\n")
    with pytest.raises(BrixelError, match=r"2 files of Kvasir-SEG are missing, the first .*cju99\.jpg"):
        read_labelled("kvasir-seg", inner, "val")


def test_isic2018(tmp_path, disc):
    for folder, name in (("Training", "ISIC_0000000"), ("Validation", "ISIC_0012255"), ("Test", "ISIC_0012169")):
        images = tmp_path / f"ISIC2018_Task1-2_{folder}_Input"
        photograph(images / f"{name}.jpg", disc.shape)
        (images / "ATTRIBUTION.txt").write_text("who took them")
        save(tmp_path / f"ISIC2018_Task1_{folder}_GroundTruth" / f"{name}_segmentation.png", 255 * disc)
    for split, name in (("train", "ISIC_0000000"), ("val", "ISIC_0012255"), ("test", "ISIC_0012169")):
        data = read_labelled("isic2018", tmp_path, split)
        assert [sample.image.stem for sample in data.samples] == [name]
        assert (data.target(0).numpy() == disc).all()
    with pytest.raises(BrixelError, match=r"expected a folder of ISIC 2018, task 1 at .*_Input, which does not exist"):
        read_labelled("isic2018", tmp_path / "elsewhere", "val")


def test_masks_that_are_not_black_and_white(tmp_path, disc):
    mask = tmp_path / "ISIC2018_Task1_Training_GroundTruth" / "a_segmentation.png"
    photograph(tmp_path / "ISIC2018_Task1-2_Training_Input" / "a.jpg", disc.shape)
    for values, problem in ((120 * np.ones(disc.shape), "100% of its pixels are grey"), (disc, "the brightest is 1;")):
        save(mask, values)
        with pytest.raises(BrixelError, match=problem):
            read_labelled("isic2018", tmp_path, "train").target(0)
    save(mask, np.zeros(disc.shape))  # no lesion
    assert not read_labelled("isic2018", tmp_path, "train").target(0).any()


def test_glas(tmp_path, disc):
    inner = tmp_path / "Warwick_QU_Dataset"
    glands = disc * np.where(np.arange(80) < 40, 1, 2)
    for name in ("train_1", "train_10", "testA_1", "testB_1"):
        photograph(inner / f"{name}.bmp", disc.shape)
        save(inner / f"{name}_anno.bmp", glands)
    (inner / "Grade.csv").write_text("name,patient ID,grade (GlaS),grade (Sirinukunwattana et al. 2015)\n")
    for root in (tmp_path, inner):
        data = read_labelled("glas", root, "train")
        assert [sample.image.stem for sample in data.samples] == ["train_1", "train_10"]
        assert (data.target(0).numpy() == disc).all()
    assert [sample.image.stem for sample in read_labelled("glas", inner, "val").samples] == ["testA_1", "testB_1"]
    assert [sample.image.stem for sample in read_labelled("glas", inner, "testB").samples] == ["testB_1"]
    (inner / "testB_1_anno.bmp").unlink()
    with pytest.raises(BrixelError, match=r"1 files of images of GlaS named testB\*\.bmp .*testB_1_anno\.bmp"):
        read_labelled("glas", inner, "testB")


def test_the_suite_of_domains_is_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = read_suite(SUITE)
    assert len(parts) == 17
    layouts = {part.task.layout for part in parts if part.task.kind == "segmentation"}
    assert layouts == {"loveda", "kvasir-seg", "isic2018", "glas"} <= LAYOUTS.keys()
    content = tomllib.loads(SUITE.read_text(encoding="utf-8"))
    assert {name for run in content["run"] for name in run["models"]} == set(content["models"])
    guide = Path(ROOT / "docs" / "domains.md").read_text(encoding="utf-8")
    assert all(f"`{layout}`" in guide for layout in layouts)
