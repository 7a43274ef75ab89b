"""Clicks: features that hold the classes find all, those that hold nothing do not; the same clicks for all sources."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate.clicks import _clicks_on, clicks, colour_sources
from brixel.evaluate.datasets.labelled import read_labelled
from brixel.evaluate.feature_sources import FeatureSource


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 64 px: a class where red, another where green, with blue noise; one image has a single class."""
    root = tmp_path_factory.mktemp("clicks")
    numbers = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / "val" / kind).mkdir(parents=True)
    for index in range(3):
        mask = numbers.integers(0, 2, (4, 4)).astype(np.uint8).repeat(16, 0).repeat(16, 1) * (index < 2)
        image = np.stack([255 * mask, 255 - 255 * mask, numbers.integers(0, 255, (64, 64))], -1).astype(np.uint8)
        mask[:4] = 255
        Image.fromarray(image).save(root / "val" / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "val" / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def split(data):
    return read_labelled("plain", data, "val")


@pytest.mark.slow
def test_sources_are_compared_on_the_same_clicks(split):
    fine = FeatureSource("student", lambda pixels: F.avg_pool2d(pixels[:, :2], 2), 4, scale=4)
    nothing = FeatureSource("bilinear", lambda pixels: torch.ones(len(pixels), 3, 4, 4), 4, resize="bilinear")
    report = clicks([nothing, fine], split, [64], model="any", counts=(2, 5))
    rows = {(row["source"], row["clicks"]): row for row in report.rows}
    assert list(rows) == [
        (source, count) for count in (2, 5) for source in ("colour", "colour, position", "bilinear", "student")
    ]
    assert rows["student", 2]["miou"] > 0.95  # but for outlines
    assert rows["bilinear", 5]["miou"] < 0.4
    assert rows["student", 5]["over_bilinear"][0] > 0.5
    assert rows["bilinear", 5]["over_colour"][1] < 0
    assert rows["colour", 5]["miou"] > 0.9
    assert "2 of 3 images have two classes of 20 pixels or more" in report.recipe
    again = clicks([nothing, fine], split, [64], model="any", counts=(2, 5))
    assert again.rows == report.rows


def test_fewer_clicks_are_the_first_of_more(split):
    few, many = (_clicks_on(split, 0, counts, 7) for counts in ((3,), (3, 9)))
    assert sorted(few) == [0, 1]
    labels = split.target(0)
    for label in few:
        assert torch.equal(few[label], many[label][:3])
        assert (labels[tuple(many[label].T)] == label).all()
        assert len(many[label].unique(dim=0)) == 9
    assert not _clicks_on(split, 2, (3,), 7)


def test_a_data_set_without_two_classes_is_refused(split):
    with pytest.raises(BrixelError, match="no image of .* has two classes of 16000 pixels or more"):
        clicks(colour_sources()[:0], split, [64], model="any", counts=(4000,))


def test_the_command(data, tmp_path, capsys):
    arguments = ["--data", data, "--teacher-px", 256, "--counts", 2, "--sources", "bilinear", "--limit", 1]
    status = main(["evaluate", "clicks", "--model", "brixel-tiny", *map(str, arguments), "-o", str(tmp_path / "c.md")])
    assert status == 0
    assert "| brixel-tiny | 64 | bilinear | 2 |" in capsys.readouterr().out
    assert (tmp_path / "c.json").exists()
