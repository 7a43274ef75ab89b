"""What distinguishes one ViT from another, checked field by field."""

from dataclasses import dataclass
from typing import Any, Literal

from brixel.backbones.normalisation import unit_normalisation
from brixel.errors import BrixelError
from brixel.utils.fields import Rule, boolean, check_fields, number, one_of, several, text, whole_number

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

# Bounds far above any model, so that a file with absurd sizes is refused before anything of its size is built.
_WIDEST, _DEEPEST, _LARGEST_PATCH, _LARGEST_GRID = 2**17, 2**10, 2**10, 2**12
_grid_side = whole_number(1, _LARGEST_GRID)


def _grid(value: Any) -> int | tuple[int, ...]:
    """The side of a square grid, or (rows, columns) of another."""
    if not isinstance(value, list | tuple):
        return int(_grid_side.convert(value))
    rows, columns = several(_grid_side, "", count=2).convert(value)
    return int(rows) if rows == columns else (rows, columns)


_SIZES = {
    **{"width": whole_number(1, _WIDEST), "depth": whole_number(1, _DEEPEST)},
    "patch_px": whole_number(1, _LARGEST_PATCH),
}
_RULES = {
    **_SIZES,
    **{"heads": whole_number(1, _WIDEST), "ffn_width": whole_number(1, 8 * _WIDEST)},
    "native_grid": Rule(f"{_grid_side.expected}, or two: (rows, columns)", _grid),
    "registers": whole_number(0, _LARGEST_GRID),
    **{
        "norm_eps": number(0, below=0.1),
        "rope_theta": number(above=0, below=1e9),
        "position_scale_offset": number(0, 2),
    },
    **dict.fromkeys(("class_token", "layer_scale", "qkv_bias", "position_antialias"), boolean()),
    "ffn": one_of("mlp", "swiglu"),
    "gelu": one_of("exact", "tanh"),
    "positions": one_of("rotary", "learned"),
    "position_mode": one_of("bicubic", "bilinear"),
    "rope_rounding": one_of("float32", "bfloat16"),
}


@dataclass(frozen=True)
class ViTConfig:
    """Everything that distinguishes one ViT from another; plain JSON values only.

    Args:
        width: Channels of a token, D.
        depth: Number of blocks.
        heads: Attention heads; ``width`` is a multiple of them, and with rotary positions of four times as many.
        patch_px: Side of a patch in pixels.
        ffn: Kind of the feed-forward layers: "mlp", or "swiglu", which is gated.
        ffn_width: Hidden channels of the feed-forward layers.
        positions: "rotary", or "learned": a table of embeddings that is interpolated to the grid.
        norm_eps: Epsilon of the layer norms.
        registers: Number of register tokens.
        qkv_bias: Whether queries, keys and values have biases.
        rope_theta: Base of the rotary periods.
        rope_rounding: Precision that the rotary periods were rounded to, "float32" or "bfloat16".
        native_grid: Patches on a side of the square grid that learned positions were trained on, or (rows, columns) of
            another grid.
        position_antialias: Whether learned positions are interpolated with antialiasing.
        position_scale_offset: Patches that are added to the grid before the scale of the interpolation is computed,
            0.1 in Meta's DINOv2; only with bicubic interpolation without antialiasing.
        position_mode: Interpolation of learned positions, "bicubic" or "bilinear".
        class_token: Whether there is a class token.
        layer_scale: Whether the output of attention and feed-forward layers is scaled per channel.
        gelu: Activation of the MLP: "exact", or its approximation by "tanh".
        mean: Mean of the images that the weights were trained on, per channel, for RGB in [0, 1]; one number stands
            for three.
        std: Standard deviation of these images, likewise.

    Raises:
        BrixelError: A field has another type or value than these, or two of them do not go together.
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
    native_grid: int | tuple[int, int] = 37
    position_antialias: bool = False
    position_scale_offset: float = 0.0
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    class_token: bool = True
    layer_scale: bool = True
    gelu: Literal["exact", "tanh"] = "exact"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_fields(self, _RULES, prefix="ViTConfig.")
        _check_colours(self, "ViTConfig.")
        if self.position_scale_offset and (self.position_antialias or self.position_mode != "bicubic"):
            raise BrixelError(
                "ViTConfig: position_scale_offset goes with position_mode='bicubic' and position_antialias=False only"
            )
        multiple = 4 if self.positions == "rotary" else 1
        if self.width % (self.heads * multiple):
            raise BrixelError(
                f"ViTConfig: width {self.width} does not divide into {self.heads} heads"
                + (" of a multiple of four channels, as rotary positions need" if multiple > 1 else "")
            )

    @property
    def native_hw(self) -> tuple[int, int]:
        """Rows and columns of the grid that learned positions were trained on."""
        return (self.native_grid, self.native_grid) if isinstance(self.native_grid, int) else self.native_grid

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return self.class_token + self.registers


@dataclass(frozen=True)
class ForeignConfig:
    """What is known of a backbone that was given as a module: its class and sizes. The rest is in its code."""

    class_name: str
    width: int
    depth: int
    patch_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        check_fields(self, {"class_name": text(), **_SIZES}, prefix=f"{self.class_name}.")
        _check_colours(self, f"{self.class_name}.")


def _check_colours(config: ViTConfig | ForeignConfig, owner: str) -> None:
    """Check and convert ``mean`` and ``std`` in place."""
    mean, std = unit_normalisation(config.mean, config.std, owner)
    object.__setattr__(config, "mean", mean)
    object.__setattr__(config, "std", std)


def siglip_config(*, naflex: bool, norm_eps: float = 1e-6, **sizes: Any) -> ViTConfig:
    """The configuration of a vision tower of SigLIP or SigLIP 2, for one resolution or, with ``naflex``, for any.

    ``sizes``: width, depth, heads, ffn, ffn_width, patch_px and native_grid.
    """
    return ViTConfig(
        **sizes,
        positions="learned",
        norm_eps=norm_eps,
        position_antialias=naflex,
        position_mode="bilinear" if naflex else "bicubic",
        class_token=False,
        layer_scale=False,
        gelu="tanh",
        mean=SIGLIP_MEAN,
        std=SIGLIP_STD,
    )
