"""The segmentation probe: planted classes, which it must find, clicks, wrong input, and scikit-learn's manners."""

import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from probe_images import blocks
from sklearn.base import clone
from sklearn.exceptions import NotFittedError as TheirNotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.utils.validation import check_is_fitted

from brixel import BrixelError, FeatureMap
from brixel.errors import NotFittedError
from brixel.probe import SegmentationProbe


def test_separable_classes_are_found_without_an_error(settings, pairs):
    images, masks = pairs
    probe = SegmentationProbe(**settings).fit(images[:2], masks[:2])
    assert probe.classes_.tolist() == [0, 1, 2]
    found = probe.predict(images[2])
    assert found.dtype == np.int64
    assert np.array_equal(found, masks[2])
    assert probe.score(images, masks) == 1
    figures = probe.evaluate(images, masks)
    assert figures == {"mean_iou": 1, "pixel_accuracy": 1, "iou_by_class": {0: 1, 1: 1, 2: 1}, "images": 3}


def test_three_clicks_a_class_are_enough(settings, pairs):
    images, masks = pairs
    clicks = [(y + 0.5, x + 0.5, label) for label in range(3) for y, x in np.argwhere(masks[0] == label)[::17][:3]]
    assert len(clicks) == 9
    probe = SegmentationProbe(**settings).fit(images, clicks=[clicks, [], []])
    assert probe.score(images, masks) == 1


def test_probabilities_sum_to_one_and_belong_to_the_classes(settings, pairs):
    images, masks = pairs
    probe = SegmentationProbe(**settings).fit(images, masks)
    found = probe.predict_proba(images[1])
    assert found.shape == (3, 24, 32)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(0), 1, atol=1e-6)
    assert np.array_equal(probe.classes_[found.argmax(0)], probe.predict(images[1]))


def test_classes_may_be_any_whole_numbers(settings, pairs):
    images, masks = pairs
    names = np.array([-7, 4000, 2**40])
    probe = SegmentationProbe(**settings, ignore_label=None).fit(images, [names[mask] for mask in masks])
    assert probe.classes_.tolist() == names.tolist()
    assert np.array_equal(probe.predict(images[0]), names[masks[0]])
    assert probe.score(images, [names[mask] for mask in masks]) == 1


def test_a_fit_is_the_same_again_and_few_cells_are_chosen_by_the_seed(settings, pairs, monkeypatch):
    images, masks = pairs
    monkeypatch.setattr("brixel.probe.segmentation._MOST_CELLS", 90)
    fits = [SegmentationProbe(**settings, seed=seed).fit(images, masks).readout_[1].weight for seed in (0, 0, 1)]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def planted(seed=0, width=6, classes=3):
    """A map with noise in all channels, and cells that belong to classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (9, 11), generator=generator)
    centres = 3 * torch.randn(classes, width, generator=generator) + 50
    features = centres[labels].permute(2, 0, 1) + torch.randn(width, 9, 11, generator=generator)
    return FeatureMap(features, (9, 11), (1.0, 1.0)), labels


def scaled(feature_map):
    """Features as the probe sees them, (n, D), float64: of mean square one over D in each channel."""
    rows = feature_map.features.flatten(1).T.double()
    return ((rows - rows.mean(0)) / rows.std(0, correction=0) / rows.shape[1] ** 0.5).numpy()


@pytest.mark.parametrize("regularisation", [0.1, 10])
def test_it_is_the_logistic_regression_of_scikit_learn(regularisation):
    feature_map, labels = planted()
    probe = SegmentationProbe(regularisation=regularisation).fit([feature_map], [labels])
    theirs = LogisticRegression(C=1 / regularisation, tol=1e-8, max_iter=5000)
    theirs.fit(scaled(feature_map), labels.flatten())
    expected = theirs.predict_proba(scaled(feature_map)).T.reshape(3, 9, 11)
    assert np.allclose(probe.predict_proba(feature_map), expected, atol=1e-4)


def test_clicks_are_read_where_they_lie():
    feature_map, labels = planted()
    points = [(y + 0.5, x + 0.5, int(labels[y, x])) for y, x in [(0, 0), (1, 1), (2, 2), (3, 5), (8, 10), (4, 4)]]
    probe = SegmentationProbe().fit([feature_map], clicks=[points])
    rows = [int(y) * 11 + int(x) for y, x, _ in points]
    theirs = LogisticRegression(C=10, tol=1e-8, max_iter=5000)
    theirs.fit(scaled(feature_map)[rows], [label for *_, label in points])
    assert probe.classes_.tolist() == theirs.classes_.tolist()
    expected = theirs.predict_proba(scaled(feature_map)).T.reshape(-1, 9, 11)
    assert np.allclose(probe.predict_proba(feature_map), expected, atol=1e-4) or len(theirs.classes_) == 2


def test_pixels_lie_between_cells_as_the_map_says():
    feature_map = FeatureMap(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), (11, 17), (4.0, 3.5))
    mask = np.arange(11 * 17).reshape(11, 17) % 2
    probe = SegmentationProbe().fit([feature_map], [mask])
    y, x = np.mgrid[:11, :17] + 0.5
    logits = FeatureMap(probe._cells(feature_map), (11, 17), (4.0, 3.5)).at(np.stack([y.ravel(), x.ravel()], 1))
    assert np.allclose(probe.predict_proba(feature_map), logits.softmax(1).T.reshape(2, 11, 17), atol=1e-5)


# ---------------------------------------------------------------- masks


def test_masks_may_be_files_with_a_palette_and_partly_labelled(settings, pairs, tmp_path):
    images, masks = pairs
    paths = []
    for number, mask in enumerate(masks):
        partly = mask.astype(np.uint8)
        partly[8:16] = 255
        image = Image.fromarray(partly)
        image.putpalette([value for colour in range(256) for value in (colour, 0, 255 - colour)])
        image.save(tmp_path / f"{number}.png")
        Image.fromarray(images[number]).save(tmp_path / f"image{number}.png")
        paths.append(tmp_path / f"{number}.png")
    files = [tmp_path / f"image{number}.png" for number in range(3)]
    probe = SegmentationProbe(**settings).fit(files, paths)
    assert probe.classes_.tolist() == [0, 1, 2]
    assert probe.score(files, masks) == 1
    assert probe.score(files, paths) == 1


def test_images_are_turned_by_their_exif_data(settings, pairs, tmp_path):
    images, masks = pairs
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.rot90(images[0])).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(masks[0].astype(np.uint8)).save(tmp_path / "mask.png")
    probe = SegmentationProbe(**settings).fit([tmp_path / "turned.png"], [tmp_path / "mask.png"])
    assert np.array_equal(probe.predict(tmp_path / "turned.png"), masks[0])
    Image.fromarray(np.rot90(masks[0]).astype(np.uint8)).save(tmp_path / "stored.png")
    with pytest.raises(BrixelError, match="24 x 32 px upright, .* has 32 x 24: .*EXIF orientation 6 of the image"):
        SegmentationProbe(**settings).fit([tmp_path / "turned.png"], [tmp_path / "stored.png"])


def test_masks_of_a_resized_image_are_right(settings, pairs):
    images, masks = pairs
    large = [mask.repeat(3, 0).repeat(3, 1) for mask in masks]
    probe = SegmentationProbe(**settings).fit(images, large)
    assert np.array_equal(probe.predict(images[0]), masks[0])
    assert probe.score(images, large) > 0.95  # outlines lie between the pixels of the image


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda masks: [mask.T for mask in masks], "image 0 has 24 x 32 px upright, its target has 32 x 24"),
        (lambda masks: masks[:2], "3 images and 2 masks; expected one for each image"),
        (lambda masks: "masks", "masks are 'masks'; expected a list with one entry for each image"),
        (lambda masks: [np.full((24, 32), 3)] * 3, "hold only the class 3 .*; expected two or more: label some"),
        (lambda masks: [np.full((24, 32), 255)] * 3, r"hold no class \(255 is ignore_label\)"),
        (lambda masks: [mask / 2 for mask in masks], "a mask is an array of float64; expected whole numbers"),
        (lambda masks: [mask[None] for mask in masks], r"a mask has shape \(1, 24, 32\); expected \(H, W\)"),
        (lambda masks: [np.arange(24 * 32 * 2).reshape(24, 64)[:, :32]] * 3, "768 different numbers|held|classes"),
        (lambda masks: [None] * 3, "a mask is a NoneType; expected an array"),
        (lambda masks: None, "expected either masks or clicks"),
    ],
)
def test_masks_that_cannot_be_right_are_refused(settings, pairs, masks, message):
    images, given = pairs
    if "768" in message:
        given = [np.arange(48 * 64).reshape(48, 64)] * 3
        message = "hold 3071 different numbers; expected at most 1024 classes"
    else:
        given = masks(given)
    with pytest.raises(BrixelError, match=message):
        SegmentationProbe(**settings).fit(images, given)


@pytest.mark.parametrize(
    ("clicks", "message"),
    [
        ([[(1, 1, 0), (2, 2, 0)], [], []], "the clicks hold only the class 0"),
        ([[], [], []], "the clicks hold no class"),
        ([[(1, 1, 0), (25, 2, 1)], [], []], r"a click on image 0 is at \(25.0, 2.0\), outside the image"),
        ([[], [(1, 1)], []], r"a click on image 1 is \(1, 1\); expected \(y, x, class\)"),
        ([[], [(1, 1, 0.5)], []], "the class a whole number"),
        ([[(1, 1, 0), (1, 1, 255)], [], []], "a click has the class 255, which is ignore_label"),
        ([[(1, 1, 0)]], "3 images and 1 lists of clicks"),
    ],
)
def test_clicks_that_cannot_be_right_are_refused(settings, pairs, clicks, message):
    with pytest.raises(BrixelError, match=message):
        SegmentationProbe(**settings).fit(pairs[0], clicks=clicks)


def test_images_without_labels_and_classes_that_are_unknown(settings, pairs):
    images, masks = pairs
    nothing = np.full((24, 32), 255)
    probe = SegmentationProbe(**settings).fit(images, [masks[0], nothing, nothing])
    assert probe.score(images, masks) == 1
    with pytest.raises(BrixelError, match="1 masks hold no label to compare with"):
        probe.score(images[:1], [nothing])
    other = masks[0].copy()
    other[:8] = 9
    figures = probe.evaluate(images[:1], [other])
    assert figures["iou_by_class"][9] == 0
    assert figures["pixel_accuracy"] == pytest.approx(2 / 3)


def test_one_image_and_no_images_are_said_to_be_wrong(settings, pairs):
    images, masks = pairs
    with pytest.raises(BrixelError, match=r"expected several, such as a list: give \[image\]"):
        SegmentationProbe(**settings).fit(images[0], masks[0])
    with pytest.raises(BrixelError, match="no images to fit a probe to"):
        SegmentationProbe(**settings).fit([], [])
    with pytest.raises(BrixelError, match="regularisation is 0; expected a finite number above 0"):
        SegmentationProbe(**settings, regularisation=0).fit(images, masks)


def test_a_probe_of_maps_takes_maps_alone(pairs):
    feature_map, labels = planted()
    probe = SegmentationProbe().fit([feature_map], [labels])
    assert probe.model_ is None
    with pytest.raises(BrixelError, match="fitted on maps, without a model: give maps"):
        probe.predict(pairs[0][0])
    with pytest.raises(BrixelError, match="the map has 5 channels, and the probe reads 6"):
        probe.predict(FeatureMap(torch.zeros(5, 2, 2), (2, 2), (1.0, 1.0)))
    with pytest.raises(BrixelError, match=r"one map was given; expected several"):
        SegmentationProbe().fit(feature_map, [labels])
    with pytest.raises(BrixelError, match="after maps came .*; expected maps alone"):
        list(probe.stream([feature_map, pairs[0][0]]))


def test_features_that_are_not_finite_are_refused():
    feature_map, labels = planted()
    feature_map.features[2, 3, 4] = torch.nan
    with pytest.raises(BrixelError, match="features hold values that are not finite; leave such images out"):
        SegmentationProbe().fit([feature_map], [labels])


def test_a_fit_that_fails_leaves_no_probe(settings, pairs):
    images, masks = pairs
    probe = SegmentationProbe(**settings).fit(images, masks)
    with pytest.raises(BrixelError, match="hold only the class 3"):
        probe.fit(images, [np.full((24, 32), 3)] * 3)
    with pytest.raises(NotFittedError):
        probe.predict(images[0])


def test_the_default_dtype_of_a_program_changes_nothing(settings, pairs):
    images, masks = pairs
    expected = SegmentationProbe(**settings).fit(images, masks).predict_proba(images[0])
    torch.set_default_dtype(torch.float64)
    try:
        found = SegmentationProbe(**settings).fit(images, masks).predict_proba(images[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)


# ---------------------------------------------------------------- manners


def test_scikit_learn_clones_checks_and_validates_it(settings, pairs):
    images, masks = pairs
    probe = SegmentationProbe(**{**settings, "model": "brixel-tiny"}, regularisation=2.0, class_names=["a", "b", "c"])
    again = clone(probe)
    assert again.get_params() == probe.get_params()
    assert again is not probe
    assert again.set_params(regularisation=3.0, **settings).regularisation == 3.0
    with pytest.raises(BrixelError, match="SegmentationProbe has no parameter 'regularization'; did you mean 'regul"):
        again.set_params(regularization=1)
    with pytest.raises(TheirNotFittedError):
        check_is_fitted(again)
    check_is_fitted(again.fit(images, masks))
    assert cross_val_score(again, images, masks, cv=KFold(3)).tolist() == [1, 1, 1]
    assert repr(SegmentationProbe("brixel-tiny", seed=3)) == "SegmentationProbe(model='brixel-tiny', seed=3)"


@pytest.mark.parametrize("call", ["predict", "predict_proba", "score", "evaluate", "stream", "save"])
def test_what_is_not_fitted_says_so(call, tmp_path):
    with pytest.raises(
        NotFittedError, match="this SegmentationProbe is not fitted yet: call fit, or load one"
    ) as error:
        getattr(SegmentationProbe(), call)(*([tmp_path] if call != "score" and call != "evaluate" else [[], []]))
    assert isinstance(error.value, AttributeError | ValueError)


def test_a_fit_that_stops_early_warns(settings, pairs, monkeypatch, caplog):
    monkeypatch.setattr("brixel.probe.solvers._MOST_CALLS", 2)
    with caplog.at_level(logging.WARNING, "brixel"), warnings.catch_warnings():
        SegmentationProbe(**settings).fit(*pairs)
    assert "stopped after 2 evaluations before it had converged" in caplog.text


def test_streams_go_on_after_an_image_that_cannot_be_used(settings, pairs, tmp_path):
    probe = SegmentationProbe(**settings).fit(*pairs)
    found = list(probe.stream_all([pairs[0][0], tmp_path / "no.png", pairs[0][1]]))
    assert [isinstance(each, Exception) for each in found] == [False, True, False]
    assert np.array_equal(found[2], pairs[1][1])
    assert len(list(probe.stream(iter(pairs[0])))) == 3


def test_larger_images_than_a_band(settings, monkeypatch):
    image, labels = blocks(5, 48, 64)
    probe = SegmentationProbe(**settings).fit([image], [labels])
    whole = probe.predict_proba(image)
    monkeypatch.setattr("brixel.probe.pixels._BAND_VALUES", 700)
    monkeypatch.setattr("brixel.probe.base._READOUT_VALUES", 5000)
    assert np.allclose(probe.predict_proba(image), whole, atol=1e-6)
    assert np.array_equal(probe.predict(image), labels)
