"""Principal directions of the cells of feature maps, and colours by the first three of one map or several.

Shapes: D channels, H x W cells of a map, K cells that the fit uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from brixel.errors import BrixelError
from brixel.utils.torch_defaults import plain_defaults

MAX_FIT_CELLS = 16_384  # of the fit of the covariance
ROUNDING = 1e-6  # a standard deviation below this share of the features' root mean square is rounding


@dataclass(frozen=True, eq=False)
class PcaBasis:
    """A mean, three principal components, and the range of every component; float32 tensors on the CPU.

    Args:
        mean: (D,).
        components: (3, D), in order of falling variance. A component of zeros, where the maps have fewer than three
            directions, is shown as mid grey.
        low: (3,), the projections that become 0.
        high: (3,), the projections that become 255.

    Raises:
        BrixelError: The shapes do not fit together.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in (self.mean, self.components, self.low, self.high)]
        if self.mean.ndim != 1 or shapes != [shapes[0], (3, *shapes[0]), (3,), (3,)]:
            raise BrixelError(f"mean, components, low and high have shapes {shapes}; expected (D,), (3, D), (3,), (3,)")

    @classmethod
    @plain_defaults()
    def fit(cls, features: Sequence[Tensor]) -> PcaBasis:
        """Fit one basis to several maps.

        The components are fitted to all cells, or to 16,384 that are drawn with a fixed seed; their entries of largest
        magnitude are positive. The range is from the 1st to the 99th percentile over all cells.

        Args:
            features: Maps (D, H, W), which may differ in H and W.

        Returns:
            The basis.

        Raises:
            BrixelError: No maps, another shape, different D, or values that are not finite.
        """
        is_list = isinstance(features, Sequence) and not isinstance(features, str | bytes)
        if not is_list or not features or not all(isinstance(each, Tensor) for each in features):
            raise BrixelError("no feature maps to fit a basis to; give at least one tensor (D, H, W), in a list")
        for position, feature_map in enumerate(features):
            check_cells(feature_map, f"feature map {position}", features[0].shape[0], "the first map")
        cells = sample_cells(features)  # (D, K)
        mean = cells.mean(dim=1)
        components = _leading_directions(cells, mean)
        mean, components = mean.float(), components.float()
        projections = [_project(feature_map, mean, components).flatten(1) for feature_map in features]
        low, high = np.percentile(np.concatenate(projections, axis=1), (1, 99), axis=1).astype(np.float32)
        return cls(mean, components, torch.from_numpy(low), torch.from_numpy(high))

    @plain_defaults()
    def project(self, features: Tensor) -> npt.NDArray[np.uint8]:
        """Colour a map; projections outside ``low`` to ``high`` are clipped.

        Args:
            features: (D, H, W).

        Returns:
            RGB colours (H, W, 3), uint8.

        Raises:
            BrixelError: Another shape, another D than the basis has, or values that are not finite.
        """
        check_cells(features, "the feature map", self.mean.shape[0], "the basis")
        low, span = self.low[:, None, None], (self.high - self.low)[:, None, None]
        scaled = (_project(features, self.mean, self.components) - low) / torch.where(span > 0, span, 1)
        colours = torch.where(span > 0, scaled, 0.5).clamp(0, 1)
        return rearrange((colours * 255).round().to(torch.uint8), "rgb H W -> H W rgb").contiguous().numpy()


def check_cells(features: Tensor, name: str, embed_dim: int, other: str) -> None:
    """Raise BrixelError unless ``features`` are finite and (D, H, W), with as many channels as ``other`` has."""
    if features.ndim != 3 or 0 in features.shape:
        raise BrixelError(f"{name} has shape {tuple(features.shape)}; expected (D, H, W), none of them zero")
    if features.shape[0] != embed_dim:
        raise BrixelError(f"{name} has {features.shape[0]} channels, {other} has {embed_dim}; use maps of one model")
    if not torch.isfinite(features).all():
        raise BrixelError(f"{name} holds values that are not finite; mend or leave out those cells first")


def sample_cells(features: Sequence[Tensor]) -> Tensor:
    """Cells of all maps as columns (D, K), float64 on the CPU; the same cells on every call."""
    counts = [feature_map.shape[1] * feature_map.shape[2] for feature_map in features]
    chosen = torch.arange(sum(counts), device="cpu")
    if len(chosen) > MAX_FIT_CELLS:  # random, since every n-th cell could always be the same column
        permuted = torch.randperm(len(chosen), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        chosen = permuted[:MAX_FIT_CELLS].sort().values
    samples, start = [], 0
    for feature_map, count in zip(features, counts, strict=True):
        cells = (chosen[(chosen >= start) & (chosen < start + count)] - start).to(feature_map.device)
        width = feature_map.shape[2]
        samples.append(feature_map.detach()[:, cells // width, cells % width].cpu().double())
        start += count
    return torch.cat(samples, dim=1).contiguous()


def _leading_directions(cells: Tensor, mean: Tensor) -> Tensor:
    """Up to three eigenvectors of the covariance as rows, signs fixed, padded with zeros: (3, D)."""
    centred = cells - mean[:, None]  # (D, K)
    variances, directions = directions_by_variance(centred @ centred.T / cells.shape[1])
    components = torch.zeros(3, len(mean), dtype=cells.dtype, device="cpu")
    kept = directions[variances > ROUNDING**2 * cells.square().mean()][:3]
    components[: len(kept)] = kept
    return components


def directions_by_variance(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a covariance (D, D) or another second moment, falling, and its eigenvectors as rows.

    The entry of largest magnitude of every row is positive, so that the signs do not depend on the library.
    """
    values, vectors = torch.linalg.eigh(moment)  # rising
    rows = vectors.flip(1).T
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return values.flip(0), rows * largest.sign()


def _project(features: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Project every cell onto every component: (3, H, W), float32 on the CPU."""
    device = features.device
    # contiguous, so that the order of summation does not depend on the memory format
    centred = features.detach().float().contiguous() - mean.to(device)[:, None, None]  # (D, H, W)
    projections: Tensor = torch.tensordot(components.to(device), centred, dims=1)
    return projections.cpu()
