"""The regression probe: planted values, ridge regression by scikit-learn, values that are missing, and files."""

import numpy as np
import pytest
import torch
from PIL import Image
from probe_images import blocks
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error

from brixel import BrixelError, FeatureMap
from brixel.errors import NotFittedError
from brixel.probe import RegressionProbe


@pytest.fixture
def told():
    """Images whose colours say a value linearly, and the values of their pixels."""
    images = [blocks(seed)[0] for seed in range(3)]
    return images, [(image @ [0.01, 0.02, -0.005] + 3).astype(np.float32) for image in images]


def test_values_that_colours_say_are_found(settings, told):
    images, values = told
    probe = RegressionProbe(**settings, regularisation=1e-6).fit(images[:2], values[:2])
    found = probe.predict(images[2])
    assert found.dtype == np.float32
    assert np.allclose(found, values[2], atol=1e-3)
    assert probe.score(images, values) == pytest.approx(1, abs=1e-6)


def test_the_logarithm_suits_products(settings, told):
    images, values = told
    depths = [np.exp(each - 5) for each in values]
    depths[0][:5] = 0  # not measured
    probe = RegressionProbe(**settings, log=True, regularisation=1e-6).fit(images, depths)
    assert np.allclose(probe.predict(images[1]), depths[1], rtol=1e-3)
    assert probe.evaluate(images, depths)["pixels"] == 3 * 24 * 32 - 5 * 32
    assert probe.predict(images[0]).min() > 0


@pytest.mark.parametrize("regularisation", [0.003, 1])
def test_it_is_the_ridge_regression_of_scikit_learn(regularisation):
    numbers = np.random.default_rng(0)
    maps = [FeatureMap(torch.from_numpy(numbers.normal(40, 2, (5, 7, 9))), (7, 9), (1.0, 1.0)) for _ in range(3)]
    values = [numbers.normal(size=(7, 9)) + each.features[0].numpy() for each in maps]
    values[1][2:4] = np.nan
    probe = RegressionProbe(regularisation=regularisation).fit(maps, values)
    rows, truth = np.concatenate([each.features.flatten(1).T for each in maps]), np.concatenate(values, None)
    scaled = (rows - rows.mean(0)) / rows.std(0) / 5**0.5
    known = np.isfinite(truth)
    theirs = Ridge(alpha=regularisation * known.sum()).fit(scaled[known], truth[known]).predict(scaled)
    ours = np.concatenate([probe.predict(each) for each in maps], None)
    assert np.allclose(ours, theirs, atol=1e-5)
    figures = probe.evaluate(maps, values)
    assert figures["r2"] == pytest.approx(r2_score(truth[known], theirs[known]), abs=1e-5)
    assert figures["rmse"] == pytest.approx(root_mean_squared_error(truth[known], theirs[known]), abs=1e-5)
    assert figures["pixels"] == known.sum()


def test_missing_values_are_left_out(settings, told):
    images, values = told
    whole = RegressionProbe(**settings, regularisation=1e-6).fit(images, values).predict(images[0])
    holes = [each.copy() for each in values]
    holes[0][:3], holes[1][0], holes[2][5:9, 3] = np.nan, np.inf, -1
    holes.append(np.full((24, 32), np.nan))
    probe = RegressionProbe(**settings, regularisation=1e-6, ignore_value=-1).fit([*images, images[0]], holes)
    assert np.allclose(probe.predict(images[0]), whole, atol=0.02)


def test_files_of_values(settings, told, tmp_path):
    images, values = told
    np.save(tmp_path / "a.npy", values[0])
    millimetres = (values[1] * 1000).round().astype(np.uint16)
    millimetres[:4] = 0
    Image.fromarray(millimetres).save(tmp_path / "b.png")
    probe = RegressionProbe(**settings, regularisation=1e-6).fit(
        images[:2], [tmp_path / "a.npy", str(tmp_path / "b.png")]
    )
    assert np.allclose(probe.predict(images[2]), values[2], atol=0.02)
    Image.new("L", (32, 24), 9).save(tmp_path / "eight.png")
    with pytest.raises(BrixelError, match=r"eight\.png has mode L, 8 bits; expected 16 bits"):
        RegressionProbe(**settings).fit(images[:1], [tmp_path / "eight.png"])


@pytest.mark.parametrize(
    ("parameters", "values", "message"),
    [
        ({}, lambda each: np.full_like(each, np.nan), "no pixel of 3 images has a value: all are NaN or ignored$"),
        ({"log": True}, lambda each: -each, "no pixel of 3 images has a value: .*also those at 0 and below"),
        ({}, lambda each: each[:, :20], "image 0 has 24 x 32 px upright, its target has 24 x 20"),
        ({}, lambda each: each.astype(str), "the values of an image are an array of <U32; expected numbers"),
        ({"png_unit": 0}, lambda each: each, "png_unit is 0; expected a finite number above 0"),
        ({"log": 1}, lambda each: each, "log is 1; expected True or False"),
    ],
)
def test_values_that_cannot_be_right_are_refused(settings, told, parameters, values, message):
    images, given = told
    with pytest.raises(BrixelError, match=message):
        RegressionProbe(**settings, **parameters).fit(images, [values(each) for each in given])


def test_a_constant_has_no_r2(settings, told):
    images, _ = told
    constant = [np.full((24, 32), 7.0)] * 3
    probe = RegressionProbe(**settings).fit(images, constant)
    assert np.allclose(probe.predict(images[0]), 7, atol=1e-4)
    assert np.isnan(probe.score(images, constant))


def test_manners():
    probe = clone(RegressionProbe("brixel-tiny", log=True))
    assert probe.get_params()["log"] is True
    with pytest.raises(NotFittedError, match="this RegressionProbe is not fitted yet"):
        probe.predict("photo.jpg")
