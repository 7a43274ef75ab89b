"""What the student's map is measured by: L1, edges along the teacher's main directions, and high spatial frequencies.

Section 3 of `docs/method.md` (arXiv 2511.05168). Difference from the first release: rings of the spectrum are measured
by true spatial frequency. Every loss takes maps (B, D, H, W), the student's first, computes in float32 (float64 where
a map is float64) with autocast off, and sends gradients to the student alone. Two shapes raise BrixelError.

Legend: B batch, D width, H x W cells, N directions, K every third cell of a map, R rings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from brixel.errors import BrixelError

CELL_STRIDE = 3  # the directions are fitted on every third cell of every map
RINGS = 24
LOWEST_SHARE = 0.3  # of the largest frequency: rings centred below it are not compared
LOG_FLOOR = 1e-6  # added to mean amplitudes before the logarithm: about the rounding of features near 1


@dataclass(frozen=True)
class LossWeights:
    """Weight of each loss in the total, and which rings the spectral one uses; the release's weights by default.

    Raises BrixelError for a weight that is negative or not finite, or where all are zero.
    """

    l1: float = 1.0
    edge: float = 1.0
    spectral: float = 0.1
    true_rings: bool = True

    def __post_init__(self) -> None:
        weights = (self.l1, self.edge, self.spectral)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise BrixelError(f"weights l1, edge, spectral are {weights}; expected finite, none below 0, one above 0")


def total_loss(student: Tensor, teacher: Tensor, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and its parts of non-zero weight, unweighted and detached: "l1", "edge", "spectral"."""
    student, teacher = _widened(student, teacher)  # once for all three
    parts: dict[str, Tensor] = {}
    if weights.l1:
        parts["l1"] = l1_loss(student, teacher)
    if weights.edge:
        parts["edge"] = edge_loss(student, teacher)
    if weights.spectral:
        parts["spectral"] = spectral_loss(student, teacher, shifted=weights.true_rings)
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def l1_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference over all channels and cells."""
    student, teacher = _widened(student, teacher)
    return (student - teacher).abs().mean()


def principal_directions(teacher: Tensor, count: int = 8, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The first ``count`` principal directions of the teacher's cells: (count, D), orthonormal, without gradient.

    PCA of every third cell of every map, row by row from the first; in order of falling variance, signs as they come.
    Where torch.distributed is initialised, count, sum and outer product are summed over ``group`` (None: everyone), so
    that all use one basis, however the maps are dealt out: every process of the group must call this together.
    Raises BrixelError for another shape, ``count`` outside 1 to D, or values that are not finite.
    """
    if teacher.ndim != 4 or 0 in teacher.shape or not 1 <= count <= teacher.shape[1]:
        raise BrixelError(f"{count} directions of maps {tuple(teacher.shape)}; expected 1 to D of (B, D, H, W), none 0")
    with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
        cells = teacher.flatten(2)[..., ::CELL_STRIDE].mT.flatten(0, 1)  # B*K D
        cells = cells.to(torch.promote_types(teacher.dtype, torch.float32))
        sums = _summed(torch.cat([cells.sum(0), cells.new_tensor([len(cells)])]), group)  # D+1
        centred = cells - sums[:-1] / sums[-1]  # before the product: float32 loses a small spread beside a large mean
        covariance = _summed(centred.mT @ centred, group) / sums[-1]  # D D
        if not torch.isfinite(covariance).all():
            raise BrixelError("the teacher's maps hold values that are not finite; no directions can be fitted")
        return torch.linalg.eigh(covariance)[1][:, -count:].flip(1).mT.contiguous()  # from columns of rising variance


def edge_loss(student: Tensor, teacher: Tensor, *, directions: Tensor | None = None) -> Tensor:
    """Mean squared difference of the maps' Sobel gradients along ``directions`` (N, D), in x and in y, summed.

    The plain 3x3 Sobel, (1, 2, 1) across (-1, 0, 1), inside only: no padding, (H - 2) x (W - 2) values.
    Without ``directions``, :func:`principal_directions` fits 8 (D where that is less) on the teacher: then, in a
    distributed run, all processes must call this together. Raises BrixelError for maps under 3 x 3, or another D.
    """
    student, teacher = _widened(student, teacher, least=3)
    if directions is None:
        directions = principal_directions(teacher, min(8, teacher.shape[1]))
    elif directions.ndim != 2 or directions.shape[1] != student.shape[1]:
        raise BrixelError(f"directions have shape {tuple(directions.shape)}; expected (N, {student.shape[1]})")
    with torch.autocast(student.device.type, enabled=False):
        # projection and Sobel are linear: the difference passes through them once
        error = (directions.detach().to(student) @ (student - teacher).flatten(2)).unflatten(2, student.shape[2:])
        down = error[..., :-2, :] + 2 * error[..., 1:-1, :] + error[..., 2:, :]  # B N H W -> B N H-2 W
        along = error[..., :-2] + 2 * error[..., 1:-1] + error[..., 2:]  # B N H W-2
        in_x = down[..., 2:] - down[..., :-2]  # B N H-2 W-2
        in_y = along[..., 2:, :] - along[..., :-2, :]  # B N H-2 W-2
        return in_x.square().mean() + in_y.square().mean()


def spectral_loss(student: Tensor, teacher: Tensor, *, shifted: bool = True) -> Tensor:
    """Mean squared difference of the log amplitudes in rings of high spatial frequency, mean over the batch.

    Hann window, orthonormal FFT, amplitude, mean over channels, mean over each of 24 rings of equal width from
    frequency 0 to the largest present, log(mean + 1e-6). Compared are the rings whose centre lies at or above 0.3
    of the largest frequency; rings without a cell, on small maps, are left out. Maps under 3 x 3 raise BrixelError.

    ``shifted=False``, for the ablation only, is the release's radius: the distance of a cell of the unshifted
    spectrum from the array's centre, as if frequency 0 lay there. Those "high" rings hold the low frequencies.
    """
    student, teacher = _widened(student, teacher, least=3)  # the window of 2 cells is zero
    height, width = student.shape[2:]
    y, x = (torch.hann_window(cells, periodic=False, dtype=torch.float64) for cells in (height, width))
    window, rings = torch.outer(y, x).to(student), _ring_means(height, width, shifted).to(student)  # H W, R H*W
    logs = []
    with torch.autocast(student.device.type, enabled=False):
        for maps in (student, teacher):
            amplitude = torch.fft.fft2(maps * window, norm="ortho").abs().mean(1)  # B H W
            logs.append((amplitude.flatten(1) @ rings.mT + LOG_FLOOR).log())  # B R
        return (logs[0] - logs[1]).square().mean()


def _ring_means(height: int, width: int, shifted: bool) -> Tensor:
    """One row for each ring that is compared, which averages its cells of the spectrum: float64 (R, H*W)."""
    y, x = (
        torch.fft.fftfreq(cells, dtype=torch.float64) if shifted else torch.arange(cells).double() - cells // 2
        for cells in (height, width)
    )
    radius = torch.hypot(y[:, None], x).flatten()  # H*W
    # a cell on an edge is the outer ring's, whatever the rounding; the largest is the last ring's
    ring = (RINGS * radius / radius.max() + 1e-9).floor().clamp(max=RINGS - 1)
    numbers = torch.arange(RINGS, dtype=torch.float64)[:, None]
    members = (ring == numbers) & ((numbers + 0.5) / RINGS >= LOWEST_SHARE)  # 24 H*W
    members = members[members.any(1)].double()  # R H*W
    return members / members.sum(1, keepdim=True)


def _widened(student: Tensor, teacher: Tensor, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both maps, checked, in float32 or the wider of their types; the teacher's without gradient."""
    shapes = f"the student's map has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
    if student.shape != teacher.shape or student.ndim != 4 or 0 in student.shape:
        raise BrixelError(f"{shapes}; expected one shape (B, D, H, W), none of them zero")
    if min(student.shape[2:]) < least:
        raise BrixelError(f"{shapes}; this loss needs maps of at least {least} x {least} cells")
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(wide), teacher.detach().to(wide)


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes of the group, in place; as it is where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, group=group)
    return values
