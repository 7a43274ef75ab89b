"""How sure a mean over pictures is: percentile bootstrap, pictures drawn with replacement, always the same draws."""

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS = 1000
_SEED = 0


def interval(pictures: Tensor, figure: Callable[[Tensor], Tensor] | None = None) -> tuple[float, float]:
    """The 95 % interval of a figure of N pictures: what 1000 other samples of N of them would give.

    ``pictures``: (N, ...), a row each. ``figure``: from rows summed over each sample, (DRAWS, ...), to the figure
    (DRAWS,); None for the mean of rows that are numbers. Of two methods, subtract inside ``figure``: then both are
    taken on the same pictures, and what makes some pictures harder for all falls out.
    """
    sums = _counts(len(pictures)) @ pictures.double().reshape(len(pictures), -1)
    sums = sums.reshape(DRAWS, *pictures.shape[1:])  # DRAWS ...
    figures = sums / len(pictures) if figure is None else figure(sums)
    low, high = torch.quantile(figures, torch.tensor([0.025, 0.975], dtype=figures.dtype)).tolist()
    return low, high


def _counts(pictures: int) -> Tensor:
    """How often each picture is in each sample: (DRAWS, N), float64, rows that sum to N."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(pictures, (DRAWS, pictures), generator=generator)
    return torch.zeros(DRAWS, pictures, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
