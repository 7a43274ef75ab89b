"""Figures beside those of scikit-learn and scipy, on random data: two ways to each number, one of them not ours."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage, stats
from scipy.signal import windows
from scipy.spatial.transform import Rotation
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    jaccard_score,
    mean_absolute_error,
    mean_absolute_percentage_error,
    root_mean_squared_error,
)
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.neighbors import NearestNeighbors

from brixel.evaluate import metrics
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.datasets.labelled import read_labelled
from brixel.evaluate.feature_cache import Features
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.fidelity import l1_and_cosine, teacher_edges
from brixel.evaluate.matching import match_distances, random_homography
from brixel.evaluate.probes.segmentation import segment
from brixel.evaluate.probes.training import Cells, ProbeSettings, train_probe
from brixel.model.losses import edge_loss, principal_directions, spectral_loss
from brixel.probe import metrics as class_metrics
from brixel.probe.readouts import linear_readout

CLASSES = 7  # of which 5 is in no label, 6 in neither label nor prediction


def smooth(numbers, shape, sigma=3):
    return ndimage.gaussian_filter(numbers.normal(size=shape), (0, sigma, sigma))


@pytest.fixture(scope="module")
def labelled():
    """Blobs of five classes with a quarter of the pixels ignored; a prediction that is right on about half of them."""
    numbers = np.random.default_rng(0)
    labels = smooth(numbers, (5, 50, 70)).argmax(0)
    wrong = smooth(numbers, (6, 50, 70)).argmax(0)
    predicted = np.where(smooth(numbers, (1, 50, 70))[0] > 0, labels, wrong)
    labels[smooth(numbers, (1, 50, 70))[0] > 0.03] = class_metrics.IGNORE
    assert 0.1 < (labels < 0).mean() < 0.5
    assert 5 in predicted[labels >= 0]
    return torch.from_numpy(predicted), torch.from_numpy(labels)


def test_areas(labelled):
    predicted, labels = labelled
    ours, theirs = predicted[labels >= 0], labels[labels >= 0]
    counts = class_metrics.confusion(predicted, labels, CLASSES)
    assert counts.tolist() == confusion_matrix(theirs, ours, labels=range(CLASSES)).tolist()
    assert class_metrics.pixel_accuracy(counts) == pytest.approx(accuracy_score(theirs, ours))
    both, either = class_metrics.intersection_union(counts)
    expected = jaccard_score(theirs, ours, average=None)  # of the classes that are in either, as the mean below
    assert (both / either)[:6].tolist() == pytest.approx(expected.tolist())
    assert either[6] == 0
    mean = float(class_metrics.mean_iou(class_metrics.intersection_union(counts)))
    assert mean == pytest.approx(jaccard_score(theirs, ours, average="macro"))


@pytest.mark.parametrize("within_px", [1, 3, 8])
def test_strips_along_outlines(labelled, within_px):
    predicted, labels = labelled
    square = np.ones((2 * within_px + 1, 2 * within_px + 1), dtype=bool)

    def strips(numbers):  # pixels K
        near = [ndimage.binary_dilation((numbers >= 0) & (numbers != each), square) for each in range(CLASSES)]
        return np.stack([(numbers == each) & near[each] for each in range(CLASSES)], -1).reshape(-1, CLASSES)

    theirs, ours = strips(labels.numpy()), strips(torch.where(labels >= 0, predicted, -1).numpy())
    found = metrics.boundary_intersection_union(predicted, labels, CLASSES, within_px)
    assert found.tolist() == [(ours & theirs).sum(0).tolist(), (ours | theirs).sum(0).tolist()]
    expected = jaccard_score(theirs[:, :6], ours[:, :6], average="macro")
    assert float(class_metrics.mean_iou(found)) == pytest.approx(expected)


def test_depth():
    numbers = np.random.default_rng(1)
    depth = np.where(numbers.random((40, 60)) < 0.2, 0, numbers.uniform(0.5, 10, (40, 60)))
    predicted = depth * np.exp(numbers.normal(0, 0.2, depth.shape)) + 0.01
    found = metrics.depth_errors(torch.from_numpy(predicted), torch.from_numpy(depth))
    theirs, ours = depth[depth > 0], predicted[depth > 0]
    assert found["rmse"] == pytest.approx(root_mean_squared_error(theirs, ours))
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(theirs, ours))
    assert found["delta1"] == np.mean(np.abs(np.log(ours) - np.log(theirs)) < np.log(1.25))


def test_angles_of_known_rotations():
    """From a ten-thousandth of a degree to almost half a turn."""
    numbers = np.random.default_rng(2)
    normals, other = numbers.normal(size=(2, 500, 3))
    axes = np.cross(normals, other)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    degrees = np.concatenate([np.geomspace(1e-4, 29, 300), numbers.uniform(29, 179.9999, 200)])
    turned = Rotation.from_rotvec(axes * degrees[:, None], degrees=True).apply(normals)
    ours = turned * numbers.uniform(0.1, 5, (500, 1))  # lengths do not matter
    found = metrics.angles(*(torch.from_numpy(each.T[:, None]) for each in (ours, normals)))
    assert found.tolist() == pytest.approx(degrees.tolist(), rel=1e-8)
    figures = metrics.normal_errors(found)
    assert figures["mean_deg"] == pytest.approx(np.mean(degrees))
    assert figures["median_deg"] == pytest.approx(np.median(degrees))
    for limit in (11.25, 22.5, 30):
        share = stats.percentileofscore(degrees, limit, kind="weak") / 100
        assert figures[f"within_{limit:g}"] == pytest.approx(share)


def test_shares_of_points():
    numbers = np.random.default_rng(3).gamma(2, 0.03, 300)
    limits = [0.01, 0.02, 0.05, 0.1]
    found = metrics.pck(torch.from_numpy(numbers), torch.tensor(limits, dtype=torch.float64))
    assert found.tolist() == pytest.approx([stats.percentileofscore(numbers, each, "weak") / 100 for each in limits])


def close_intervals(found, rows, statistic):
    """Both ends lie within a fifth of the standard error: what is left of 1000 draws, by two random generators."""
    numbers = np.arange(len(rows))

    def resampled(drawn):
        return float(statistic(rows[drawn.astype(int)]))

    settings = {"n_resamples": 4000, "method": "percentile", "vectorized": False}
    theirs = stats.bootstrap((numbers,), resampled, rng=np.random.default_rng(0), **settings)
    expected = theirs.confidence_interval
    assert found[0] == pytest.approx(expected.low, abs=0.2 * theirs.standard_error)
    assert found[1] == pytest.approx(expected.high, abs=0.2 * theirs.standard_error)
    return True


def test_bootstrap_of_a_mean():
    rows = np.random.default_rng(4).gamma(1.5, 2, 60)  # lopsided, so that the interval is
    assert close_intervals(interval(torch.from_numpy(rows)), rows, np.mean)


def test_bootstrap_of_a_ratio_and_of_a_mean_iou():
    numbers = np.random.default_rng(5)
    either = numbers.integers(0, 400, (40, CLASSES))
    rows = np.stack([numbers.binomial(either, 0.6), either], 1)  # images 2 K

    def ratio(sums):
        return sums[..., 0, :].sum(-1) / sums[..., 1, :].sum(-1)

    def miou(drawn):
        both, all_of = drawn.sum(0)
        return np.mean(both / all_of)

    found = interval(torch.from_numpy(rows), ratio)
    assert close_intervals(found, rows, lambda drawn: ratio(drawn.sum(0)))
    assert close_intervals(interval(metrics.iou_terms(torch.from_numpy(rows))), rows, miou)


@pytest.fixture(scope="module")
def maps():
    """A student's map and the teacher's, (1, 24, 13, 17): smooth, with a common mean, alike but for noise."""
    numbers = np.random.default_rng(6)
    teacher = 1 + 2 * smooth(numbers, (24, 13, 17), 1.5)
    return [torch.from_numpy(each)[None] for each in (teacher + 0.3 * numbers.normal(size=teacher.shape), teacher)]


def cells(plane):
    return plane[0].flatten(1).T.numpy()  # H*W D


def test_l1_and_cosine(maps):
    found = l1_and_cosine(*maps)
    assert found["l1"] == pytest.approx(mean_absolute_error(cells(maps[1]), cells(maps[0])), rel=1e-5)
    assert found["cosine"] == pytest.approx(1 - paired_cosine_distances(*map(cells, maps)).mean(), rel=1e-5)


def gradients(maps, directions):
    """Sobel in x and y of every projection, inner cells alone: 2 N H-2 W-2."""
    planes = np.einsum("nd,dyx->nyx", directions.numpy(), maps[0].numpy())
    return np.stack([[ndimage.sobel(each, axis)[1:-1, 1:-1] for each in planes] for axis in (1, 0)])


def test_directions_and_edges(maps):
    student, teacher = maps
    directions = principal_directions(teacher)
    fitted = PCA(8, svd_solver="full").fit(cells(teacher)[::3]).components_
    assert np.allclose(np.abs(directions.numpy() @ fitted.T), np.eye(8), atol=1e-6)

    ours, theirs = (gradients(each, directions) for each in maps)
    expected = ((ours - theirs) ** 2).mean((1, 2, 3)).sum()
    assert float(edge_loss(student, teacher, directions=directions)) == pytest.approx(expected)

    strength = (theirs**2).sum((0, 1))
    edges = teacher_edges(teacher, directions).numpy()
    assert edges.sum() == round(0.1 * strength.size)
    assert strength[edges].min() > strength[~edges].max()


def test_spectrum(maps):
    window = np.outer(*(windows.hann(side) for side in (13, 17)))
    radius = np.hypot(*np.meshgrid(fft.fftfreq(13), fft.fftfreq(17), indexing="ij")).ravel()
    logs = []
    for each in maps:
        amplitude = np.abs(fft.fft2(each[0].numpy() * window, norm="ortho")).mean(0).ravel()
        means, edges, _ = stats.binned_statistic(radius, amplitude, "mean", 24, (0, radius.max()))
        compared = ((edges[:-1] + edges[1:]) / 2 >= 0.3 * radius.max()) & np.isfinite(means)
        logs.append(np.log(means[compared] + 1e-6))
    expected = np.mean((logs[0] - logs[1]) ** 2)
    assert float(spectral_loss(*maps)) == pytest.approx(expected)


def test_nearest_features():
    """Features read between cells, the cell with the most similar one, and how far it is from where it should be."""
    numbers = np.random.default_rng(7)
    first, second = (torch.from_numpy(smooth(numbers, (10, 12, 16), 1)) for _ in range(2))
    homography = random_homography(torch.Generator().manual_seed(3))
    points = torch.from_numpy(numbers.random((200, 2)))
    x, y, scale = homography.numpy() @ np.concatenate([points.numpy().T, np.ones((1, 200))])
    places = np.stack([y / scale * 12 - 0.5, x / scale * 16 - 0.5])
    asked = np.stack([ndimage.map_coordinates(each, places, order=1, mode="nearest") for each in first.numpy()], 1)
    neighbours = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(cells(second[None]))
    rows, columns = np.divmod(neighbours.kneighbors(asked, return_distance=False)[:, 0], 16)
    expected = np.hypot((columns + 0.5) / 16 - points[:, 0].numpy(), (rows + 0.5) / 12 - points[:, 1].numpy())
    assert match_distances(first, second, homography, points)[0].tolist() == pytest.approx(expected.tolist())


@pytest.mark.slow
def test_a_linear_probe_is_least_squares():
    """With noise, so that the best fit is not what was planted."""
    generator = torch.Generator().manual_seed(0)
    features = Features(
        FeatureSource("any", lambda pixels: pixels, 8), [torch.randn(6, 8, 8, generator=generator) for _ in range(10)]
    )
    inputs = torch.cat([features[number].flatten(1).T for number in range(10)])
    truth = inputs @ torch.tensor([2.0, -1, 0, 3, 1, -2]) + 4 + torch.randn(640, generator=generator)
    examples = Cells(features, 64)

    def loss(outputs, items):
        return (outputs[0, 0, :, 0] - truth[torch.as_tensor(items)]).square().mean()

    def score(readout, images):
        items = [64 * number + cell for number in images for cell in range(64)]
        return -float(loss(readout(examples.inputs(items)), items))

    settings = ProbeSettings(steps=400, batch_size=640, learning_rates=(0.01, 0.1), weight_decay=0)
    probe = train_probe(lambda width: linear_readout(width, 1), examples, loss, score, settings)
    found = torch.cat([probe.readout(features.batch([number])).flatten() for number in range(10)])
    expected = LinearRegression().fit(inputs.numpy(), truth.numpy()).predict(inputs.numpy())
    assert np.abs(found.numpy() - expected).max() < 0.01


@pytest.mark.slow
def test_segmentation_reaches_what_logistic_regression_reaches(tmp_path):
    """Colours of four classes that overlap; a cell is a pixel of the mask, so that both see the same examples."""
    numbers = np.random.default_rng(8)
    centres = numbers.uniform(60, 195, (4, 3))
    inputs, classes = {}, {}
    for split, count in (("train", 8), ("val", 6)):
        masks = numbers.integers(0, 4, (count, 16, 16))
        colours = np.clip(centres[masks] + numbers.normal(0, 25, (*masks.shape, 3)), 0, 255).astype(np.uint8)
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(colours[index].repeat(4, 0).repeat(4, 1)).save(tmp_path / split / f"images/{index}.png")
            Image.fromarray(masks[index].astype(np.uint8)).save(tmp_path / split / f"masks/{index}.png")
        inputs[split], classes[split] = colours.reshape(-1, 3) / 255, masks.ravel()
    regression = LogisticRegression(C=100, max_iter=1000).fit(inputs["train"], classes["train"])
    theirs = regression.predict(inputs["val"])

    source = FeatureSource("colours", lambda pixels: torch.nn.functional.avg_pool2d(pixels, 4), 4, scale=4)
    data = [read_labelled("plain", tmp_path, split) for split in ("train", "val")]
    settings = ProbeSettings(steps=300, batch_size=1024, learning_rates=(0.001, 0.03))
    ours = segment(source, *data, 64, settings=settings)
    expected = accuracy_score(classes["val"], theirs)
    assert 0.6 < expected < 0.95
    assert ours.accuracy == pytest.approx(expected, abs=0.01)
    miou = float(class_metrics.mean_iou(ours.areas.sum(0)))
    assert miou == pytest.approx(jaccard_score(classes["val"], theirs, average="macro"), abs=0.015)
