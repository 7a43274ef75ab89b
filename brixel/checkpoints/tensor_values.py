"""What the tensors of a weight file must be: dense and finite floating-point numbers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from brixel.errors import CheckpointError
from brixel.utils.devices import dtype_name

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_values(state: Mapping[str, Tensor], what: str, unfilled: Sequence[str] = ()) -> None:
    """Raise CheckpointError, which names all of them, where tensors are no dense and finite floating-point numbers.

    ``what`` opens the error, such as the name of the file. ``unfilled``: endings of names that may be NaN.
    """
    faults = {
        name: fault for name, tensor in state.items() if (fault := _fault(tensor, name.endswith(tuple(unfilled))))
    }
    if faults:
        shown = ", ".join(f"{name} ({fault})" for name, fault in list(faults.items())[:4])
        more = ", ..." if len(faults) > 4 else ""
        raise CheckpointError(
            f"{what}: {len(faults)} of {len(state)} tensors cannot be weights: {shown}{more}; expected dense tensors "
            "of finite floating-point numbers"
        )


def _fault(tensor: Tensor, unfilled: bool) -> str | None:
    """What is wrong with a tensor, in words; None where nothing is."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return f"quantised, {dtype_name(tensor.dtype)}"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        return "without numbers, on the meta device"
    if tensor.dtype not in _DTYPES:
        return dtype_name(tensor.dtype)
    if not unfilled and tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
        return "NaN or infinite"  # NaN is the extreme of any tensor that holds one
    return None
