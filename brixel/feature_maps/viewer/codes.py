"""Maps made small for a page: principal components in 8 bits, and how much cosine similarity loses by that.

A cell becomes its direction and its length. Directions are projected on the principal components of all maps together,
which are not centred, so that products of projections are cosines of features. Component j of code c is
``low[j] + step[j] * c``.

Shapes: D channels, k components, N cells of a map, K cells that are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brixel.feature_maps.matching import unit_cells
from brixel.feature_maps.pca import PcaBasis, sample_cells
from brixel.utils.torch_defaults import plain_defaults

COMPONENTS = 64  # k, unless the maps have fewer directions
LEVELS = 255  # codes are 0 to 255
LENGTH_LEVELS = 65_535
MEASURED_QUERIES = 256  # cells whose similarities to all measured cells are compared


@dataclass(frozen=True)
class SimilarityLoss:
    """How far cosines of decoded cells are from those of the features, as absolute differences.

    Args:
        mean: On average over all pairs.
        p99: Of 99 in 100 pairs at most.
        largest: Of any pair.
    """

    mean: float
    p99: float
    largest: float


@dataclass(frozen=True, eq=False)
class MapCodes:
    """The cells of a map, row by row.

    Args:
        codes: (N, k), uint8.
        lengths: (N,), uint16; the length of a cell in units of ``longest`` / 65535, not 0 where the cell is not zero.
        longest: The length of the longest cell.
    """

    codes: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint16]
    longest: float


@dataclass(frozen=True, eq=False)
class EncodedMaps:
    """Several maps of one model, and what decodes them.

    Args:
        channels: D.
        low: (k,), what code 0 means.
        step: (k,), the distance of neighbouring codes.
        directions: (3, k), the components that colours show, in terms of the k components.
        colour_low: (3,), the products with ``directions`` that become 0.
        colour_high: (3,), those that become 255.
        maps: One per map.
        loss: Measured on cells of all maps.
    """

    channels: int
    low: npt.NDArray[np.float64]
    step: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    colour_low: npt.NDArray[np.float64]
    colour_high: npt.NDArray[np.float64]
    maps: tuple[MapCodes, ...]
    loss: SimilarityLoss


@plain_defaults()
@torch.no_grad()
def encode(features: Sequence[Tensor]) -> EncodedMaps:
    """Reduce maps to codes.

    Args:
        features: Maps (D, H, W) of one model, which may differ in H and W.

    Returns:
        Their codes, in the same order.

    Raises:
        BrixelError: Other shapes, different D, or values that are not finite.
    """
    basis = PcaBasis.fit(features)
    sample = unit_cells(sample_cells(features)[:, None]).float()  # K D
    axes = _components(sample)  # D k
    projections = [_project(feature_map, axes) for feature_map in features]
    low = torch.stack([each.amin(0) for each in projections]).amin(0).double()
    step = (torch.stack([each.amax(0) for each in projections]).amax(0).double() - low) / LEVELS
    directions = (basis.components @ axes).double()  # 3 k
    colour_offset = basis.components.double() @ basis.mean.double()
    return EncodedMaps(
        channels=len(axes),
        low=low.numpy(),
        step=step.numpy(),
        directions=directions.numpy(),
        colour_low=(basis.low + colour_offset).numpy(),
        colour_high=(basis.high + colour_offset).numpy(),
        maps=tuple(
            MapCodes(_quantised(each, low, step).numpy(), *_lengths(feature_map))
            for each, feature_map in zip(projections, features, strict=True)
        ),
        loss=_measure(sample, _quantised(sample @ axes, low, step) * step + low),
    )


def _components(cells: Tensor) -> Tensor:
    """The leading principal components of cells (K, D), not centred, as columns (D, k); the same on every call."""
    count = min(COMPONENTS, *cells.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axes: Tensor = torch.pca_lowrank(cells, count, center=False, niter=4)[2]
    return axes


def _project(features: Tensor, axes: Tensor) -> Tensor:
    """The directions of a map's cells in terms of the components: (N, k), float32 on the CPU."""
    return (unit_cells(features.detach()).float() @ axes.to(features.device)).cpu()


def _quantised(projections: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Codes (N, k), uint8; of cells that set the range, 0 and 255."""
    codes = (projections - low) / torch.where(step > 0, step, 1)
    return codes.round().clamp(0, LEVELS).to(torch.uint8)


def _lengths(features: Tensor) -> tuple[npt.NDArray[np.uint16], float]:
    lengths = torch.linalg.vector_norm(features.detach().flatten(1), dim=0, dtype=torch.float64).cpu().numpy()  # N
    longest = float(lengths.max())
    shares = np.round(lengths / (longest or 1.0) * LENGTH_LEVELS).clip(lengths > 0, LENGTH_LEVELS)
    return shares.astype(np.uint16), longest


def _measure(cells: Tensor, decoded: Tensor) -> SimilarityLoss:
    """Compare the cosines of cells (K, D), of length 1, with those of what the page has in their place, (K, k)."""
    chosen = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:MEASURED_QUERIES]
    approximate = decoded.float()
    differences = (approximate[chosen] @ approximate.T - cells[chosen] @ cells.T).abs().numpy()
    return SimilarityLoss(float(differences.mean()), float(np.percentile(differences, 99)), float(differences.max()))
