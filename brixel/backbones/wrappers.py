"""Other people's models as backbones: those of `transformers` and timm, and a user's own; neither package is imported.

Shapes: B batch, D width, h x w patch grid, N = prefix + h*w tokens.
"""

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from brixel.backbones.base import Backbone, check_members, whereabouts
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError

_FINAL_NORMS = ("layernorm", "post_layernorm", "norm")  # as transformers calls them


class TransformersBackbone(nn.Module):
    """A ViT of `transformers` that gives its hidden states: DINOv2, CLIP's vision tower, ViT, I-JEPA and their like.

    ``model``: the model, or one with a head or a text tower, of which the vision transformer alone is taken.
    ``processor``: its image processor, for mean and deviation; or give ``mean`` and ``std``.
    Maps go through the final norm where the model has one. The tokens before the patches are counted.
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
        self._norm_name = next((each for each in _FINAL_NORMS if hasattr(self.model, each)), None)
        any_size = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if any_size else {}
        self._prefix, self._last_is_normed = self._probe()

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks, as :class:`Backbone` says."""
        grid_hw = _grid_hw(pixels, self.patch_px)
        states = self._hidden_states(pixels)
        tokens = [self._normed(states[index + 1], index)[:, self._prefix :] for index in blocks]  # B h*w D
        if tokens[0].shape[1] != grid_hw[0] * grid_hw[1]:
            raise BrixelError(
                f"{type(self.model).__name__} gave {tokens[0].shape[1]} patch tokens for a grid of "
                f"{grid_hw[0]} x {grid_hw[1]}; expected one a patch, after {self._prefix} others"
            )
        return [each.unflatten(1, grid_hw).permute(0, 3, 1, 2) for each in tokens]  # B D h w

    def _hidden_states(self, pixels: Tensor) -> Sequence[Tensor]:
        """The tokens (B, N, D) before the first block and after each."""
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
        """From an image of one patch: the number of tokens before it, and whether the last state is normed already."""
        seen: list[Tensor] = []
        norm = nn.Identity() if self._norm_name is None else self.model.get_submodule(self._norm_name)
        hook = norm.register_forward_hook(lambda *call: seen.append(call[-1]))
        device, dtype = whereabouts(self.model)
        try:
            with torch.no_grad():
                pixels = torch.zeros(1, 3, self.patch_px, self.patch_px, device=device, dtype=dtype)
                last = self._hidden_states(pixels)[-1]
        finally:
            hook.remove()
        return last.shape[1] - 1, any(each.shape == last.shape and torch.equal(each, last) for each in seen)


class TimmBackbone(nn.Module):
    """A ViT of timm, by its ``forward_intermediates``; mean and deviation are those of its ``pretrained_cfg``."""

    def __init__(self, model: Any, *, mean: Iterable[float] | None = None, std: Iterable[float] | None = None) -> None:
        super().__init__()
        name = type(model).__name__
        if getattr(model, "dynamic_img_size", None) is False:
            raise BrixelError(f"{name} takes images of one size; give dynamic_img_size=True to timm.create_model")
        self.model = model.eval()
        self.width = _setting(model, "embed_dim", name)
        self.depth = len(_setting(model, "blocks", name))
        self.patch_px = _square(_setting(_setting(model, "patch_embed", name), "patch_size", name), name)
        stated = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = _numbers(mean, stated.get("mean"), name), _numbers(std, stated.get("std"), name)

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks, as :class:`Backbone` says."""
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
    """A module as it is if it has ``block_maps``, else in the adapter for its kind, frozen and in evaluation mode.

    ``mean``, ``std``: of a model of `transformers`, which does not know them, or over those that timm states.
    Raises BrixelError for a module that lacks something.
    """
    modeling = sys.modules.get("transformers.modeling_utils")  # loaded, if the module is one of its
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
    """What a saved model says of its backbone: all of our own ViT, the sizes of any other."""
    if isinstance(backbone, ViT):
        return backbone.config
    inner = backbone.model if isinstance(backbone, TransformersBackbone | TimmBackbone) else backbone
    mean, std = (cast("tuple[float, float, float]", each) for each in (backbone.mean, backbone.std))
    return ForeignConfig(type(inner).__name__, backbone.width, backbone.depth, backbone.patch_px, mean, std)


def _vision_transformer(model: Any) -> Any:
    """The part of a model of `transformers` from pixels to tokens, without heads or a text tower."""
    base = getattr(model, "base_model", model)  # of DINOv3 only its blocks
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


def _numbers(given: Iterable[float] | None, stated: Iterable[float] | None, model: str) -> tuple[float, ...]:
    numbers = stated if given is None else given
    if numbers is None:
        raise BrixelError(
            f"{model} does not say how its images are normalised; give mean=(...) and std=(...), for instance "
            "image_mean and image_std of its image processor"
        )
    return tuple(numbers)


def _grid_hw(pixels: Tensor, patch_px: int) -> tuple[int, int]:
    """The patch grid of pixels (B, 3, H, W); BrixelError where they are not whole patches."""
    if pixels.ndim != 4 or pixels.shape[2] % patch_px or pixels.shape[3] % patch_px:
        raise BrixelError(
            f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W), H and W multiples of the patch, "
            f"{patch_px} px: pad or resize the image, or let extract() do so"
        )
    return pixels.shape[2] // patch_px, pixels.shape[3] // patch_px
