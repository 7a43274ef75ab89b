"""How a ViT knows where a patch lies: rotary angles (DINOv3), interpolated learned positions (DINOv2, SigLIP).

Both work for any grid h x w >= 1 and are computed in float32 whatever the model's dtype.
Facts: `docs/backbones.md`. Shapes: N = prefix tokens + h*w patches, E = channels of one attention head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TURN = 2 * torch.pi  # an angle is a full turn for every period that a coordinate, from -1 to 1, goes through


def rotary_periods(head_width: int, theta: float, rounding: torch.dtype) -> Tensor:
    """The E/4 periods theta^(4k/E), rounded to ``rounding`` as some checkpoints store them, as float32."""
    exponents = torch.arange(head_width // 4, dtype=torch.float32) * (4 / head_width)
    return (theta**exponents).to(rounding).float()


def rotary_table(grid_hw: tuple[int, int], periods: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (N, E) such that ``x * cos + x.roll(E/2) * sin`` rotates the tokens ``x``.

    Channel d turns with d + E/2; the angles are [y, x] of the patch centre over each period. Prefix tokens
    (class, registers) get angle zero: they are left as they are.
    """
    height, width = grid_hw
    y = (torch.arange(height, device=periods.device) + 0.5) * (2 / height) - 1
    x = (torch.arange(width, device=periods.device) + 0.5) * (2 / width) - 1
    rows = (_TURN * y[:, None] / periods)[:, None].expand(height, width, -1)  # h w E/4
    columns = (_TURN * x[:, None] / periods)[None].expand(height, width, -1)  # h w E/4
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # h*w E/2
    angles = torch.cat([angles.new_zeros(prefix, angles.shape[1]), angles])  # N E/2
    sine = angles.sin()
    return angles.cos().repeat(1, 2), torch.cat([-sine, sine], dim=-1)  # N E


def rotate(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Turn the channel pairs (d, d + E/2) of ``x`` (..., E) by the angles of :func:`rotary_table`."""
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), signed_sine)


def interpolate_positions(
    positions: Tensor, grid_hw: tuple[int, int], *, antialias: bool, scale_offset: float, mode: str = "bicubic"
) -> Tensor:
    """Learned positions (1, D, h0, w0) on another grid, ``mode`` bicubic or bilinear: (1, D, h, w).

    ``scale_offset``: added to h and w before the scale is formed; 0.1 in the first DINOv2 release, whose sampling
    grid is therefore a little off. On the grid of the positions themselves nothing is changed.
    """
    if not scale_offset:
        return F.interpolate(positions, grid_hw, mode=mode, antialias=antialias, align_corners=False)
    assert (antialias, mode) == (False, "bicubic"), "no checkpoint was made with an offset and another rule"
    # torch's own takes the scale as a number, and a comparison of sizes is a branch: either fixes an exported graph
    native_hw = (positions.shape[2], positions.shape[3])
    counts = [torch.full((), cells, dtype=torch.float64) for cells in grid_hw]
    elsewhere = (counts[0] != native_hw[0]) | (counts[1] != native_hw[1])
    rows, columns = (
        _cubic_weights(cells, native, native / (count + elsewhere * scale_offset)).float().to(positions)
        for cells, count, native in zip(grid_hw, counts, native_hw, strict=True)
    )
    return rows @ positions @ columns.mT


def _cubic_weights(cells: int, native: int, step: Tensor) -> Tensor:
    """Weights (cells, native) of bicubic interpolation with a = -0.75 along one axis, the edge repeated.

    ``step``: native cells from one new cell to the next.
    """
    source = (torch.arange(cells, dtype=torch.float64) + 0.5) * step - 0.5
    taps = source.floor()[:, None] + torch.arange(-1, 3)  # cells 4
    x = (source[:, None] - taps).abs()
    near = (1.25 * x - 2.25) * x * x + 1
    far = ((-0.75 * x + 3.75) * x - 6) * x + 3
    weights = torch.zeros(cells, native, dtype=torch.float64)
    return weights.scatter_add(1, taps.long().clamp(0, native - 1), torch.where(x <= 1, near, far))
