"""The upsampler: the part of a student after its backbone, saved as `adapter.safetensors`; one class per kind.

Shapes: B batch, D width, h x w patch grid, s scale: cells of the dense map per patch, on each axis.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError
from brixel.model.adapter import Adapter, resize
from brixel.model.config import BILINEAR, UNIVERSAL, AdapterConfig
from brixel.model.head import GROUPS, Head
from brixel.model.size_gain import SizeGain
from brixel.model.universal import UniversalUpsampler

UPSCALE = 4
"""Cells of the dense map per patch, on each axis, unless another scale is asked for."""
LARGEST_SCALE = 32


class AnyUpsampler(nn.Module):
    """What all kinds have in common: pixels and maps of the backbone in, the dense map out."""

    any_scale = True
    """Whether the dense map may have another number of cells per patch than 4."""

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Upsample the backbone's maps.

        Args:
            pixels: (B, 3, H, W), normalised.
            maps: The backbone's maps of these pixels that this kind reads, (B, D, h, w) each; the last one last.
            scale: Cells of the dense map per patch, on each axis, s.

        Returns:
            The dense map (B, D, sh, sw).
        """
        raise NotImplementedError


class BilinearUpsampler(AnyUpsampler):
    """Bilinear interpolation of the backbone's last map; it has no weights."""

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Interpolate the last map; see :meth:`AnyUpsampler.forward`."""
        height, width = maps[-1].shape[2:]
        return resize(maps[-1], (scale * height, scale * width))


class _SeesImage(AnyUpsampler):
    """An upsampler that needs the image as it was before the backbone's normalisation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def guide(self, pixels: Tensor) -> Tensor:
        """The image in [0, 1] of normalised pixels (B, 3, H, W)."""
        mean, std = (torch.tensor(values, dtype=pixels.dtype, device=pixels.device) for values in (self.mean, self.std))
        return pixels * std[:, None, None] + mean[:, None, None]


class GuidedUpsampler(_SeesImage):
    """The universal upsampler on a backbone: it reads the last map and the image.

    Args:
        mean: Mean of the backbone's normalisation, by channel.
        std: Its standard deviation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        self.universal = UniversalUpsampler()

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Upsample the last map, guided by the pixels; see :meth:`AnyUpsampler.forward`."""
        height, width = maps[-1].shape[2:]
        out: Tensor = self.universal(maps[-1], self.guide(pixels), (scale * height, scale * width))
        return out


class Upsampler(AnyUpsampler):
    """A trained upsampler of the first generation: adapter and head read the pixels and four maps of the backbone.

    A fresh upsampler returns the backbone's last map, upsampled bilinearly.

    Args:
        width: Channels of the backbone's maps, D; a multiple of 32.
        config: The options in which upsamplers differ.

    Raises:
        BrixelError: ``width`` is not a multiple of 32.
    """

    any_scale = False

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        _check_width(width)
        self.adapter = Adapter(width, blend=config.blend)
        self.head = Head(width, residual_detour=config.residual_detour)

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Upsample four maps; see :meth:`AnyUpsampler.forward`. The scale must be 4."""
        assert scale == UPSCALE, scale
        return self.head(*self.adapter(pixels, maps))


class MixedUpsampler(_SeesImage, Upsampler):
    """A first-generation upsampler held near the universal one: the map is U + s (own - U), with its own share s.

    At sizes that no training saw, a first-generation adapter may be worse than interpolation; half of it is not.

    Args:
        width: Channels of the backbone's maps, D; a multiple of 32.
        config: The options in which upsamplers differ, with the share.
        mean: Mean of the backbone's normalisation, by channel.
        std: Its standard deviation.
    """

    def __init__(self, width: int, config: AdapterConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        Upsampler.__init__(self, width, config)
        self.mean, self.std = tuple(mean), tuple(std)
        self.universal = UniversalUpsampler()
        self.own_share = config.own_share

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Upsample four maps; see :meth:`AnyUpsampler.forward`. The scale must be 4."""
        own = Upsampler.forward(self, pixels, maps, scale)
        universal = self.universal(maps[-1], self.guide(pixels), (own.shape[2], own.shape[3]))
        return torch.lerp(universal, own.to(universal.dtype), self.own_share)


class SecondUpsampler(_SeesImage):
    """A trained upsampler of the second generation: the universal one, and what adapter and head know of this backbone.

    The map is U(last) + g (U(base) - U(last) + residual), with the universal upsampler U, the adapter's ``base``, the
    head's residual in units of the teacher's standard deviations, and the gain g of :class:`SizeGain`. Both maps share
    the weights of U, so U runs once. A fresh one gives U(last).

    Args:
        width: Channels of the backbone's maps, D; a multiple of 32.
        config: The options in which upsamplers differ.
        mean: Mean of the backbone's normalisation, by channel.
        std: Its standard deviation.

    Raises:
        BrixelError: ``width`` is not a multiple of 32.
    """

    def __init__(self, width: int, config: AdapterConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(mean, std)
        _check_width(width)
        self.adapter = Adapter(width, blend=config.blend)
        self.head = Head(width, residual_detour=False)
        self.universal = UniversalUpsampler()
        self.gain = SizeGain(config.grids)
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_std", torch.ones(width))

    feature_mean: Tensor
    """Mean of the teacher's features by channel, (D,); losses are computed on (features - mean) / ``feature_std``."""
    feature_std: Tensor

    def forward(self, pixels: Tensor, maps: Sequence[Tensor], scale: int = UPSCALE) -> Tensor:
        """Upsample four maps; see :meth:`AnyUpsampler.forward`. For other scales than 4 the residual is resized."""
        prior, queries, base = self.adapter(pixels, maps)
        height, width = maps[-1].shape[2:]
        gain = self.gain((height, width)).to(base.dtype)
        mixed = self.mixed(maps[-1], base, gain)
        size_hw = (scale * height, scale * width)
        dense = self.universal.upsample(mixed, maps[-1], self.guide(pixels), size_hw)
        residual = self.head.residual(prior, queries, size_hw).to(dense.dtype)
        return torch.addcmul(dense, residual, (gain * self.feature_std)[:, None, None])

    def mixed(self, last: Tensor, base: Tensor, gain: Tensor) -> Tensor:
        """What U is applied to: the last map, and the gain's share of the way to the base; all (B, D, h, w)."""
        if self.adapter.blend is None:
            return last
        return torch.lerp(last, base.to(last.dtype), gain.to(last.dtype))  # autocast gives them different dtypes


TrainedUpsampler = Upsampler | SecondUpsampler
WithUniversal = GuidedUpsampler | MixedUpsampler | SecondUpsampler


def _check_width(width: int) -> None:
    if width % GROUPS:
        raise BrixelError(f"the backbone is {width} wide; a trained adapter needs a multiple of {GROUPS}")


def make_upsampler(vit: ViTConfig | ForeignConfig, config: AdapterConfig) -> AnyUpsampler:
    """An upsampler of the configured kind for a backbone, as initialised.

    Raises:
        BrixelError: The backbone's width does not suit a trained one.
    """
    if config.kind == BILINEAR:
        return BilinearUpsampler()
    if config.kind == UNIVERSAL:
        return GuidedUpsampler(vit.mean, vit.std)
    if config.generation == 2:
        return SecondUpsampler(vit.width, config, vit.mean, vit.std)
    if config.own_share < 1:
        return MixedUpsampler(vit.width, config, vit.mean, vit.std)
    return Upsampler(vit.width, config)
