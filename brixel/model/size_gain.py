"""How much a trained upsampler's own contribution counts, as a function of the size of the patch grid."""

import torch
from torch import Tensor, nn

ELSEWHERE = 0.5
"""The gain at grids far from those of the training, and everywhere before it."""


class SizeGain(nn.Module):
    """A gain, learned at the grids of the training, that falls to 0.5 one octave away from the nearest of them.

    Between the grids of the training it is interpolated linearly in the logarithm of the side.

    Args:
        grids: Sides of square patch grids in patches, ascending.
    """

    def __init__(self, grids: tuple[int, ...]) -> None:
        super().__init__()
        self.grids = grids
        self.gains = nn.Parameter(torch.full((len(grids),), ELSEWHERE))

    def on_grids(self, grids: tuple[int, ...]) -> "SizeGain":
        """The same gain, to be learned at other grids."""
        other = SizeGain(grids).to(self.gains)
        with torch.no_grad():
            other.gains.copy_(torch.stack([self((grid, grid)) for grid in grids]))
        return other if grids != self.grids else self

    def forward(self, grid_hw: tuple[int, int]) -> Tensor:
        """The gain of a patch grid h x w, whose side is the root of its number of patches: a scalar."""
        knots = torch.tensor(self.grids, dtype=torch.float32, device=self.gains.device).log2()
        side = torch.full_like(knots[0], grid_hw[0] * grid_hw[1]).log2() / 2
        gains, steps = self.gains.float(), knots.diff()
        climbed = (side - knots[:-1]).clamp_min(0).minimum(steps)
        between = gains[0] + (gains.diff() / steps * climbed).sum()
        near = (side - knots).abs().min()
        return ELSEWHERE + (1 - near).clamp_min(0) * (between - ELSEWHERE)
