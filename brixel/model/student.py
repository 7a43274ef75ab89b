"""The student: a frozen backbone on the small image, and an upsampler that predicts the map of the large one.

The graph of arXiv 2511.05168, section 1 of `docs/method.md`. Tensors in, tensors out; :class:`brixel.BrixelFeatures`
deals with files and images.
"""

import copy
import itertools
from typing import Self

import torch
from torch import Tensor, nn

from brixel.backbones.base import Backbone
from brixel.errors import BrixelError
from brixel.model.adapter import Adapter
from brixel.model.head import Head
from brixel.model.upsampler import LARGEST_SCALE, UPSCALE, AnyUpsampler, SecondUpsampler, TrainedUpsampler, Upsampler
from brixel.utils.fields import Rule, check_field, whole_number

_SCALE = Rule(f"a whole number of cells per patch, 1 to {LARGEST_SCALE}", whole_number(1, LARGEST_SCALE + 1).convert)


class Student(nn.Module):
    """A backbone and its upsampler. The backbone stays frozen and in evaluation mode.

    Args:
        backbone: The frozen vision transformer.
        upsampler: The upsampler, for maps of the backbone's width.
        blocks: The blocks, from 0, whose maps the upsampler reads; the last is the backbone's last.

    Attributes:
        scale: Cells of the dense map per patch, on each axis; see :meth:`at_scale`.

    Raises:
        BrixelError: The last of ``blocks`` is not the backbone's last block.
    """

    def __init__(self, backbone: Backbone, upsampler: AnyUpsampler, blocks: tuple[int, ...]) -> None:
        super().__init__()
        if blocks[-1] != backbone.depth - 1:
            raise BrixelError(f"blocks are {list(blocks)}; the last must be the backbone's last, {backbone.depth - 1}")
        self.backbone = backbone
        self.backbone.requires_grad_(False)
        self.upsampler = upsampler
        self.blocks = blocks
        self.scale = UPSCALE
        self.eval()

    def at_scale(self, scale: int | None) -> Self:
        """The same model, with the same weights in memory, whose maps have another number of cells per patch.

        Args:
            scale: Cells per patch, on each axis; None for the model's own.

        Returns:
            The model itself for its own scale, else a shallow copy.

        Raises:
            BrixelError: ``scale`` is out of range, or the adapter was trained for 4 alone.
        """
        scale = self.scale if scale is None else check_field("scale", scale, _SCALE)
        if scale == self.scale:
            return self
        if not self.upsampler.any_scale:
            raise BrixelError(
                f"scale is {scale}; this model's adapter was trained for {UPSCALE} cells per patch alone: for other "
                "scales use from_backbone(..., adapter='universal')"
            )
        scaled = copy.copy(self)
        scaled.scale = scale
        return scaled

    @property
    def adapter(self) -> Adapter:
        """The adapter of a trained upsampler."""
        return self._trained.adapter

    @property
    def head(self) -> Head:
        """The head of a trained upsampler."""
        return self._trained.head

    @property
    def _trained(self) -> TrainedUpsampler:
        if not isinstance(self.upsampler, Upsampler | SecondUpsampler):
            raise BrixelError(f"a {type(self.upsampler).__name__} has no adapter and no head; only a trained one has")
        return self.upsampler

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
        return self._some_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the maps."""
        return self._some_weight.dtype

    @property
    def _some_weight(self) -> Tensor:
        weights = itertools.chain(self.upsampler.parameters(), self.backbone.parameters(), [torch.empty(0)])
        return next(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the dense map of a batch.

        Differentiable in the upsampler and the pixels; use ``torch.no_grad()`` where no gradient is needed.

        Args:
            pixels: (B, 3, H, W), normalised with the backbone's mean and standard deviation, H and W multiples of
                ``patch_px``.

        Returns:
            The dense map (B, D, sh, sw) for the patch grid h x w and the scale s, usually 4; channels last in memory.

        Raises:
            BrixelError: The pixels have another shape, dtype or device than the model takes.
        """
        return self.upsampler(pixels, self.backbone.block_maps(pixels, self.blocks), self.scale)

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
