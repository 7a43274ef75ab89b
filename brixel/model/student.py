"""The student: a frozen backbone on the small image, and an upsampler that predicts the map of the large one.

The graph of arXiv 2511.05168, section 1 of `docs/method.md`. Tensors in, tensors out; :class:`brixel.BrixelFeatures`
deals with files and images.
"""

import torch
from torch import Tensor, nn

from brixel.backbones.base import Backbone
from brixel.errors import BrixelError
from brixel.model.adapter import Adapter
from brixel.model.head import Head
from brixel.model.upsampler import Upsampler


class Student(nn.Module):
    """A backbone and its upsampler. The backbone stays frozen and in evaluation mode.

    Args:
        backbone: The frozen vision transformer.
        upsampler: Adapter and head for maps of the backbone's width.
        blocks: The four blocks, from 0, whose maps the upsampler reads; the last is the backbone's last.

    Raises:
        BrixelError: The last of ``blocks`` is not the backbone's last block.
    """

    def __init__(self, backbone: Backbone, upsampler: Upsampler, blocks: tuple[int, ...]) -> None:
        super().__init__()
        if blocks[-1] != backbone.depth - 1:
            raise BrixelError(f"blocks are {list(blocks)}; the last must be the backbone's last, {backbone.depth - 1}")
        self.backbone = backbone
        self.backbone.requires_grad_(False)
        self.upsampler = upsampler
        self.blocks = blocks
        self.eval()

    @property
    def adapter(self) -> Adapter:
        """The upsampler's adapter."""
        return self.upsampler.adapter

    @property
    def head(self) -> Head:
        """The upsampler's head."""
        return self.upsampler.head

    @property
    def embed_dim(self) -> int:
        """Channels of the maps, D."""
        return self.backbone.width

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels: H and W of the model's input must be multiples of it."""
        return self.backbone.patch_px

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the maps."""
        return self.head.out.weight.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the dense map of a batch.

        Differentiable in the upsampler and the pixels; use ``torch.no_grad()`` where no gradient is needed.

        Args:
            pixels: (B, 3, H, W), normalised with the backbone's mean and standard deviation, H and W multiples of
                ``patch_px``.

        Returns:
            The dense map (B, D, 4h, 4w) for the patch grid h x w; channels last in memory.

        Raises:
            BrixelError: The pixels have another shape, dtype or device than the model takes.
        """
        return self.upsampler(pixels, self.backbone.block_maps(pixels, self.blocks))

    def backbone_features(self, pixels: Tensor) -> Tensor:
        """Compute the frozen backbone's own last map.

        Args:
            pixels: (B, 3, H, W), as for the model itself.

        Returns:
            The normalised patch tokens of the last block as a map, (B, D, h, w).
        """
        return self.backbone.block_maps(pixels, self.blocks[-1:])[0]

    def requires_grad_(self, requires_grad: bool = True) -> "Student":
        """Turn gradients of the upsampler on or off; the backbone stays frozen."""
        self.upsampler.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> "Student":
        """Set training mode of the upsampler; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self
