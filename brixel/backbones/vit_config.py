"""What distinguishes one ViT from another, checked field by field."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from brixel.errors import BrixelError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


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
    **dict.fromkeys(("class_token", "layer_scale", "qkv_bias", "position_antialias"), _SWITCH),
    "ffn": _one_of("mlp", "swiglu"),
    "gelu": _one_of("exact", "tanh"),
    "positions": _one_of("rotary", "learned"),
    "position_mode": _one_of("bicubic", "bilinear"),
    "rope_rounding": _one_of("float32", "bfloat16"),
}


@dataclass(frozen=True)
class ViTConfig:
    """Everything that distinguishes one ViT from another; plain JSON values only.

    ``gelu`` is the MLP's: exact, or the approximation by tanh. ``native_grid`` and the three ``position_*`` fields
    matter for learned positions, the two ``rope_*`` for rotary ones.
    ``mean`` and ``std`` are those of the images the weights were trained on, for RGB in [0, 1].
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
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    class_token: bool = True
    layer_scale: bool = True
    gelu: Literal["exact", "tanh"] = "exact"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers("ViTConfig", name, getattr(self, name)))
        for name in _RULES:
            _check_field("ViTConfig", name, getattr(self, name))
        if self.position_scale_offset and (self.position_antialias or self.position_mode != "bicubic"):
            raise BrixelError(
                "ViTConfig: position_scale_offset goes with position_mode='bicubic' and position_antialias=False alone"
            )
        multiple = 4 if self.positions == "rotary" else 1
        if self.width % (self.heads * multiple):
            raise BrixelError(
                f"ViTConfig: width {self.width} does not divide into {self.heads} heads"
                + (" of a multiple of four channels, as rotary positions need" if multiple > 1 else "")
            )

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return self.class_token + self.registers


@dataclass(frozen=True)
class ForeignConfig:
    """What is known of a backbone that came as a module: its class and sizes; the rest is in its code."""

    class_name: str
    width: int
    depth: int
    patch_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("width", "depth", "patch_px"):
            _check_field(self.class_name, name, getattr(self, name))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(self.class_name, name, getattr(self, name)))


def _check_field(owner: str, name: str, value: object) -> None:
    kind, allowed, expected = _RULES[name]
    if type(value) not in kind or not allowed(value):
        raise BrixelError(f"{owner}.{name} is {value!r}; expected {expected}")


def siglip_config(
    *,
    width: int,
    depth: int,
    heads: int,
    patch_px: int,
    ffn_width: int,
    native_grid: int,
    naflex: bool,
    norm_eps: float = 1e-6,
) -> ViTConfig:
    """A vision tower of SigLIP or SigLIP 2, of one resolution or (``naflex``) of any."""
    return ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        patch_px=patch_px,
        ffn="mlp",
        ffn_width=ffn_width,
        positions="learned",
        norm_eps=norm_eps,
        native_grid=native_grid,
        position_antialias=naflex,
        position_mode="bilinear" if naflex else "bicubic",
        class_token=False,
        layer_scale=False,
        gelu="tanh",
        mean=SIGLIP_MEAN,
        std=SIGLIP_STD,
    )


def _three_numbers(owner: str, name: str, values: Iterable[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        raise BrixelError(f"{owner}.{name} is {values!r}; expected three numbers, for red, green and blue in [0, 1]")
    return numbers
