"""What a probe is measured by, in plain torch: classes, boundaries, points, depth, surface normals.

`docs/evaluation.md` says what each number means. Counts are added up over images before anything is divided, except
where a function says that it is of one image. Labels below zero are "not labelled": such pixels count nowhere.

Legend: H x W pixels, K classes, N points or valid pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError

IGNORE = -1  # a pixel without a label


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (row) were taken for each class (column): labels of one shape -> (K, K), int64."""
    _check_shapes(predicted, labels)
    valid = labels >= 0
    if valid.any() and int(labels[valid].max()) >= classes:
        raise BrixelError(f"labels reach {int(labels.max())}; with {classes} classes they must lie below that")
    pairs = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def pixel_accuracy(counts: Tensor) -> float:
    """Share of labelled pixels that got their class, of counts (K, K)."""
    return float(counts.diagonal().sum() / counts.sum().clamp(min=1))


def intersection_union(counts: Tensor) -> Tensor:
    """Pixels that are in both and in either of label and prediction, by class: (K, K) -> (2, K)."""
    both = counts.diagonal()
    return torch.stack([both, counts.sum(0) + counts.sum(1) - both])


def mean_iou(both_either: Tensor) -> Tensor:
    """Mean over classes of intersection over union, (..., 2, K) -> (...); classes in neither are left out; else 0."""
    both, either = both_either.double().unbind(-2)
    present = either > 0
    return (both / either.clamp(min=1)).sum(-1) / present.sum(-1).clamp(min=1)


def iou_terms(both_either: Tensor) -> Tensor:
    """What each image adds to the mean IoU of all, (N, 2, K) -> (N,), whose mean is that figure; for intervals.

    To first order: what the mean IoU would be if all images were like this one. Drawing images with replacement
    instead, and computing the figure of each sample, goes wrong where a class is in few of them: samples without it
    drop it from the mean, and lie above or below the figure itself.
    """
    both, either = both_either.double().unbind(-2)  # N K
    whole = either.sum(0).clamp(min=1)  # K
    iou, present = both.sum(0) / whole, either.sum(0) > 0
    change = ((both - iou * either) / whole).sum(-1) / present.sum().clamp(min=1)
    return mean_iou(both_either.sum(0)) + len(both) * change


def boundary_intersection_union(predicted: Tensor, labels: Tensor, classes: int, within_px: int) -> Tensor:
    """As :func:`intersection_union`, but of the strips inside each class's outline alone: (H, W) labels -> (2, K).

    A strip is what lies within ``within_px`` pixels (in the larger of the two axes) of a pixel of another class. Pixels
    without a label are no other class and count nowhere; nor is the image's frame an outline.
    """
    _check_shapes(predicted, labels)
    known = torch.where(labels >= 0, predicted, IGNORE)
    strips = [torch.where(_near_another(each, within_px), each, IGNORE) for each in (labels, known)]
    of_labels, of_predicted, of_both = (
        torch.bincount(each[each >= 0], minlength=classes)
        for each in (*strips, torch.where(strips[0] == strips[1], strips[0], IGNORE))
    )
    return torch.stack([of_both, of_labels + of_predicted - of_both])


def _near_another(labels: Tensor, within_px: int) -> Tensor:
    """Pixels that have one of another class nearby, (H, W): the largest or the smallest label around is not theirs."""
    side = 2 * within_px + 1
    lost = -(2**20)  # never the largest
    near = [torch.where(labels >= 0, sign * labels, lost).float()[None] for sign in (1, -1)]
    for shape, padding in (((side, 1), (within_px, 0)), ((1, side), (0, within_px))):
        near = [F.max_pool2d(each, shape, stride=1, padding=padding) for each in near]
    return (labels >= 0) & ((near[0][0] != labels) | (-near[1][0] != labels))


def pck(distances: Tensor, thresholds: Tensor) -> Tensor:
    """Share of points (N,) whose match lies within each threshold of where it should, same unit; 0 for no points."""
    within = distances[None] <= thresholds[:, None]
    return within.double().sum(1) / max(1, len(distances))


def depth_errors(predicted: Tensor, depth: Tensor) -> dict[str, float]:
    """RMSE (the data's unit), mean relative error and share within a factor of 1.25, of one image.

    Pixels without a measurement, 0 or not finite, are left out. Raises BrixelError where none is left.
    """
    _check_shapes(predicted, depth)
    valid = depth.isfinite() & (depth > 0)
    if not valid.any():
        raise BrixelError("a depth map holds no value above zero; leave out such images")
    ours, theirs = predicted[valid].double().clamp(min=1e-6), depth[valid].double()
    ratio = torch.maximum(ours / theirs, theirs / ours)
    return {
        "rmse": float((ours - theirs).square().mean().sqrt()),
        "abs_rel": float(((ours - theirs).abs() / theirs).mean()),
        "delta1": float((ratio < 1.25).double().mean()),
    }


def angles(predicted: Tensor, normals: Tensor) -> Tensor:
    """Degrees between normals (3, H, W) where the second has a direction: (N,). Lengths do not matter."""
    _check_shapes(predicted, normals)
    valid = normals.isfinite().all(0) & (normals.square().sum(0) > 1e-6)
    ours, theirs = (F.normalize(each[:, valid].double(), dim=0) for each in (predicted, normals))  # 3 N
    # twice the arc tangent keeps small angles, which the arc cosine of a product near 1 loses
    return torch.rad2deg(2 * torch.atan2((ours - theirs).norm(dim=0), (ours + theirs).norm(dim=0)))


def normal_errors(degrees: Tensor) -> dict[str, float]:
    """Mean and median angle and the shares within 11.25, 22.5 and 30 degrees of angles (N,) of one image."""
    if not len(degrees):
        raise BrixelError("a normal map holds no direction; leave out such images")
    ordered = degrees.sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    within = {f"within_{limit:g}": float((degrees <= limit).double().mean()) for limit in (11.25, 22.5, 30.0)}
    return {"mean_deg": float(degrees.mean()), "median_deg": float(middle), **within}


def _check_shapes(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise BrixelError(f"the prediction has shape {tuple(ours.shape)}, the data {tuple(theirs.shape)}")
