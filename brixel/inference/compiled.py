"""Calling a model through `torch.compile`, and as it is where that fails."""

import logging
import time
from collections.abc import Callable
from typing import Any

from brixel.errors import BrixelError, one_line
from brixel.utils.out_of_memory import is_out_of_memory

_LOG = logging.getLogger("brixel")


class CompiledCall:
    """A compiled call of a model; after a failure of the compiler, the model as it is.

    Says what the first call costs, and once that the compiler failed.

    Args:
        compiled: The call through `torch.compile`.
        eager: The same call without it.
    """

    def __init__(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self._compiled: Callable[..., Any] | None = compiled
        self._eager = eager
        self._is_first = True

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the model."""
        if self._compiled is None:
            return self._eager(*inputs, **named)
        if self._is_first:
            _LOG.warning("compiling the model with torch.compile, which takes a minute or more")
        start_s = time.perf_counter()
        try:
            result = self._compiled(*inputs, **named)
        except Exception as error:  # compilers raise many classes
            if isinstance(error, BrixelError) or is_out_of_memory(error):
                raise
            result = self._eager(*inputs, **named)  # raises where the input is wrong
            self._compiled = None
            _LOG.warning(
                "torch.compile failed, and the model runs as it is (%s: %s)",
                type(error).__name__,
                one_line(str(error))[:300],
            )
            return result
        if self._is_first:
            seconds = time.perf_counter() - start_s
            _LOG.warning("compiled in %.0f s; the first batch of several images is compiled as well", seconds)
            self._is_first = False
        return result
