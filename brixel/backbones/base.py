"""The protocol of a backbone, and the check of one that a user gives.

`docs/add-a-backbone.md` shows how to write one. Shapes: B batch, D width, h x w patch grid.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.utils.out_of_memory import is_out_of_memory

_MEMBERS = ("width", "patch_px", "depth", "mean", "std", "block_maps")


class Backbone(Protocol):
    """A frozen vision transformer, as :class:`brixel.model.student.Student` uses it.

    Any ``nn.Module`` with these members is one; it need not inherit from this class. ``isinstance`` cannot check it,
    since it does not see a module's buffers and parameters.
    """

    @property
    def width(self) -> int:
        """Channels of a map, D; a multiple of 32."""

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels."""

    @property
    def depth(self) -> int:
        """Number of blocks."""

    @property
    def mean(self) -> Sequence[float]:
        """Mean of red, green and blue, for pixels in [0, 1]; subtracted from them."""

    @property
    def std(self) -> Sequence[float]:
        """Standard deviation of red, green and blue; the pixels less the mean are divided by it."""

    def block_maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Compute the patch tokens after the given blocks, each through the final norm if there is one, as maps.

        Args:
            pixels: (B, 3, H, W), normalised, H and W any multiples of ``patch_px``.
            blocks: Indices of blocks, from 0, in any order.

        Returns:
            One map (B, D, h, w) per entry of ``blocks``, in that order.
        """

    # of every torch module
    def eval(self) -> Any: ...  # noqa: D102
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...  # noqa: D102
    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


def check_members(module: nn.Module) -> None:
    """Raise BrixelError, which names all that is missing, where a module lacks members of :class:`Backbone`."""
    missing = [name for name in _MEMBERS if not hasattr(module, name)]
    if missing:
        raise BrixelError(
            f"{type(module).__name__} has no {', '.join(missing)}; expected a module with {', '.join(_MEMBERS)}, a "
            "model of transformers with hidden states, or one of timm with forward_intermediates"
        )


def weights_of(module: nn.Module) -> list[Tensor]:
    """The floating-point parameters and buffers, in the order of the state dict."""
    return [tensor.detach() for tensor in module.state_dict().values() if tensor.is_floating_point()]


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's first weight; the CPU and float32 if it has none."""
    weights = weights_of(module)
    return (weights[0].device, weights[0].dtype) if weights else (torch.device("cpu"), torch.float32)


def check_maps(backbone: Backbone, blocks: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    """Raise BrixelError unless an image of one patch by two gives a map (1, D, 1, 2) for each of ``blocks``."""
    name, patch_px = type(backbone).__name__, backbone.patch_px
    pixels = torch.zeros(1, 3, patch_px, 2 * patch_px, device=device, dtype=dtype)
    call = f"{name}.block_maps of pixels {tuple(pixels.shape)} and blocks {list(blocks)}"
    try:
        with torch.no_grad():
            maps = backbone.block_maps(pixels, blocks)
    except Exception as error:  # the user's module may raise anything
        if is_out_of_memory(error):
            raise
        raise BrixelError(f"{call} raised {type(error).__name__}: {error}") from error
    shape = (1, backbone.width, 1, 2)
    expected = f"expected a list of {len(blocks)} tensors {shape}: one a block, (B, width, H / patch_px, W / patch_px)"
    if not isinstance(maps, list | tuple) or not all(isinstance(block_map, Tensor) for block_map in maps):
        raise BrixelError(f"{call} gave a {type(maps).__name__}; {expected}")
    shapes = [tuple(block_map.shape) for block_map in maps]
    if shapes != [shape] * len(blocks):
        raise BrixelError(f"{call} gave shapes {shapes}; {expected}")
