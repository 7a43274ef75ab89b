"""Models of `transformers` and timm, and users' own modules, as backbones; neither package is imported.

Shapes: B batch, D width, h x w patch grid, N = prefix + h*w tokens.
"""

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from brixel.backbones.base import Backbone, check_members, device_and_dtype
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError

_FINAL_NORMS = ("layernorm", "post_layernorm", "norm")  # names in transformers


class TransformersBackbone(nn.Module):
    """A ViT of `transformers` that returns hidden states: DINOv2, CLIP's vision tower, ViT, I-JEPA and others.

    Maps go through the final norm if the model has one. The number of tokens before the patches is found by a forward
    pass of one patch.

    Args:
        model: The model. Of one with a head or a text tower only the vision transformer is used.
        processor: Its image processor, for mean and standard deviation.
        mean: Mean of red, green and blue, for pixels in [0, 1]; default: the processor's.
        std: Standard deviation of red, green and blue; default: the processor's.

    Raises:
        BrixelError: The model is no vision transformer with square patches and hidden states, or ``mean`` or ``std``
            is not known.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        *,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = _vision_transformer(model).eval()
        name, config = type(self.model).__name__, self.model.config
        self.width = _setting(config, "hidden_size", name)
        self.depth = _setting(config, "num_hidden_layers", name)
        self.patch_px = _square(_setting(config, "patch_size", name), name)
        self.mean = _numbers(mean, getattr(processor, "image_mean", None), name)
        self.std = _numbers(std, getattr(processor, "image_std", None), name)
        self._norm_name = next((name for name in _FINAL_NORMS if hasattr(self.model, name)), None)
        any_size = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if any_size else {}
        self._prefix, self._last_is_normed = self._probe()

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks; see :meth:`Backbone.block_maps`."""
        height, width = _grid_hw(pixels, self.patch_px)
        states = self._hidden_states(pixels)
        tokens = [self._normed(states[index + 1], index)[:, self._prefix :] for index in blocks]  # B h*w D
        if tokens[0].shape[1] != height * width:
            raise BrixelError(
                f"{type(self.model).__name__} gave {tokens[0].shape[1]} patch tokens for a grid of "
                f"{height} x {width}; expected one a patch, after {self._prefix} others"
            )
        return [rearrange(patches, "B (h w) D -> B D h w", h=height, w=width) for patches in tokens]

    def _hidden_states(self, pixels: Tensor) -> Sequence[Tensor]:
        """The tokens (B, N, D) before the first block and after every block."""
        output = self.model(pixel_values=pixels, output_hidden_states=True, return_dict=True, **self._options)
        states = getattr(output, "hidden_states", None)
        if states is None or len(states) != self.depth + 1 or states[-1].ndim != 3:
            found = "none" if states is None else f"{len(states)}, the last of shape {tuple(states[-1].shape)}"
            raise BrixelError(
                f"{type(self.model).__name__} gave as hidden states {found}; expected {self.depth + 1} of (B, N, D)"
            )
        return cast("Sequence[Tensor]", states)

    def _normed(self, tokens: Tensor, block: int) -> Tensor:
        if self._norm_name is None or (self._last_is_normed and block == self.depth - 1):
            return tokens
        return self.model.get_submodule(self._norm_name)(tokens)

    def _probe(self) -> tuple[int, bool]:
        """Run an image of one patch: the number of prefix tokens, and whether the last state is normed already."""
        normed: list[Tensor] = []  # outputs of the final norm
        norm = nn.Identity() if self._norm_name is None else self.model.get_submodule(self._norm_name)
        hook = norm.register_forward_hook(lambda *call: normed.append(call[-1]))
        device, dtype = device_and_dtype(self.model)
        try:
            with torch.no_grad():
                pixels = torch.zeros(1, 3, self.patch_px, self.patch_px, device=device, dtype=dtype)
                last = self._hidden_states(pixels)[-1]
        finally:
            hook.remove()
        return last.shape[1] - 1, any(output.shape == last.shape and torch.equal(output, last) for output in normed)


class TimmBackbone(nn.Module):
    """A ViT of timm, through its ``forward_intermediates``.

    Args:
        model: The model, made with ``dynamic_img_size=True``.
        mean: Mean of red, green and blue, for pixels in [0, 1]; default: that of the model's ``pretrained_cfg``.
        std: Standard deviation of red, green and blue; default: that of the model's ``pretrained_cfg``.

    Raises:
        BrixelError: The model takes images of one size only, is no ViT with square patches, or ``mean`` or ``std`` is
            not known.
    """

    def __init__(self, model: Any, *, mean: Iterable[float] | None = None, std: Iterable[float] | None = None) -> None:
        super().__init__()
        name = type(model).__name__
        if getattr(model, "dynamic_img_size", None) is False:
            raise BrixelError(f"{name} takes images of one size; give dynamic_img_size=True to timm.create_model")
        self.model = model.eval()
        self.width = _setting(model, "embed_dim", name)
        self.depth = len(_setting(model, "blocks", name))
        self.patch_px = _square(_setting(_setting(model, "patch_embed", name), "patch_size", name), name)
        defaults = getattr(model, "pretrained_cfg", None) or {}
        self.mean = _numbers(mean, defaults.get("mean"), name)
        self.std = _numbers(std, defaults.get("std"), name)

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks; see :meth:`Backbone.block_maps`."""
        _grid_hw(pixels, self.patch_px)
        ascending = sorted(set(blocks))
        maps = self.model.forward_intermediates(
            pixels, indices=ascending, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        by_block = dict(zip(ascending, maps, strict=True))
        return [by_block[index] for index in blocks]


def as_backbone(
    module: nn.Module, *, mean: Iterable[float] | None = None, std: Iterable[float] | None = None
) -> Backbone:
    """A module as a frozen backbone in evaluation mode: itself if it has ``block_maps``, else in a wrapper.

    ``mean``, ``std``: for a model of `transformers`, which does not know them, or in place of those that timm knows.
    Raises BrixelError for a module that lacks members of :class:`Backbone`.
    """
    modeling = sys.modules.get("transformers.modeling_utils")  # imported already if the module is from there
    if hasattr(module, "block_maps"):
        if mean is not None or std is not None:
            raise BrixelError(f"{type(module).__name__} has mean and std of its own; set them there")
    elif modeling is not None and isinstance(module, modeling.PreTrainedModel):
        module = TransformersBackbone(module, mean=mean, std=std)
    elif hasattr(module, "forward_intermediates"):
        module = TimmBackbone(module, mean=mean, std=std)
    check_members(module)
    return cast("Backbone", module.eval().requires_grad_(False))


def config_of(backbone: Backbone) -> ViTConfig | ForeignConfig:
    """The configuration that is saved for a backbone: all fields of our own ViT, the sizes of any other."""
    if isinstance(backbone, ViT):
        return backbone.config
    inner = backbone.model if isinstance(backbone, TransformersBackbone | TimmBackbone) else backbone
    mean, std = (cast("tuple[float, float, float]", values) for values in (backbone.mean, backbone.std))
    return ForeignConfig(type(inner).__name__, backbone.width, backbone.depth, backbone.patch_px, mean, std)


def _vision_transformer(model: Any) -> Any:
    """The vision transformer inside a model of `transformers`, without heads or a text tower."""
    base = getattr(model, "base_model", model)  # for DINOv3 only its blocks, without embeddings
    model = base if hasattr(base, "embeddings") else model
    return getattr(model, "vision_model", model)


def _setting(owner: Any, field: str, model: str) -> Any:
    value = getattr(owner, field, None)
    if value is None:
        raise BrixelError(f"{model} has no {field}; expected a vision transformer of one width and one patch size")
    return value


def _square(patch: Any, model: str) -> int:
    sides = tuple(patch) if isinstance(patch, Sequence) else (patch, patch)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise BrixelError(f"{model} has patches of {sides} px; expected square ones")
    return sides[0]


def _numbers(given: Iterable[float] | None, default: Iterable[float] | None, model: str) -> tuple[float, ...]:
    numbers = default if given is None else given
    if numbers is None:
        raise BrixelError(
            f"{model} does not say how its images are normalised; give mean=(...) and std=(...), for instance "
            "image_mean and image_std of its image processor"
        )
    return tuple(numbers)


def _grid_hw(pixels: Tensor, patch_px: int) -> tuple[int, int]:
    """The patch grid of pixels (B, 3, H, W); BrixelError if they are not whole patches."""
    if pixels.ndim != 4 or pixels.shape[2] % patch_px or pixels.shape[3] % patch_px:
        raise BrixelError(
            f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W), H and W multiples of the patch, "
            f"{patch_px} px: pad or resize the image, or let extract() do so"
        )
    return pixels.shape[2] // patch_px, pixels.shape[3] // patch_px
