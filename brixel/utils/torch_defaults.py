"""PyTorch's defaults that a surrounding program may have changed: device, dtype, autocast."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CPU = torch.device("cpu")


@contextmanager
def plain_defaults(*, dtype: bool = False) -> Iterator[None]:
    """Run a block, or a function as decorator, with autocast off and the CPU as default device.

    Args:
        dtype: Whether also the default dtype is float32 meanwhile. It is one for all threads, so this is for whole jobs
            such as a training, and not for functions that run beside other code.
    """
    with ExitStack() as stack:
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        for kind in ("cpu", "cuda", "mps"):
            if torch.amp.autocast_mode.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        before = torch.get_default_dtype()
        if dtype and before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield
