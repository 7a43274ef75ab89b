"""Evaluation mode for a block of code."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MODES = threading.Lock()  # one for all models: a model with a lock of its own could not be copied


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and restore the modes of all submodules; a no-op if all are in it already."""
    with _MODES:  # another thread may have changed the modes for a while
        training = [submodule for submodule in module.modules() if submodule.training]
        if training:
            module.eval()
            try:
                yield
            finally:
                for submodule in training:
                    submodule.training = True
    if not training:
        yield
