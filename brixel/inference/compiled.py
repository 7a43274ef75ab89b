"""Calling a model through `torch.compile`, and as it is where that fails."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from brixel.errors import BrixelError, one_line
from brixel.model.student import Student
from brixel.utils.out_of_memory import is_out_of_memory

_LOG = logging.getLogger("brixel")


class CompiledCall:
    """A compiled call of a model; after a failure of the compiler, the model as it is.

    The compiler sees pixels as patches, (B, 3, h, p, w, p). So its free sizes are the numbers of patches, of which all
    other sizes are multiples; from sizes in pixels it derives quotients that it cannot simplify. Says what the first
    call costs, and once that the compiler failed.

    Args:
        student: The model.
        options: Arguments of ``torch.compile``.
    """

    def __init__(self, student: Student, options: Mapping[str, Any]) -> None:
        eager: Callable[..., Any] = student._call_impl

        def forward(patches: Tensor) -> Any:
            return eager(patches.flatten(4, 5).flatten(2, 3))

        rearrange(torch.zeros(1), "a -> a")  # einops' first tensor changes its state, for which all is compiled anew
        self._eager = eager
        self._patch_px = student.patch_px
        self._compiled: Callable[[Tensor], Any] | None = torch.compile(forward, **options)
        self._is_first = True

    @property
    def has_failed(self) -> bool:
        """Whether the compiler failed."""
        return self._compiled is None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call the model."""
        patches = self._patches(*inputs) if len(inputs) == 1 and not named else None
        if self._compiled is None or patches is None:
            return self._eager(*inputs, **named)
        if self._is_first:
            _LOG.warning("compiling the model with torch.compile, which takes a minute or more")
        start_s = time.perf_counter()
        try:
            result = self._compiled(patches)
        except Exception as error:  # compilers raise many classes
            if isinstance(error, BrixelError) or is_out_of_memory(error):
                raise
            result = self._eager(*inputs)
            self._compiled = None
            text = one_line(str(error))[:300]
            _LOG.warning("torch.compile failed, and the model runs as it is (%s: %s)", type(error).__name__, text)
            return result
        if self._is_first:
            seconds = time.perf_counter() - start_s
            _LOG.warning("compiled in %.0f s; the first batch of several images is compiled as well", seconds)
            self._is_first = False
        return result

    def _patches(self, pixels: Any) -> Tensor | None:
        """Pixels as patches, a view; None for what is no image of whole patches, which the model itself refuses."""
        side = self._patch_px
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3:
            return None
        height, width = pixels.shape[2:]
        if height % side or width % side or not pixels.numel():
            return None
        patches = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        torch._dynamo.mark_static(patches, [1, 3, 5])
        for axis in (2, 4):
            if patches.shape[axis] > 1:
                torch._dynamo.mark_dynamic(patches, axis)
        return patches
