"""Position embeddings of a ViT: rotary angles (DINOv3), interpolated learned positions (DINOv2, SigLIP).

Both work for any grid h x w >= 1 and are computed in float32 whatever the model's dtype.
Facts: `docs/backbones.md`. Shapes: N = prefix tokens + h*w patches, E = channels of one attention head.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

_TURN = 2 * torch.pi  # a coordinate, from -1 to 1, turns the channels once per period


def rotary_periods(head_width: int, theta: float, rounding: torch.dtype) -> Tensor:
    """The E/4 periods theta^(4k/E) as float32, rounded to ``rounding`` first, as some checkpoints store them."""
    exponents = torch.arange(head_width // 4, dtype=torch.float32, device="cpu") * (4 / head_width)
    return (theta**exponents).to(rounding).float()


def rotary_table(grid_hw: tuple[int, int], periods: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (N, E): ``x * cos + x.roll(E/2) * sin`` rotates the tokens ``x``.

    Channels d and d + E/2 are a pair; their angles are [y, x] of the patch centre over each period. ``prefix`` tokens
    (class, registers) get angle zero, which leaves them unchanged.
    """
    height, width = grid_hw
    y, x = (
        (torch.arange(cells, dtype=torch.float32, device=periods.device) + 0.5) * (2 / cells) - 1
        for cells in (height, width)
    )
    y_angles = repeat(_TURN * y[:, None] / periods, "h k -> h w k", w=width)
    x_angles = repeat(_TURN * x[:, None] / periods, "w k -> h w k", h=height)
    angles = rearrange(torch.cat([y_angles, x_angles], dim=-1), "h w k -> (h w) k")  # h*w E/2
    angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])  # N E/2
    sine = angles.sin()
    return angles.cos().repeat(1, 2), torch.cat([-sine, sine], dim=-1)  # N E


def rotate(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Turn the channel pairs (d, d + E/2) of ``x`` (..., E) by the angles of :func:`rotary_table`."""
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), signed_sine)


def interpolate_positions(
    positions: Tensor, grid_hw: tuple[int, int], *, antialias: bool, scale_offset: float, mode: str = "bicubic"
) -> Tensor:
    """Interpolate learned positions (1, D, h0, w0) to another grid: (1, D, h, w); the same values on their own grid.

    ``mode`` is "bicubic" or "bilinear". ``scale_offset`` is added to h and w before the scale is formed: 0.1 in the
    first DINOv2 release, else 0. The rules are those of ``torch.nn.functional.interpolate``, as a matrix per axis: its
    scale is a number and its antialiasing an attribute, which fix the sizes of exported graphs or are ignored there.
    """
    native_hw = (positions.shape[2], positions.shape[3])
    counts = [torch.full((), cells, dtype=torch.float64, device="cpu") for cells in grid_hw]
    resized = (counts[0] != native_hw[0]) | (counts[1] != native_hw[1])  # a branch would fix an exported graph
    rows, columns = (
        _weights(cells, native, native / (count + resized * scale_offset), mode, antialias).to(positions)
        for cells, count, native in zip(grid_hw, counts, native_hw, strict=True)
    )
    return rows @ positions @ columns.mT


def _weights(cells: int, native: int, step: Tensor, mode: str, antialias: bool) -> Tensor:
    """Weights (cells, native) of interpolation along one axis, with the edge repeated.

    ``step`` is the distance between new cells, in native cells. Antialiasing widens the kernel to it where it is above
    1, and leaves out what lies beyond the edge.
    """
    source = (torch.arange(cells, dtype=torch.float64, device="cpu") + 0.5) * step - 0.5
    if antialias:
        distances = (source[:, None] - torch.arange(native, device="cpu")).abs() / step.clamp_min(1)
        kernel = _cubic(distances, -0.5) if mode == "bicubic" else (1 - distances).clamp_min(0)
        return kernel / kernel.sum(1, keepdim=True)
    taps = source.floor()[:, None] + torch.arange(-1, 3, device="cpu")  # cells 4
    distances = (source[:, None] - taps).abs()
    kernel = _cubic(distances, -0.75) if mode == "bicubic" else (1 - distances).clamp_min(0)
    weights = torch.zeros(cells, native, dtype=torch.float64, device="cpu")
    return weights.scatter_add(1, taps.long().clamp(0, native - 1), kernel)


def _cubic(distances: Tensor, a: float) -> Tensor:
    """The kernel of bicubic interpolation (Keys 1981); torch's parameter a is -0.75, and -0.5 with antialiasing."""
    near = ((a + 2) * distances - (a + 3)) * distances * distances + 1
    far = ((a * distances - 5 * a) * distances + 8 * a) * distances - 4 * a
    return torch.where(distances <= 1, near, torch.where(distances < 2, far, 0.0))
