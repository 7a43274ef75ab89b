"""The upsampler: the part of a student that is trained, saved (as `adapter.safetensors`) and loaded.

Shapes: B batch, D width, h x w patch grid.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.model.adapter import Adapter
from brixel.model.config import AdapterConfig
from brixel.model.head import GROUPS, Head

UPSCALE = 4
"""Cells of the dense map per patch, on each axis."""


class Upsampler(nn.Module):
    """Adapter and head: pixels and four maps of the backbone in, the dense map out.

    A fresh upsampler returns the backbone's last map, upsampled bilinearly.

    Args:
        width: Channels of the backbone's maps, D; a multiple of 32.
        config: The options in which upsamplers differ.

    Raises:
        BrixelError: ``width`` is not a multiple of 32.
    """

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        if width % GROUPS:
            raise BrixelError(f"the backbone is {width} wide; the adapter needs a multiple of {GROUPS}")
        self.adapter = Adapter(width, blend=config.blend)
        self.head = Head(width, residual_detour=config.residual_detour)

    def forward(self, pixels: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Upsample the backbone's maps.

        Args:
            pixels: (B, 3, H, W), normalised.
            maps: The backbone's four maps of these pixels, (B, D, h, w) each.

        Returns:
            The dense map (B, D, 4h, 4w).
        """
        return self.head(*self.adapter(pixels, maps))
