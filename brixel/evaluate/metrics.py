"""Metrics in plain torch: of boundaries, points, depth and surface normals; those of classes are `probe.metrics`.

`docs/evaluation.md` defines them. Counts are summed over images before anything is divided, except where a function
says that it is of one image. Pixels whose label is below zero have none and are ignored.

Legend: H x W pixels, K classes, N points or valid pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError
from brixel.probe.metrics import IGNORE, check_shapes, mean_iou


def iou_terms(areas: Tensor) -> Tensor:
    """A linear approximation of the mean IoU by image, (N, 2, K) -> (N,), whose mean is the mean IoU; for intervals.

    The term of an image is what the mean IoU would be, to first order, if all images were like this one. Computing the
    mean IoU of each bootstrap sample instead is biased where a class is in few images: samples without it leave it out.
    """
    intersection, union = areas.double().unbind(-2)  # N K
    total = union.sum(0).clamp(min=1)  # K
    iou, present = intersection.sum(0) / total, union.sum(0) > 0
    change = ((intersection - iou * union) / total).sum(-1) / present.sum().clamp(min=1)
    return mean_iou(areas.sum(0)) + len(intersection) * change


def boundary_intersection_union(predicted: Tensor, labels: Tensor, classes: int, within_px: int) -> Tensor:
    """As :func:`intersection_union`, within the strips inside the classes' outlines: (H, W) labels -> (2, K).

    A strip contains the pixels within ``within_px`` (in the larger of the two axes) of a pixel of another class. Pixels
    without a label are ignored, and the image's frame is not an outline.
    """
    check_shapes(predicted, labels)
    known = torch.where(labels >= 0, predicted, IGNORE)
    strips = [torch.where(_near_another(classes_hw, within_px), classes_hw, IGNORE) for classes_hw in (labels, known)]
    of_labels, of_predicted, of_both = (
        torch.bincount(strip[strip >= 0], minlength=classes)
        for strip in (*strips, torch.where(strips[0] == strips[1], strips[0], IGNORE))
    )
    return torch.stack([of_both, of_labels + of_predicted - of_both])


def _near_another(labels: Tensor, within_px: int) -> Tensor:
    """Pixels near another class, (H, W): the largest or the smallest label around them is not their own."""
    side = 2 * within_px + 1
    unlabelled = -(2**20)  # never the largest
    near = [torch.where(labels >= 0, sign * labels, unlabelled).float()[None] for sign in (1, -1)]
    for shape, padding in (((side, 1), (within_px, 0)), ((1, side), (0, within_px))):
        near = [F.max_pool2d(signed, shape, stride=1, padding=padding) for signed in near]
    return (labels >= 0) & ((near[0][0] != labels) | (-near[1][0] != labels))


def region_j(predicted: Tensor, mask: Tensor) -> float:
    """J of DAVIS: intersection over union of two sets of pixels (H, W), boolean; 1 where both are empty."""
    check_shapes(predicted, mask)
    union = int((predicted | mask).sum())
    return int((predicted & mask).sum()) / union if union else 1.0


def boundary_f(predicted: Tensor, mask: Tensor, within: float = 0.008) -> float:
    """F of DAVIS: the F-measure of the outlines of two sets of pixels (H, W), boolean; 1 where both have none.

    A pixel of an outline is found where one of the other outline lies within ``within`` of the image's diagonal,
    rounded up to whole pixels.
    """
    check_shapes(predicted, mask)
    radius = math.ceil(within * math.hypot(*mask.shape))
    ours, theirs = _outline(predicted), _outline(mask)
    counts = int(ours.sum()), int(theirs.sum())
    if 0 in counts:
        return float(counts == (0, 0))
    precision = int((ours & _dilated(theirs, radius)).sum()) / counts[0]
    recall = int((theirs & _dilated(ours, radius)).sum()) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: Tensor) -> Tensor:
    """The pixels that differ from the next one to the right, below, or both."""
    padded = F.pad(mask[None, None].float(), (0, 1, 0, 1), mode="replicate")[0, 0].bool()
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _dilated(outline: Tensor, radius: int) -> Tensor:
    """The pixels within ``radius`` of an outline."""
    offsets = torch.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    return F.conv2d(outline[None, None].float(), disk[None, None], padding=radius)[0, 0] > 0.5


def pck(distances: Tensor, thresholds: Tensor) -> Tensor:
    """Share of points whose distance (N,) is within each threshold, in the same unit; 0 for no points."""
    within = distances[None] <= thresholds[:, None]
    return within.double().sum(1) / max(1, len(distances))


def depth_errors(predicted: Tensor, depth: Tensor) -> dict[str, float]:
    """RMSE (the data's unit), mean relative error and share within a factor of 1.25, of one image.

    Pixels without a measurement (0 or not finite) are left out. Raises BrixelError where none is left.
    """
    check_shapes(predicted, depth)
    valid = depth.isfinite() & (depth > 0)
    if not valid.any():
        raise BrixelError("a depth map has no value above zero; leave its image out")
    ours, theirs = predicted[valid].double().clamp(min=1e-6), depth[valid].double()
    ratio = torch.maximum(ours / theirs, theirs / ours)
    return {
        "rmse": float((ours - theirs).square().mean().sqrt()),
        "abs_rel": float(((ours - theirs).abs() / theirs).mean()),
        "delta1": float((ratio < 1.25).double().mean()),
    }


def angles(predicted: Tensor, normals: Tensor) -> Tensor:
    """Degrees between vectors (3, H, W), where the second is not zero: (N,). Lengths do not matter."""
    check_shapes(predicted, normals)
    valid = normals.isfinite().all(0) & (normals.square().sum(0) > 1e-6)
    ours, theirs = (F.normalize(vectors[:, valid].double(), dim=0) for vectors in (predicted, normals))  # 3 N
    # atan2 is exact for small angles, where the arc cosine of a product near 1 is not
    return torch.rad2deg(2 * torch.atan2((ours - theirs).norm(dim=0), (ours + theirs).norm(dim=0)))


def normal_errors(degrees: Tensor) -> dict[str, float]:
    """Mean and median angle and the shares within 11.25, 22.5 and 30 degrees of angles (N,) of one image."""
    if not len(degrees):
        raise BrixelError("a normal map has no direction; leave its image out")
    ordered = degrees.sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    within = {f"within_{limit:g}": float((degrees <= limit).double().mean()) for limit in (11.25, 22.5, 30.0)}
    return {"mean_deg": float(degrees.mean()), "median_deg": float(middle), **within}
