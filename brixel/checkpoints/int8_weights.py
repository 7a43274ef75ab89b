"""Weights of linear layers as 8-bit integers with a scale per output channel: a quarter of float32, half of float16.

In a file, the integers have the weight's name, and the scales, float32, that name and `_scale`.
"""

import torch
from torch import Tensor, nn

from brixel.checkpoints.key_mapping import State

_SCALE = "_scale"
_LARGEST = 127
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
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    return (wide / scale[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def expanded(state: State) -> State:
    """A state that was read, with integers and their scales as one tensor again; others as they are."""
    scales = {key for key in state if key.endswith(_SCALE) and key.removesuffix(_SCALE) in state}
    result: State = {}
    for key, tensor in state.items():
        scale = state.get(key + _SCALE)
        if key in scales and _is_integer(state[key.removesuffix(_SCALE)]):
            continue
        if scale is None or tensor.dtype != torch.int8:
            result[key] = tensor
        else:
            result[key] = (tensor.float() * scale.float()[:, None]).to(EXPANDED_DTYPE)
    return result


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype == torch.int8 or tensor.is_meta
