"""Models of `transformers`, timm and torch.hub, and users' own modules, as backbones; no package of theirs is imported.

Shapes: B batch, D width, h x w patch grid, N = prefix + h*w tokens.
"""

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from brixel.backbones.base import Backbone, check_members, device_and_dtype
from brixel.backbones.normalisation import Colours, of_processor, unit_normalisation
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.errors import BrixelError

_FINAL_NORMS = ("layernorm", "post_layernorm", "norm")  # names in transformers
# what wrappers of torch and of trainers call the module inside
_INSIDE = ("_orig_mod", "module", "_forward_module", "_checkpoint_wrapped_module")

MeanOrStd = Iterable[float] | float | None


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
        mean: MeanOrStd = None,
        std: MeanOrStd = None,
    ) -> None:
        super().__init__()
        self.model = _vision_transformer(model).eval()
        name, config = type(self.model).__name__, self.model.config
        self.width = _setting(config, "hidden_size", name)
        self.depth = _setting(config, "num_hidden_layers", name)
        self.patch_px = _square(_setting(config, "patch_size", name), name)
        self.mean, self.std = _normalisation(mean, std, _of_processor(processor), name)
        self._norm_name = next((name for name in _FINAL_NORMS if hasattr(self.model, name)), None)
        parameters = inspect.signature(self.model.forward).parameters
        self._naflex = "spatial_shapes" in parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
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
        inputs = self._patches(pixels) if self._naflex else {"pixel_values": pixels}
        output = self.model(**inputs, output_hidden_states=True, return_dict=True, **self._options)
        states = getattr(output, "hidden_states", None)
        if states is None or len(states) != self.depth + 1 or states[-1].ndim != 3:
            found = "none" if states is None else f"{len(states)}, the last of shape {tuple(states[-1].shape)}"
            raise BrixelError(
                f"{type(self.model).__name__} gave as hidden states {found}; expected {self.depth + 1} of (B, N, D)"
            )
        return cast("Sequence[Tensor]", states)

    def _patches(self, pixels: Tensor) -> dict[str, Tensor]:
        """The inputs of a NaFlex model, such as SigLIP 2's: flattened patches, none of them padding, and their grid."""
        side = self.patch_px
        patches = rearrange(pixels, "B c (h y) (w x) -> B (h w) (y x c)", y=side, x=side)
        grid = torch.tensor([pixels.shape[2] // side, pixels.shape[3] // side], device=pixels.device)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
            "spatial_shapes": grid.expand(len(pixels), 2),
        }

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

    def __init__(self, model: Any, *, mean: MeanOrStd = None, std: MeanOrStd = None) -> None:
        super().__init__()
        name = type(model).__name__
        if getattr(model, "dynamic_img_size", None) is False:
            raise BrixelError(f"{name} takes images of one size; give dynamic_img_size=True to timm.create_model")
        self.model = model.eval()
        self.width = _setting(model, "embed_dim", name)
        self.depth = len(_setting(model, "blocks", name))
        self.patch_px = _square(_setting(_setting(model, "patch_embed", name), "patch_size", name), name)
        defaults = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = _normalisation(mean, std, (defaults.get("mean"), defaults.get("std")), name)

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks; see :meth:`Backbone.block_maps`."""
        _grid_hw(pixels, self.patch_px)
        ascending = sorted(set(blocks))
        maps = self.model.forward_intermediates(
            pixels, indices=ascending, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        by_block = dict(zip(ascending, maps, strict=True))
        return [by_block[index] for index in blocks]


class HubBackbone(nn.Module):
    """A ViT of Meta's code, as `torch.hub` gives it (DINOv2, DINOv3), through its ``get_intermediate_layers``.

    Args:
        model: The model. It must be able to ``reshape`` its outputs to maps.
        mean: Mean of red, green and blue, for pixels in [0, 1].
        std: Standard deviation of red, green and blue.

    Raises:
        BrixelError: The method lacks an argument, patches are not square, or ``mean`` or ``std`` is not given.
    """

    def __init__(self, model: Any, *, mean: MeanOrStd = None, std: MeanOrStd = None) -> None:
        super().__init__()
        name = type(model).__name__
        missing = {"n", "reshape", "norm"} - set(inspect.signature(model.get_intermediate_layers).parameters)
        if missing:
            raise BrixelError(
                f"get_intermediate_layers of {name} has no argument {', '.join(sorted(missing))}; of a DINOv2 or "
                "DINOv3, save the weights with torch.save(module.state_dict(), 'weights.pth') and give that file"
            )
        self.model = model.eval()
        self.width = _setting(model, "embed_dim", name)
        count = getattr(model, "n_blocks", None)  # the blocks themselves may be in chunks
        self.depth = count if isinstance(count, int) else len(_setting(model, "blocks", name))
        self.patch_px = _square(_setting(model, "patch_size", name), name)
        self.mean, self.std = _normalisation(mean, std, (None, None), name)

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps (B, D, h, w) after the given blocks; see :meth:`Backbone.block_maps`."""
        _grid_hw(pixels, self.patch_px)
        ascending = sorted(set(blocks))
        maps = self.model.get_intermediate_layers(pixels, n=ascending, reshape=True, norm=True)
        by_block = dict(zip(ascending, maps, strict=True))
        return [by_block[index] for index in blocks]


def as_backbone(module: nn.Module, *, mean: MeanOrStd = None, std: MeanOrStd = None) -> Backbone:
    """A module as a frozen backbone in evaluation mode: itself if it has ``block_maps``, else in a wrapper.

    What torch and trainers wrap around a module is taken off. ``mean``, ``std``: for a model of `transformers` or
    torch.hub, which does not know them, or in place of those that timm knows.
    Raises BrixelError for a module that lacks members of :class:`Backbone`.
    """
    module = unwrapped(module)
    modeling = sys.modules.get("transformers.modeling_utils")  # imported already if the module is from there
    if hasattr(module, "block_maps"):
        if mean is not None or std is not None:
            raise BrixelError(f"{type(module).__name__} has mean and std of its own; set them there")
    elif modeling is not None and isinstance(module, modeling.PreTrainedModel):
        module = TransformersBackbone(module, mean=mean, std=std)
    elif hasattr(module, "forward_intermediates"):
        module = TimmBackbone(module, mean=mean, std=std)
    elif hasattr(module, "get_intermediate_layers"):
        module = HubBackbone(module, mean=mean, std=std)
    check_members(module)
    return cast("Backbone", module.eval().requires_grad_(False))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile, DataParallel, averages of weights, and trainers.

    Raises BrixelError for one whose weights are in parts on several devices, as FSDP leaves them.
    """
    while not hasattr(type(module), "block_maps"):
        children = dict(module.named_children())
        inside = next((name for name in _INSIDE if list(children) == [name]), None)
        if inside is None or next(module.parameters(recurse=False), None) is not None:
            _check_whole(module)
            break
        module = children[inside]
    return module


def _check_whole(module: nn.Module) -> None:
    """Raise BrixelError for a module of which each process holds a part, by FSDP of either version."""
    flattened = any(hasattr(part, "_fsdp_wrapped_module") for part in module.modules())
    if flattened or any(type(weight).__name__ == "DTensor" for weight in module.parameters()):
        raise BrixelError(
            f"{type(module).__name__} is sharded by FSDP, which keeps its weights in parts: give the plain module, "
            "with the weights that torch.distributed.checkpoint.state_dict.get_model_state_dict gives with "
            "StateDictOptions(full_state_dict=True)"
        )


def config_of(backbone: Backbone) -> ViTConfig | ForeignConfig:
    """The configuration that is saved for a backbone: all fields of our own ViT, the sizes of any other."""
    if isinstance(backbone, ViT):
        return backbone.config
    inner = backbone.model if isinstance(backbone, TransformersBackbone | TimmBackbone | HubBackbone) else backbone
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


def _normalisation(mean: MeanOrStd, std: MeanOrStd, defaults: tuple[Any, Any], model: str) -> tuple[Colours, Colours]:
    """What the user gave, else what the model knows."""
    given = (defaults[0] if mean is None else mean, defaults[1] if std is None else std)
    if any(values is None for values in given):
        raise BrixelError(
            f"{model} does not say how its images are normalised; give mean=(...) and std=(...), for instance "
            "image_mean and image_std of its image processor"
        )
    return unit_normalisation(*given, owner="")


def _of_processor(processor: Any) -> tuple[Any, Any]:
    """Mean and deviation of an image processor, or of the one inside a processor; None where it knows none."""
    processor = getattr(processor, "image_processor", processor)
    stated = processor if isinstance(processor, Mapping) else getattr(processor, "__dict__", {})
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    values = {name: getattr(processor, name, None) for name in names} | dict(stated)
    known = of_processor({name: value for name, value in values.items() if value is not None}, "processor.")
    return known or (None, None)


def _grid_hw(pixels: Tensor, patch_px: int) -> tuple[int, int]:
    """The patch grid of pixels (B, 3, H, W); BrixelError if they are not whole patches."""
    if pixels.ndim != 4 or pixels.shape[2] % patch_px or pixels.shape[3] % patch_px:
        raise BrixelError(
            f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W), H and W multiples of the patch, "
            f"{patch_px} px: pad or resize the image, or let extract() do so"
        )
    return pixels.shape[2] // patch_px, pixels.shape[3] // patch_px
