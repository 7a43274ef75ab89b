"""How sure a mean over images is: percentile bootstrap, images drawn with replacement, always the same draws."""

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS = 1000
_SEED = 0


def interval(images: Tensor, figure: Callable[[Tensor], Tensor] | None = None) -> tuple[float, float]:
    """The 95 % interval of a figure of N images: what 1000 other samples of N of them would give.

    ``images``: (N, ...), a row each. ``figure``: from rows summed over each sample, (DRAWS, ...), to the figure
    (DRAWS,); None for the mean of rows that are numbers. Of two methods, subtract inside ``figure``: then both are
    taken on the same images, and what makes some images harder for all falls out.
    """
    sums = _counts(len(images)) @ images.double().reshape(len(images), -1)
    sums = sums.reshape(DRAWS, *images.shape[1:])  # DRAWS ...
    figures = sums / len(images) if figure is None else figure(sums)
    low, high = torch.quantile(figures, torch.tensor([0.025, 0.975], dtype=figures.dtype)).tolist()
    return low, high


def _counts(images: int) -> Tensor:
    """How often each image is in each sample: (DRAWS, N), float64, rows that sum to N."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(images, (DRAWS, images), generator=generator)
    return torch.zeros(DRAWS, images, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
