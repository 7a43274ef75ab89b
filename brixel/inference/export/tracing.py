"""Tracing a model with `torch.export`: one program for any number of images and any size, or for one size."""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from brixel.errors import BrixelError, one_line
from brixel.inference.memory.allocation_tracker import copy_with
from brixel.model.student import Student
from brixel.utils.out_of_memory import is_out_of_memory

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
_TRACED = (2, 6, 7)  # images and patches; sizes that differ, and are none that torch treats apart
_SMALLEST = 2  # patches on a side of a dynamic program: torch treats sizes of 1 apart


@dataclass(frozen=True)
class InputSize:
    """A size of the input: ``batch`` images of ``height_px`` x ``width_px`` pixels, multiples of the patch."""

    batch: int
    height_px: int
    width_px: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of such an input."""
        return (self.batch, 3, self.height_px, self.width_px)


def traced_size(patch_px: int) -> InputSize:
    """The size at which dynamic programs are traced."""
    batch, rows, columns = _TRACED
    return InputSize(batch, rows * patch_px, columns * patch_px)


def plain_copy(model: Student, dtype: torch.dtype) -> Student:
    """The model in evaluation mode on the CPU, in a dtype; the model as it is stays as it is."""
    return copy_with(model, lambda weight: weight.to("cpu", dtype if weight.is_floating_point() else None)).eval()


def trace(student: Student, size: InputSize, *, dynamic: bool) -> ExportedProgram:
    """The program of a model on the CPU.

    Args:
        student: The model.
        size: The only input size of a program that is not dynamic, else one of those that it will take.
        dynamic: Whether batch, height and width are free, from two patches a side.

    Raises:
        BrixelError: torch.export cannot trace the model.
    """
    pixels = torch.zeros(size.shape, dtype=student.dtype)
    shapes: Any = None
    if dynamic:
        sides = {axis: student.patch_px * Dim(name, min=_SMALLEST) for axis, name in ((2, HEIGHT), (3, WIDTH))}
        shapes = ({0: Dim(BATCH, min=1), **sides},)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(student, (pixels,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # a backbone's own code may raise anything
        if is_out_of_memory(error):
            raise
        kind = type(student.backbone).__name__
        advice = "; with dynamic=False, at one size, it may" if dynamic else ""
        raise BrixelError(
            f"torch.export cannot trace this model, with a backbone of class {kind}{advice} "
            f"({type(error).__name__}: {one_line(str(error))[:300]})"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that torch has for its own code, and without searches for garbage, a tenth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collects:
            gc.enable()


def example(size: InputSize, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Pixels of that size as a model takes them: normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size.shape, generator=generator).to(dtype)
