"""Tensors that hold plain numbers, and others."""

import torch
from torch import Tensor


def not_plain(tensor: Tensor) -> str | None:
    """What keeps a tensor from being an ordinary block of numbers, with what to do; None where nothing does."""
    if tensor.is_meta:
        return "is on the meta device, without data; give one that holds values"
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}; give tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantized; give tensor.dequantize()"
    if tensor.is_nested:
        return "is nested; give one of its tensors"
    return None
