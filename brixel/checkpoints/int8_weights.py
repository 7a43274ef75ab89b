"""Weights of linear layers as 8-bit integers with a scale per output channel: a quarter of float32, half of float16.

In a file, the integers have the weight's name, and the scales, float32, that name and `_scale`.
"""

import torch
from torch import Tensor, nn

from brixel.checkpoints.key_mapping import State

_SCALE = "_scale"
LARGEST = 127
"""Of the integers: the largest weight of a channel is so many steps, and every weight is off by half a step at most."""
EXPANDED_DTYPE = torch.float16
"""What integers become when they are read; its rounding is far below theirs, and it takes half of float32's memory."""


def quantised_state(module: nn.Module) -> State:
    """The state of a module, with the weights of its linear layers as integers and scales."""
    state: State = dict(module.state_dict())
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            key = f"{name}.weight"
            state[key], state[key + _SCALE] = _quantised(state[key])
    return state


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 (out, in) and float32 (out,)."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return (wide / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def expanded(state: State) -> State:
    """A state that was read, with integers and their scales as one tensor again; others as they are."""
    integers = {
        key for key, tensor in state.items() if key + _SCALE in state and (tensor.dtype == torch.int8 or tensor.is_meta)
    }
    scales = {key + _SCALE for key in integers}
    return {
        key: _expanded(tensor, state[key + _SCALE]) if key in integers and not tensor.is_meta else tensor
        for key, tensor in state.items()
        if key not in scales
    }


def _expanded(integers: Tensor, scale: Tensor) -> Tensor:
    """int8 (out, in) and (out,) -> (out, in)."""
    return (integers.float() * scale.float()[:, None]).to(EXPANDED_DTYPE)
