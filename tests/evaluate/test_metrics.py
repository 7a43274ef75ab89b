"""Figures against cases that are counted by hand."""

import numpy as np
import pytest
import torch

from brixel import BrixelError
from brixel.evaluate import metrics
from brixel.evaluate.bootstrap import interval
from brixel.probe import metrics as class_metrics

LABELS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [-1, 2, 2, 2]])
PREDICTED = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 2, 2, 1]])


def test_confusion_and_what_follows_from_it():
    counts = class_metrics.confusion(PREDICTED, LABELS, 4)
    assert counts.tolist() == [[3, 1, 0, 0], [1, 3, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert class_metrics.pixel_accuracy(counts) == pytest.approx(8 / 11)
    assert class_metrics.intersection_union(counts).tolist() == [[3, 3, 2, 0], [5, 6, 3, 0]]
    # class 3 occurs nowhere and is left out
    assert float(class_metrics.mean_iou(class_metrics.intersection_union(counts))) == pytest.approx(
        (3 / 5 + 3 / 6 + 2 / 3) / 3
    )


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(BrixelError, match="labels reach 2; with 2 classes"):
        class_metrics.confusion(PREDICTED, LABELS, 2)
    with pytest.raises(BrixelError, match=r"\(3, 4\), the data \(2, 4\)"):
        class_metrics.confusion(PREDICTED, LABELS[:2], 3)


def test_without_any_label_nothing_counts():
    nothing = torch.full((2, 2), -1)
    counts = class_metrics.confusion(torch.zeros(2, 2).long(), nothing, 2)
    assert class_metrics.mean_iou(class_metrics.intersection_union(counts)) == class_metrics.pixel_accuracy(counts) == 0
    assert not metrics.boundary_intersection_union(torch.zeros(2, 2).long(), nothing, 2, 1).any()


def test_boundary_of_two_halves():
    labels = torch.zeros(4, 8, dtype=torch.long)
    labels[:, 4:] = 1
    moved = torch.zeros_like(labels)
    moved[:, 5:] = 1  # the outline one pixel to the right
    # strips of one pixel: columns 3 | 4 against 4 | 5, nothing in common; the frame is no outline
    assert metrics.boundary_intersection_union(moved, labels, 2, 1).tolist() == [[0, 0], [8, 8]]
    # strips of two: 2, 3 | 4, 5 against 3, 4 | 5, 6
    assert metrics.boundary_intersection_union(moved, labels, 2, 2).tolist() == [[4, 4], [12, 12]]
    assert class_metrics.mean_iou(metrics.boundary_intersection_union(labels, labels, 2, 2)) == 1


def test_pixels_without_label_are_no_outline():
    labels = torch.tensor([[0, 0, -1, 1, 1]])
    predicted = torch.tensor([[0, 0, 0, 1, 1]])
    # within one pixel there is no other class; within two, each sees the other across the gap
    assert not metrics.boundary_intersection_union(predicted, labels, 2, 1).any()
    assert metrics.boundary_intersection_union(predicted, labels, 2, 2).tolist() == [[1, 1], [1, 1]]


def test_boundary_against_a_slow_twin():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(low, 3, (9, 11), generator=generator) for low in (-1, 0))

    def strip(each, number, y, x):
        around = each[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        return bool(each[y, x] == number and ((around >= 0) & (around != number)).any())

    known = torch.where(labels >= 0, predicted, -1)
    for number in range(3):
        pairs = [(strip(labels, number, y, x), strip(known, number, y, x)) for y in range(9) for x in range(11)]
        found = metrics.boundary_intersection_union(predicted, labels, 3, 2)[:, number].tolist()
        assert found == [sum(a and b for a, b in pairs), sum(a or b for a, b in pairs)]


def test_pck():
    found = metrics.pck(torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([0.5, 2.0, 10.0]))
    assert found.tolist() == [0.25, 0.75, 1.0]
    assert metrics.pck(torch.zeros(0), torch.tensor([1.0])).tolist() == [0]


def test_depth():
    depth = torch.tensor([[2.0, 4.0], [0.0, float("nan")]])  # the lower row is not measured
    found = metrics.depth_errors(torch.tensor([[3.0, 4.0], [7.0, 7.0]]), depth)
    assert found == pytest.approx({"rmse": 0.5**0.5, "abs_rel": 0.25, "delta1": 0.5})
    with pytest.raises(BrixelError, match="no value above zero"):
        metrics.depth_errors(depth, torch.zeros(2, 2))


def test_normals():
    """Angles of 0, 45, 90 degrees and a pixel without direction."""
    normals = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 2], [0, 0, 0]]).T[:, None]  # 3 1 4
    ours = torch.tensor([[0.0, 0, 3], [0, 1, 1], [1, 0, 0], [1, 0, 0]]).T[:, None]
    degrees = metrics.angles(ours, normals)
    assert degrees.tolist() == pytest.approx([0, 45, 90])
    expected = {"mean_deg": 45, "median_deg": 45, "within_11.25": 1 / 3, "within_22.5": 1 / 3, "within_30": 1 / 3}
    assert metrics.normal_errors(degrees) == pytest.approx(expected)
    assert metrics.normal_errors(torch.tensor([4.0, 1.0]))["median_deg"] == 2.5
    with pytest.raises(BrixelError, match="no direction"):
        metrics.normal_errors(torch.zeros(0))


def test_bootstrap_intervals():
    assert interval(torch.full((7,), 3.0)) == (3.0, 3.0)
    numbers = torch.from_numpy(np.random.default_rng(0).normal(5, 2, 400))
    low, high = interval(numbers)
    width = 2 * 1.96 * float(numbers.std()) / 20  # the normal approximation
    assert low < float(numbers.mean()) < high
    assert high - low == pytest.approx(width, rel=0.1)
    assert interval(numbers) == (low, high)


def test_shares_in_a_mean_iou_average_to_it_and_move_as_it_does():
    """The second class is in one image only, the third in none: no sample may drop or gain a class."""
    either = torch.tensor([[40.0, 0, 0]] * 9 + [[40.0, 10, 0]])
    both = either * torch.linspace(0.5, 0.95, 10)[:, None]
    rows = torch.stack([both, either], 1)
    terms, whole = metrics.iou_terms(rows), class_metrics.mean_iou(rows.sum(0))
    assert float(terms.mean()) == pytest.approx(float(whole)) == pytest.approx((0.725 + 0.95) / 2)
    low, high = interval(terms)
    assert low < float(whole) < high
    weights = torch.full((10,), 1.0, dtype=torch.float64)
    weights[3] += 1e-6  # a little more of one image: the derivative, of which there is this much in its term
    moved = class_metrics.mean_iou((weights[:, None, None] * rows).sum(0)) - whole
    assert float(moved) / 1e-6 * 10 == pytest.approx(float(terms[3] - whole), rel=1e-4)


def test_bootstrap_of_a_ratio_of_sums():
    """Rows of (both, either): the same ratio in each leaves nothing open."""
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [10.0, 20.0]])
    assert interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) == (0.5, 0.5)
