"""Metrics by image, and the percentile bootstrap over images: samples drawn with replacement, always the same ones."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 1000
_SEED = 0


def by_metric(records: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """Metrics by image as a tensor (N,), float64, per metric."""
    return {key: torch.tensor([record[key] for record in records], dtype=torch.float64) for key in records[0]}


def interval(images: Tensor, statistic: Callable[[Tensor], Tensor] | None = None) -> tuple[float, float]:
    """The 95 % interval of a statistic of N images: rows (N, ...).

    ``statistic``: from the sums of rows over each sample, (DRAWS, ...), to values (DRAWS,); None for the mean of rows
    that are numbers. To compare two methods, subtract inside it: both are then evaluated on the same samples.
    """
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(len(images), (DRAWS, len(images)), generator=generator)
    counts = torch.zeros(drawn.shape, dtype=torch.float64)  # how often each image is in each sample
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    sums = counts @ images.double().reshape(len(images), -1)
    sums = sums.reshape(DRAWS, *images.shape[1:])  # DRAWS ...
    values = sums / len(images) if statistic is None else statistic(sums)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
