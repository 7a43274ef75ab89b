"""Objects of images with masks are pasted on crops: a function of seed and position, inside the mask alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.images.crops import CropSettings
from brixel.train import TrainConfig
from brixel.train.composites import Cutouts, find_cutouts, pasted
from brixel.train.data import CropDataset, find_training_images
from brixel.train.dry_run import plan
from brixel.train.loader import crop_datasets
from brixel.train.teacher_cache import TeacherCache

T = 32
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SQUARE, STRIPE = (slice(4, 20), slice(6, 22)), (slice(24, 28), slice(0, 40))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def cutouts(tmp_path):
    """Two images of 30 x 40 px: blue with a red square (class 3), blue with a green stripe (class 200)."""
    for name, place, colour, label in (("a", SQUARE, RED, 3), ("b", STRIPE, GREEN, 200)):
        image, mask = np.full((30, 40, 3), BLUE, np.uint8), np.zeros((30, 40), np.uint8)
        image[place], mask[place] = colour, label
        save(tmp_path / "cutouts" / "images" / f"{name}.png", image)
        save(tmp_path / "cutouts" / "masks" / f"{name}.png", mask)
    return tmp_path / "cutouts"


@pytest.fixture
def grounds(tmp_path):
    """Three grey images."""
    for number in range(3):
        save(tmp_path / "grounds" / f"{number}.png", np.full((40, 50, 3), 100 + 20 * number, np.uint8))
    return tmp_path / "grounds"


def dataset_of(grounds, cutouts, share=1.0, seed=0):
    objects = cutouts and Cutouts(find_cutouts([str(cutouts)]), share, seed)
    images = find_training_images([grounds])
    return CropDataset(images, CropSettings(T), mean=(0, 0, 0), std=(1, 1, 1), cutouts=objects)


def strongest(crop):
    """The share of cells where a channel is far above the others: red, green, blue."""
    values = crop.sort(dim=0).values
    strong = values[2] - values[1] > 0.5
    return [(strong & (crop.argmax(0) == channel)).float().mean().item() for channel in range(3)]


# ---------------------------------------------------------------- crops


def test_objects_are_pasted_and_their_background_is_not(grounds, cutouts):
    crops = [dataset_of(grounds, cutouts)[position] for position in range(30)]
    shares = torch.tensor([strongest(crop.teacher) for crop in crops])
    assert shares[:, 0].max() > 0.1
    assert shares[:, 1].max() > 0.02
    assert shares[:, 2].max() == 0  # nothing of the blue around them
    assert all(crop.skipped == () for crop in crops)
    assert all(crop.teacher.shape == (3, T, T) and crop.student.shape == (3, T // 4, T // 4) for crop in crops)
    assert all(crop.teacher.min() >= 0 and crop.teacher.max() <= 1 for crop in crops)


def test_the_student_sees_the_composite(grounds, cutouts):
    crop = max((dataset_of(grounds, cutouts)[position] for position in range(10)), key=lambda c: strongest(c.teacher))
    means = (crop.teacher.mean((1, 2)), crop.student.mean((1, 2)))
    torch.testing.assert_close(*means, rtol=0, atol=0.03)


def test_crops_depend_on_seed_and_position_only(grounds, cutouts):
    ones, others = (dataset_of(grounds, cutouts, share=0.5) for _ in range(2))
    first = [ones[position].teacher for position in range(8)]
    for position in reversed(range(8)):
        torch.testing.assert_close(others[position].teacher, first[position], rtol=0, atol=0)
    seeded = dataset_of(grounds, cutouts, share=0.5, seed=1)
    assert any(not torch.equal(seeded[position].teacher, first[position]) for position in range(8))


def test_the_share_of_composites_is_as_asked(grounds, cutouts):
    plain, number = dataset_of(grounds, None), 80
    for share in (0.0, 0.25, 1.0):
        objects = Cutouts(find_cutouts([str(cutouts)]), share)
        crop = plain[0].teacher
        changed = sum(objects.paste(crop, position)[0] is not crop for position in range(number))
        assert abs(changed / number - share) < 0.1
        assert (changed == share * number) or 0 < share < 1


def test_crops_without_objects_are_those_of_a_run_without_cutouts(grounds, cutouts):
    plain, mixed = dataset_of(grounds, None), dataset_of(grounds, cutouts, share=0.5)
    same = [torch.equal(plain[position].teacher, mixed[position].teacher) for position in range(40)]
    assert 5 < sum(same) < 35


# ---------------------------------------------------------------- objects


def test_an_object_covers_the_stated_part_and_leaves_the_rest():
    image = np.full((50, 60, 3), RED, np.uint8)
    inside = np.zeros((50, 60), bool)
    inside[10:30, 20:40] = True
    for seed in range(30):
        canvas = np.full((100, 100, 3), 90, np.uint8)
        composite = pasted(canvas, image, inside, np.random.default_rng(seed))
        changed = (composite != 90).any(-1)
        assert composite.shape == (100, 100, 3)
        assert 0 < changed.sum() <= (0.7 * 100 + 2) ** 2 * 1.05  # a square of 15 to 70 px, turned
        assert (canvas == 90).all()
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        assert max(np.ptp(rows), np.ptp(columns)) <= 100 * 0.7 * 1.37 + 2  # its diagonal at 30 degrees


def test_an_empty_object_changes_nothing():
    canvas = np.full((20, 20, 3), 7, np.uint8)
    empty = pasted(canvas, np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5), bool), np.random.default_rng(0))
    assert (empty == canvas).all()


def test_one_class_at_a_time_and_none_of_the_pixels_without_one(grounds, tmp_path):
    image, mask = np.full((30, 40, 3), BLUE, np.uint8), np.full((30, 40), 255, np.uint8)
    image[:, :10], mask[:, :10] = RED, 1
    image[:, 30:], mask[:, 30:] = GREEN, 2
    image[:, 10:12], mask[:, 10:12] = 0, 0
    save(tmp_path / "two" / "images" / "a.png", image)
    save(tmp_path / "two" / "masks" / "a.png", mask)
    shares = torch.tensor([strongest(dataset_of(grounds, tmp_path / "two")[n].teacher) for n in range(30)])
    assert shares[:, 2].max() == 0
    assert ((shares[:, 0] > 0) & (shares[:, 1] == 0)).any()
    assert ((shares[:, 1] > 0) & (shares[:, 0] == 0)).any()


def test_a_black_and_white_mask_has_its_object_in_white(grounds, cutouts):
    for mask in (cutouts / "masks").iterdir():
        save(mask, (np.asarray(Image.open(mask)) > 0).astype(np.uint8) * 255)
    shares = torch.tensor([strongest(dataset_of(grounds, cutouts)[position].teacher) for position in range(20)])
    assert shares[:, :2].max() > 0.1
    assert shares[:, 2].max() == 0


def test_a_mask_of_another_size_is_resized(grounds, cutouts):
    for mask in (cutouts / "masks").iterdir():
        Image.open(mask).resize((80, 60), Image.Resampling.NEAREST).save(mask)
    shares = torch.tensor([strongest(dataset_of(grounds, cutouts)[position].teacher) for position in range(20)])
    assert shares[:, 0].max() > 0.1
    assert shares[:, 2].max() == 0


def test_files_that_cannot_be_used_are_listed_and_the_crop_goes_on(grounds, cutouts):
    (cutouts / "masks" / "a.png").write_bytes(b"no mask")
    save(cutouts / "masks" / "b.png", np.zeros((30, 70), np.uint8))
    crops = [dataset_of(grounds, cutouts)[position] for position in range(10)]
    assert {path for crop in crops for path in crop.skipped} == {str(cutouts / f"images/{name}.png") for name in "ab"}
    assert all(strongest(crop.teacher) == [0, 0, 0] for crop in crops)


# ---------------------------------------------------------------- folders, settings, caches


def test_folders_of_another_layout_say_what_is_expected(cutouts, tmp_path):
    assert len(find_cutouts([str(cutouts), str(cutouts)])) == 4
    with pytest.raises(BrixelError, match=r"expected a folder of the plain layout at .*nowhere.images"):
        find_cutouts([str(tmp_path / "nowhere")])
    (cutouts / "masks" / "a.png").unlink()
    with pytest.raises(BrixelError, match=r"a\.png"):
        find_cutouts([str(cutouts)])


def config_of(grounds, cutouts, backbone="b", **settings):
    return TrainConfig(backbone, str(grounds), "out", cutouts=str(cutouts), teacher_px=112, **settings)


@pytest.mark.parametrize("share", [-0.1, 1.01, "half", None, True])
def test_a_wrong_share_says_so(grounds, cutouts, share):
    with pytest.raises(BrixelError, match="composites is .*; expected a finite number from 0 up and at most 1"):
        config_of(grounds, cutouts, composites=share)


def test_training_crops_have_objects_and_validation_has_none(grounds, cutouts, model):
    config = config_of(grounds, cutouts, composites=1.0, seed=5)
    vit = model.config.backbone.vit
    (training,) = crop_datasets(config, config.images, vit, random=True)
    (held_out,) = crop_datasets(config, config.images, vit, random=False)
    assert training.cutouts == Cutouts(find_cutouts([str(cutouts)]), 1.0, 5)
    assert held_out.cutouts is None
    without = dataclasses.replace(config, cutouts=())
    assert crop_datasets(without, config.images, vit, random=True)[0].cutouts is None


def test_a_dry_run_counts_them(grounds, cutouts, backbone_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(grounds, cutouts, str(backbone_folder), batch_size=1, fit=0, device="cpu")
    assert plan(config)["images"].endswith("; objects of 2 others on 25% of the crops")


def test_a_cache_knows_its_objects(grounds, cutouts, tmp_path):
    def build(name, dataset):
        teacher = lambda pixels: pixels[..., ::8, ::8]  # noqa: E731
        return TeacherCache.build_or_open(tmp_path / name, dataset=dataset, count=3, teacher=teacher, teacher_id="own")

    build("plain", dataset_of(grounds, None))
    assert "cutouts" not in json.loads((tmp_path / "plain" / "header.json").read_text())["fingerprint"]
    mixed = build("mixed", dataset_of(grounds, cutouts))
    assert len(mixed) == len(build("mixed", dataset_of(grounds, cutouts))) == 3
    for other, name in ((0.5, "cutouts.share"), (1.0, "cutouts.bytes")):
        if other == 1.0:
            save(cutouts / "images" / "a.png", np.zeros((30, 40, 3), np.uint8))
        with pytest.raises(BrixelError, match=f"holds another teacher cache: {name}"):
            build("mixed", dataset_of(grounds, cutouts, share=other))
    with pytest.raises(BrixelError, match="holds another teacher cache: cutouts is nothing in the folder"):
        build("plain", dataset_of(grounds, cutouts))
