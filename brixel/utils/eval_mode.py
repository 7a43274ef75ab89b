"""Evaluation mode for as long as something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MODES = threading.Lock()  # of all models: a lock of its own would keep a model from being copied


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each part's own mode again after; nothing is touched where all are in it already."""
    with _MODES:  # another thread may be here, with the modes changed for a while
        training = [part for part in module.modules() if part.training]
        if training:
            module.eval()
            try:
                yield
            finally:
                for part in training:
                    part.training = True
    if not training:
        yield
