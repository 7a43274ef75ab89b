"""How well predicted classes fit labels: pixels are counted, over images, before anything is divided.

`docs/evaluation.md` defines the metrics. Pixels whose label is below zero have none and are ignored.

Legend: K classes.
"""

import torch
from torch import Tensor

from brixel.errors import BrixelError

IGNORE = -1  # a pixel without a label


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Confusion matrix, labels in rows and predictions in columns: two tensors of one shape -> (K, K), int64."""
    check_shapes(predicted, labels)
    valid = labels >= 0
    if valid.any() and int(labels[valid].max()) >= classes:
        raise BrixelError(f"labels reach {int(labels.max())}; with {classes} classes they must be lower")
    pairs = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def pixel_accuracy(counts: Tensor) -> float:
    """Share of labelled pixels whose class is predicted, of counts (K, K)."""
    return float(counts.diagonal().sum() / counts.sum().clamp(min=1))


def intersection_union(counts: Tensor) -> Tensor:
    """Pixels in the intersection and in the union of label and prediction, by class: (K, K) -> (2, K)."""
    intersection = counts.diagonal()
    return torch.stack([intersection, counts.sum(0) + counts.sum(1) - intersection])


def mean_iou(areas: Tensor) -> Tensor:
    """Mean IoU of intersections and unions, (..., 2, K) -> (...), over classes that occur; 0 where none does."""
    intersection, union = areas.double().unbind(-2)
    present = union > 0
    return (intersection / union.clamp(min=1)).sum(-1) / present.sum(-1).clamp(min=1)


def check_shapes(ours: Tensor, theirs: Tensor) -> None:
    """Raise BrixelError where a prediction and the data differ in shape."""
    if ours.shape != theirs.shape:
        raise BrixelError(f"the prediction has shape {tuple(ours.shape)}, the data {tuple(theirs.shape)}")
