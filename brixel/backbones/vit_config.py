"""What distinguishes one ViT from another, checked field by field."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from brixel.errors import BrixelError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _one_of(*choices: str) -> tuple[tuple[type, ...], Callable[[Any], bool], str]:
    return (str,), lambda value: value in choices, f"one of {', '.join(choices)}"


_COUNT = ((int,), lambda value: value >= 1, "a whole number from 1 up")
_NUMBER = ((int, float), lambda value: 0 <= value < math.inf, "a number from 0 up")
_SWITCH = ((bool,), lambda value: True, "True or False")
# what each field may be: its types, a test, and the words for both
_RULES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    **dict.fromkeys(("width", "depth", "heads", "patch_px", "ffn_width", "native_grid"), _COUNT),
    "registers": ((int,), lambda value: value >= 0, "a whole number from 0 up"),
    **dict.fromkeys(("norm_eps", "rope_theta", "position_scale_offset"), _NUMBER),
    **dict.fromkeys(("qkv_bias", "position_antialias"), _SWITCH),
    "ffn": _one_of("mlp", "swiglu"),
    "positions": _one_of("rotary", "learned"),
    "rope_rounding": _one_of("float32", "bfloat16"),
}


@dataclass(frozen=True)
class ViTConfig:
    """Everything that distinguishes one ViT from another; plain JSON values only.

    ``native_grid`` and the two ``position_*`` fields matter for learned positions, the two ``rope_*`` for rotary ones.
    ``mean`` and ``std`` are those of the pictures the weights were trained on, for RGB in [0, 1].
    """

    width: int
    depth: int
    heads: int
    patch_px: int
    ffn: Literal["mlp", "swiglu"]
    ffn_width: int
    positions: Literal["rotary", "learned"]
    norm_eps: float
    registers: int = 0
    qkv_bias: bool = True
    rope_theta: float = 100.0
    rope_rounding: Literal["float32", "bfloat16"] = "float32"
    native_grid: int = 37
    position_antialias: bool = False
    position_scale_offset: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        for name, (kind, allowed, expected) in _RULES.items():
            value = getattr(self, name)
            if type(value) not in kind or not allowed(value):
                raise BrixelError(f"ViTConfig.{name} is {value!r}; expected {expected}")
        if self.position_antialias and self.position_scale_offset:
            raise BrixelError("ViTConfig: position_antialias goes with position_scale_offset=0 alone")
        multiple = 4 if self.positions == "rotary" else 1
        if self.width % (self.heads * multiple):
            raise BrixelError(
                f"ViTConfig: width {self.width} does not divide into {self.heads} heads"
                + (" of a multiple of four channels, as rotary positions need" if multiple > 1 else "")
            )


def _three_numbers(name: str, values: Iterable[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise BrixelError(f"ViTConfig.{name} is {values!r}; expected three numbers, for red, green and blue in [0, 1]")
    return numbers
