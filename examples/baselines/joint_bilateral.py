"""Joint bilateral upsampling (Kopf et al., 2007): nothing is trained, two widths are chosen.

The weight of a low-resolution cell falls with its distance from the output cell, and with the distance of their
colours. Over the 5 x 5 cells around the output cell's own, as the universal upsampler sees them.
"""

import torch
from torch import Tensor, nn

from brixel.model.universal import CELLS, GUIDE_PX, WINDOW, OutputGrid, cell_table, weighted_sums, window_cells


class JointBilateral(nn.Module):
    """Features (B, D, h, w) and an image in [0, 1] in, features (B, D, H, W) out.

    Args:
        spatial: Standard deviation of the distance, in low-resolution cells.
        colour: Standard deviation of the colour's distance, for RGB in [0, 1].
    """

    def __init__(self, spatial: float = 0.6, colour: float = 0.1) -> None:
        super().__init__()
        self.spatial, self.colour = spatial, colour

    def forward(self, features: Tensor, guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Upsample."""
        grid = OutputGrid((features.shape[2], features.shape[3]), size_hw, features.device)
        fine = _at(guide, size_hw).permute(0, 2, 3, 1)  # B H W 3
        low = grid.to_slots(fine).mean(3)  # B h w 3
        index = grid.window_index()
        around = low.flatten(1, 2)[:, index.flatten()].unflatten(1, index.shape)  # B h w 25 3
        colours = (grid.to_slots(fine)[..., None, :] - around[:, :, :, None]).square().sum(-1)  # B h w S 25
        line = torch.arange(WINDOW, device=features.device) - WINDOW // 2
        y, x = ((axis.offset[:, None] - line).square() for axis in (grid.down, grid.across))
        places = (y[:, None, :, None] + x[:, None, :]).flatten(2)[None]  # 1 H W 25
        logits = -places / (2 * self.spatial**2) - grid.from_slots(colours) / (2 * self.colour**2)
        weights = torch.cat([logits.softmax(-1), torch.ones_like(logits[..., :1])], -1)
        assert weights.shape[-1] == CELLS + 1
        return weighted_sums(window_cells(cell_table(features), grid), grid.to_slots(weights), grid)


def _at(guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """The image on the output grid, averaged over the pixels that the universal upsampler sees of a cell."""
    pixels = (GUIDE_PX * size_hw[0], GUIDE_PX * size_hw[1])
    if (guide.shape[2], guide.shape[3]) != pixels:
        guide = nn.functional.interpolate(guide, size=pixels, mode="bilinear", align_corners=False)
    return nn.functional.avg_pool2d(guide, GUIDE_PX)
