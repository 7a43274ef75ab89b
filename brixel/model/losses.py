"""Losses of the distillation: L1, edges along the teacher's principal directions, and high spatial frequencies.

Section 3 of `docs/method.md` (arXiv 2511.05168). Difference from the first release: rings of the spectrum are defined
by true spatial frequency. The losses compute in float32 (float64 if a map is float64) with autocast off, and only the
student's map gets a gradient.

Shapes: B batch, D width, H x W cells, N directions, K every third cell of a map, R rings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from brixel.errors import BrixelError

CELL_STRIDE = 3  # the directions are fitted on every third cell
RINGS = 24
LOWEST_SHARE = 0.3  # rings centred below this share of the largest frequency are not compared
LOG_FLOOR = 1e-6  # added to mean amplitudes before the logarithm; about the rounding error of features near 1


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses in their sum; the defaults are those of the first release.

    Args:
        l1: Weight of :func:`l1_loss`.
        edge: Weight of :func:`edge_loss`.
        spectral: Weight of :func:`spectral_loss`.
        true_rings: Its argument ``shifted``.
        cosine: Weight of :func:`cosine_loss`.

    Raises:
        BrixelError: A weight is negative or not finite, or all are zero.
    """

    l1: float = 1.0
    edge: float = 1.0
    spectral: float = 0.1
    true_rings: bool = True
    cosine: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.l1, self.edge, self.spectral, self.cosine)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise BrixelError(
                f"weights l1, edge, spectral, cosine are {weights}; expected finite, none below 0, one above 0"
            )


@dataclass(frozen=True)
class FeatureScale:
    """Mean and standard deviation of a teacher's features by channel, (D,) each.

    With it one recipe suits backbones whose features have other scales.
    """

    mean: Tensor
    std: Tensor


def total_loss(
    student: Tensor, teacher: Tensor, weights: LossWeights, scale: FeatureScale | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of the losses.

    Args:
        student: The student's maps, (B, D, H, W).
        teacher: The teacher's maps, (B, D, H, W).
        weights: The weights; a loss of weight zero is not computed.
        scale: If given, the mean is subtracted before all losses, and features are divided by the standard deviation
            before all but the cosine.

    Returns:
        The sum, and its parts "l1", "edge", "spectral" and "cosine_loss", as far as computed, unweighted and detached.

    Raises:
        BrixelError: As the losses do.
    """
    student, teacher = _widened(student, teacher)  # once for all losses
    parts: dict[str, Tensor] = {}
    if scale is not None:
        student, teacher = (maps - scale.mean[:, None, None].to(maps) for maps in (student, teacher))
    if weights.cosine:
        parts["cosine_loss"] = cosine_loss(student, teacher)
    if scale is not None:
        student, teacher = (maps / scale.std[:, None, None].to(maps) for maps in (student, teacher))
    if weights.l1:
        parts["l1"] = l1_loss(student, teacher)
    if weights.edge:
        parts["edge"] = edge_loss(student, teacher)
    if weights.spectral:
        parts["spectral"] = spectral_loss(student, teacher, shifted=weights.true_rings)
    total = torch.stack([getattr(weights, name.removesuffix("_loss")) * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def l1_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean absolute difference over all channels and cells.

    Args:
        student: The student's maps, (B, D, H, W).
        teacher: The teacher's maps, (B, D, H, W).

    Returns:
        A scalar.

    Raises:
        BrixelError: The maps differ in shape, or have another number of axes.
    """
    student, teacher = _widened(student, teacher)
    return (student - teacher).abs().mean()


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 minus the cosine similarity, averaged over all cells.

    Args:
        student: The student's maps, (B, D, H, W).
        teacher: The teacher's maps, (B, D, H, W).

    Returns:
        A scalar.

    Raises:
        BrixelError: The maps differ in shape, or have another number of axes.
    """
    student, teacher = _widened(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def principal_directions(
    teacher: Tensor, count: int = 8, *, group: dist.ProcessGroup | None = None, across_processes: bool = True
) -> Tensor:
    """Fit the first principal directions of the teacher's cells, by PCA of every third cell in row-major order.

    Where torch.distributed is initialised, the sums behind the covariance run over all processes of ``group``, so that
    they share one basis however the maps are distributed: all of them must call this.

    Args:
        teacher: The teacher's maps, (B, D, H, W).
        count: Number of directions, 1 to D.
        group: The process group; None for all processes.
        across_processes: False fits the maps of this process alone; the others need not call this.

    Returns:
        Orthonormal directions (count, D) in order of falling variance, without gradient; their signs are arbitrary.

    Raises:
        BrixelError: Another shape, ``count`` outside 1 to D, or values that are not finite.
    """
    if teacher.ndim != 4 or 0 in teacher.shape or not 1 <= count <= teacher.shape[1]:
        raise BrixelError(f"{count} directions of maps {tuple(teacher.shape)}; expected 1 to D of (B, D, H, W), none 0")
    with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
        cells = rearrange(teacher.flatten(2)[..., ::CELL_STRIDE], "B D K -> (B K) D")
        cells = cells.to(torch.promote_types(teacher.dtype, torch.float32))
        sums = torch.cat([cells.sum(0), cells.new_tensor([len(cells)])])  # D+1
        sums = _summed(sums, group) if across_processes else sums
        centred = cells - sums[:-1] / sums[-1]  # float32 would lose a small spread next to a large mean
        products = einsum(centred, centred, "K D, K D2 -> D D2")
        covariance = (_summed(products, group) if across_processes else products) / sums[-1]  # D D
        if not torch.isfinite(covariance).all():
            raise BrixelError("the teacher's maps hold values that are not finite; no directions can be fitted")
        return torch.linalg.eigh(covariance)[1][:, -count:].flip(1).mT.contiguous()  # columns come in rising order


def edge_loss(student: Tensor, teacher: Tensor, *, directions: Tensor | None = None) -> Tensor:
    """Compute the mean squared difference of the maps' Sobel gradients along some directions, in x plus in y.

    The filter is the 3x3 Sobel, (1, 2, 1) across (-1, 0, 1), without padding: (H - 2) x (W - 2) values.

    Args:
        student: The student's maps, (B, D, H, W), at least 3 x 3 cells.
        teacher: The teacher's maps, (B, D, H, W).
        directions: (N, D). Default: :func:`principal_directions` fits 8 (or D, if less) on the teacher's maps; in a
            distributed run all processes must then call this.

    Returns:
        A scalar.

    Raises:
        BrixelError: The maps differ in shape or are smaller than 3 x 3, or ``directions`` have another D.
    """
    student, teacher = _widened(student, teacher, least=3)
    if directions is None:
        directions = principal_directions(teacher, min(8, teacher.shape[1]))
    elif directions.ndim != 2 or directions.shape[1] != student.shape[1]:
        raise BrixelError(f"directions have shape {tuple(directions.shape)}; expected (N, {student.shape[1]})")
    with torch.autocast(student.device.type, enabled=False):
        # projection and Sobel are linear, so they are applied to the difference
        error = (directions.detach().to(student) @ (student - teacher).flatten(2)).unflatten(2, student.shape[2:])
        down = error[..., :-2, :] + 2 * error[..., 1:-1, :] + error[..., 2:, :]  # B N H W -> B N H-2 W
        along = error[..., :-2] + 2 * error[..., 1:-1] + error[..., 2:]  # B N H W-2
        in_x = down[..., 2:] - down[..., :-2]  # B N H-2 W-2
        in_y = along[..., 2:, :] - along[..., :-2, :]  # B N H-2 W-2
        return in_x.square().mean() + in_y.square().mean()


def spectral_loss(student: Tensor, teacher: Tensor, *, shifted: bool = True) -> Tensor:
    """Compute the mean squared difference of the log amplitudes in rings of high spatial frequency.

    Steps: Hann window, orthonormal FFT, amplitude, mean over channels, mean over every ring, log(mean + 1e-6). The 24
    rings have equal widths from frequency 0 to the largest. Rings centred below 0.3 of the largest frequency, and on
    small maps rings without a cell, are left out.

    Args:
        student: The student's maps, (B, D, H, W), at least 3 x 3 cells.
        teacher: The teacher's maps, (B, D, H, W).
        shifted: False, for the ablation only, takes the radius of the first release: the distance of a cell of the
            unshifted spectrum from the array's centre, as if frequency 0 were there. Its "high" rings hold the low
            frequencies.

    Returns:
        A scalar.

    Raises:
        BrixelError: The maps differ in shape or are smaller than 3 x 3.
    """
    student, teacher = _widened(student, teacher, least=3)  # the window of 2 cells is zero
    height, width = student.shape[2:]
    y, x = (torch.hann_window(cells, periodic=False, dtype=torch.float64) for cells in (height, width))
    window = einsum(y, x, "H, W -> H W").to(student)
    rings = _ring_weights(height, width, shifted).to(student)  # R H*W
    logs = []
    with torch.autocast(student.device.type, enabled=False):
        for maps in (student, teacher):
            amplitude = torch.fft.fft2(maps * window, norm="ortho").abs().mean(1)  # B H W
            logs.append((amplitude.flatten(1) @ rings.mT + LOG_FLOOR).log())  # B R
        return (logs[0] - logs[1]).square().mean()


def _ring_weights(height: int, width: int, shifted: bool) -> Tensor:
    """Weights that average the spectrum over the rings that are compared: float64 (R, H*W)."""
    y, x = (
        torch.fft.fftfreq(cells, dtype=torch.float64) if shifted else torch.arange(cells).double() - cells // 2
        for cells in (height, width)
    )
    radius = torch.hypot(y[:, None], x).flatten()  # H*W
    # in spite of rounding a cell on an edge is in the outer ring, and the largest radius in the last one
    ring = (RINGS * radius / radius.max() + 1e-9).floor().clamp(max=RINGS - 1)
    numbers = torch.arange(RINGS, dtype=torch.float64)[:, None]
    members = (ring == numbers) & ((numbers + 0.5) / RINGS >= LOWEST_SHARE)  # 24 H*W
    members = members[members.any(1)].double()  # R H*W
    return members / members.sum(1, keepdim=True)


def _widened(student: Tensor, teacher: Tensor, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Check both maps, and convert them to float32 or the wider of their types; the teacher's without gradient."""
    shapes = f"the student's map has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
    if student.shape != teacher.shape or student.ndim != 4 or 0 in student.shape:
        raise BrixelError(f"{shapes}; expected one shape (B, D, H, W), none of them zero")
    if min(student.shape[2:]) < least:
        raise BrixelError(f"{shapes}; this loss needs maps of at least {least} x {least} cells")
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(wide), teacher.detach().to(wide)


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the processes of the group, in place, if torch.distributed is initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, group=group)
    return values
