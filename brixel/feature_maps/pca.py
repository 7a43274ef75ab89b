"""Three colours out of D channels: the first principal components of one feature map or of several.

Legend: D channels, H x W cells of one map, K cells that the fit looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel.errors import BrixelError

MAX_FIT_CELLS = 16_384  # the covariance is fitted on at most this many cells
ROUNDING = 1e-6  # a spread below this share of the features' root mean square is rounding, not structure


@dataclass(frozen=True, eq=False)
class PcaBasis:
    """A mean, three directions and the range that each is shown in; float32 tensors on the CPU.

    ``mean`` is (D,), ``components`` (3, D) in order of falling variance, ``low`` and ``high`` are (3,): the
    projections that become 0 and 255. A component of zeros, where the maps have fewer than three directions,
    is shown as mid grey. Raises BrixelError where the shapes do not fit together.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(part.shape) for part in (self.mean, self.components, self.low, self.high)]
        if self.mean.ndim != 1 or shapes != [shapes[0], (3, *shapes[0]), (3,), (3,)]:
            raise BrixelError(f"mean, components, low and high have shapes {shapes}; expected (D,), (3, D), (3,), (3,)")

    @classmethod
    def fit(cls, features: Sequence[Tensor]) -> PcaBasis:
        """Fit one basis to maps of shape (D, H, W), which may differ in H and W but not in D.

        The directions come from all cells, or from MAX_FIT_CELLS drawn with a fixed seed; their sign is such
        that the entry of largest magnitude is positive. The range runs from the 1st to the 99th percentile
        over all cells. Raises BrixelError for no maps, another shape, different D, or values not finite.
        """
        if not features:
            raise BrixelError("no feature maps to fit a basis to; give at least one of shape (D, H, W)")
        for position, one in enumerate(features):
            _check(one, f"feature map {position}", features[0].shape[0], "the first map")
        cells = _sample_cells(features)  # (D, K)
        mean = cells.mean(dim=1)
        components = _leading_directions(cells, mean)
        mean, components = mean.float(), components.float()
        projections = [_project(one, mean, components).flatten(1) for one in features]
        low, high = np.percentile(np.concatenate(projections, axis=1), (1, 99), axis=1).astype(np.float32)
        return cls(mean, components, torch.from_numpy(low), torch.from_numpy(high))

    def project(self, features: Tensor) -> npt.NDArray[np.uint8]:
        """Colour a map (D, H, W) as uint8 (H, W, 3); projections outside ``low`` to ``high`` are clipped.

        Raises BrixelError for another shape, another D than the basis has, or values that are not finite.
        """
        _check(features, "the feature map", self.mean.shape[0], "the basis")
        low, span = self.low[:, None, None], (self.high - self.low)[:, None, None]
        scaled = (_project(features, self.mean, self.components) - low) / torch.where(span > 0, span, 1)
        shown = torch.where(span > 0, scaled, 0.5).clamp(0, 1)  # (3, H, W)
        return (shown * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _check(features: Tensor, what: str, embed_dim: int, other: str) -> None:
    if features.ndim != 3 or 0 in features.shape:
        raise BrixelError(f"{what} has shape {tuple(features.shape)}; expected (D, H, W), none of them zero")
    if features.shape[0] != embed_dim:
        raise BrixelError(f"{what} has {features.shape[0]} channels, {other} has {embed_dim}; use maps of one model")
    if not torch.isfinite(features).all():
        raise BrixelError(f"{what} holds values that are not finite; mend or leave out those cells first")


def _sample_cells(features: Sequence[Tensor]) -> Tensor:
    """Columns of all maps side by side, float64 on the CPU, (D, K): the same ones on every call."""
    counts = [one.shape[1] * one.shape[2] for one in features]
    chosen = torch.arange(sum(counts))
    if len(chosen) > MAX_FIT_CELLS:  # drawn, not every n-th: n cells could be one row, and give one column
        drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
        chosen = drawn[:MAX_FIT_CELLS].sort().values
    parts, first = [], 0
    for one, count in zip(features, counts, strict=True):
        inside = (chosen[(chosen >= first) & (chosen < first + count)] - first).to(one.device)
        width = one.shape[2]
        parts.append(one.detach()[:, inside // width, inside % width].cpu().double())
        first += count
    return torch.cat(parts, dim=1).contiguous()


def _leading_directions(cells: Tensor, mean: Tensor) -> Tensor:
    """Up to three eigenvectors of the covariance as rows, signs fixed, filled up with zeros: (3, D)."""
    centred = cells - mean[:, None]  # (D, K)
    variances, vectors = torch.linalg.eigh(centred @ centred.T / cells.shape[1])  # rising variance
    components = torch.zeros(3, len(mean), dtype=cells.dtype)
    spread = variances > ROUNDING**2 * cells.square().mean()
    kept = vectors[:, spread].flip(1)[:, :3].T
    largest = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True))
    components[: len(kept)] = kept * largest.sign()
    return components


def _project(features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Position of every cell along every component, float32 on the CPU: (3, H, W)."""
    device = features.device
    # one memory layout for every map, so that sums run in one order
    centred = features.detach().float().contiguous() - mean.to(device)[:, None, None]  # (D, H, W)
    projections: Tensor = torch.tensordot(components.to(device), centred, dims=1)
    return projections.cpu()
