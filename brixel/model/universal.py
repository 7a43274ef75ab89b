"""The universal upsampler: one small network that upsamples the features of any backbone, guided by the image.

Every output cell is a weighted sum of the 5 x 5 low-resolution cells around it and of the image's mean feature, whose
weights sum to 1. The weights start as those of bilinear interpolation. They depend on the image, on how alike
neighbouring features are (their cosines, so rotating the feature space changes nothing and any width will do) and on
the output cell's place in its low-resolution cell (continuous, so any output size will do). No weight belongs to a
backbone.

Shapes: B batch, D width, h x w low-resolution grid, H x W output grid, K = 25 cells of a window, C and C' channels;
S = Sy*Sx slots: the output cells of one low-resolution cell.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WINDOW = 5
CELLS = WINDOW * WINDOW
GUIDE_PX = 4
"""Pixels of the guide per output cell, on each axis."""
STEM_CHANNELS, CHANNELS, LOW_CHANNELS, ATTENTION_CHANNELS = 24, 48, 96, 24
BLOCKS, LOW_BLOCKS, KERNEL = 2, 4, 5
_FLOOR = 0.001  # added to bilinear weights before the logarithm: a cell that bilinear leaves out can gain weight
_BASIS = 5  # functions of the place in a cell, see `_place_basis`
_PAIRS = CELLS * (CELLS - 1) // 2
_ALIKE = _PAIRS + 2  # numbers per cell that say how alike the features around it are, see `likeness`


class Slots(NamedTuple):
    """Where the output cells of every low-resolution cell are, on one axis.

    ``outputs`` (h, S): the output cell in each slot, the last one of a cell repeated; ``slot_of`` (H,): the slot of
    each output cell, numbered through all cells; ``offset`` (H,): its place from the centre of its cell, in
    cells, from -0.5 to 0.5.
    """

    outputs: Tensor
    slot_of: Tensor
    offset: Tensor


def first_output(cell: int, cells: int, outputs: int) -> int:
    """The first of ``outputs`` output cells whose centre is in ``cell``, of ``cells``."""
    if cell == cells:  # so that an export with dynamic sizes need not find this out
        return outputs
    return 0 if cell == 0 else (2 * outputs * cell + cells - 1) // (2 * cells)


def _slots(cells: int, outputs: int, rows: tuple[int, int], device: torch.device) -> Slots:
    """The slots of the cells ``rows``, out of ``cells``; output cells are counted from the first one of these."""
    start, stop = (first_output(cell, cells, outputs) for cell in rows)
    per_cell = -(-outputs // cells)
    bounds = (2 * outputs * torch.arange(rows[0], rows[1] + 1, device=device) + cells - 1) // (2 * cells)
    first, last = bounds[:-1], bounds[1:] - 1
    grouped = torch.minimum(first[:, None] + torch.arange(per_cell, device=device), last[:, None]) - start
    output = torch.arange(start, stop, device=device)
    own = (2 * output + 1) * cells // (2 * outputs)
    offset = ((2 * output + 1) * cells - (2 * own + 1) * outputs).float() / (2 * outputs)
    return Slots(grouped, (own - rows[0]) * per_cell + output - first[own - rows[0]], offset)


class OutputGrid:
    """An output grid H x W over a low-resolution grid h x w, or its part over some rows of cells.

    Args:
        grid_hw: h and w.
        size_hw: H and W, not smaller.
        device: Where its indices are.
        rows: The low-resolution rows of the part; all where None.
    """

    def __init__(
        self,
        grid_hw: tuple[int, int],
        size_hw: tuple[int, int],
        device: torch.device,
        rows: tuple[int, int] | None = None,
    ) -> None:
        self.grid_hw, self.size_hw = grid_hw, size_hw
        self.rows = (0, grid_hw[0]) if rows is None else rows
        self.output_rows = tuple(first_output(row, grid_hw[0], size_hw[0]) for row in self.rows)
        self.down = _slots(grid_hw[0], size_hw[0], self.rows, device)
        self.across = _slots(grid_hw[1], size_hw[1], (0, grid_hw[1]), device)

    def to_slots(self, maps: Tensor) -> Tensor:
        """Group output cells by low-resolution cell: (B, H, W, C) -> (B, h, w, S, C)."""
        (h, sy), (w, sx) = self.down.outputs.shape, self.across.outputs.shape
        if (h * sy, w * sx) != maps.shape[1:3]:
            maps = maps[:, self.down.outputs.flatten()][:, :, self.across.outputs.flatten()]
        return rearrange(maps, "B (h Sy) (w Sx) C -> B h w (Sy Sx) C", h=h, w=w)

    def from_slots(self, grouped: Tensor) -> Tensor:
        """The inverse of :meth:`to_slots`."""
        (h, sy), (w, sx) = self.down.outputs.shape, self.across.outputs.shape
        maps = rearrange(grouped, "B h w (Sy Sx) C -> B (h Sy) (w Sx) C", Sy=sy, Sx=sx)
        if (h * sy, w * sx) != (self.down.slot_of.shape[0], self.across.slot_of.shape[0]):
            maps = maps[:, self.down.slot_of][:, :, self.across.slot_of]
        return maps

    def bilinear_weights(self) -> Tensor:
        """The weights of bilinear interpolation, and 0 for the mean: (H, W, 26)."""
        line = torch.arange(WINDOW, device=self.down.offset.device) - WINDOW // 2
        y, x = ((1 - (axis.offset[:, None] - line).abs()).clamp_min(0) for axis in (self.down, self.across))
        return F.pad((y[:, None, :, None] * x[:, None, :]).flatten(2), (0, 1))

    def window_index(self) -> Tensor:
        """Row-major numbers of the 5 x 5 cells around every cell, the edge repeated: (h, w, 25)."""
        height, width = self.grid_hw
        device = self.down.offset.device
        line = torch.arange(WINDOW, device=device) - WINDOW // 2
        rows = (torch.arange(*self.rows, device=device)[:, None] + line).clamp(0, height - 1)  # h 5
        columns = (torch.arange(width, device=device)[:, None] + line).clamp(0, width - 1)  # w 5
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2)


def cell_table(features: Tensor) -> Tensor:
    """The mean of the features, and the features of all cells less it, row by row: (B, D, h, w) -> (B, 1 + h*w, D)."""
    table = features.permute(0, 2, 3, 1).flatten(1, 2)
    mean = table.mean(1, keepdim=True)
    return torch.cat([mean, table - mean], 1)


def window_cells(table: Tensor, grid: OutputGrid) -> Tensor:
    """The windows of a grid's rows, and the mean, from :func:`cell_table`: (B, 1 + h*w, D) -> (B, rows, w, 26, D)."""
    index = F.pad(grid.window_index() + 1, (0, 1))
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


def weighted_sums(cells: Tensor, weights: Tensor, grid: OutputGrid) -> Tensor:
    """Sum cells (B, h, w, 26, D) with weights (B, h, w, S, 26): (B, D, H, W), channels last in memory."""
    return grid.from_slots(weights.to(cells.dtype) @ cells).permute(0, 3, 1, 2)


def mean_length(table: Tensor) -> Tensor:
    """Root mean square of the cells' distances to their mean, from :func:`cell_table`: (B, 1, 1, 1), float32."""
    return table[:, 1:].float().square().sum(-1).mean(1).sqrt()[:, None, None, None]


def inner_products(cells: Tensor) -> Tensor:
    """Inner products of the cells of every window: (B, h, w, 26, D) -> (B, h, w, 26, 26), float32."""
    return (cells @ cells.mT).float()


def likeness(gram: Tensor, typical: Tensor) -> Tensor:
    """How alike the features of a window are, from :func:`inner_products`: (B, h, w, 302), float32.

    The cosines of all pairs of the 25 cells, less the mean feature; the logarithm of the own cell's length, over
    ``typical`` (B, 1, 1, 1) from :func:`mean_length`; and the cosine of the own cell's feature as it is to the mean.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt()
    cosines = gram / (length[..., None] * length[..., None, :])
    first, second = torch.triu_indices(CELLS, CELLS, 1, device=gram.device)
    pairs = cosines.flatten(-2).index_select(-1, first * (CELLS + 1) + second)
    own, own_length, mean_length = gram[..., CELLS // 2, None, :], length[..., CELLS // 2, None], length[..., -1:]
    with_mean = own[..., 0, -1:] + mean_length.square()
    square = own_length.square() + 2 * own[..., 0, -1:] + mean_length.square()
    to_mean = with_mean / (square.clamp_min(1e-12).sqrt() * mean_length)
    return torch.cat([pairs, (own_length / typical.clamp_min(1e-6)).log().clamp(-3, 3), to_mean], -1)


class ConvBlock(nn.Module):
    """A residual block as in ConvNeXt (arXiv 2201.03545): a depthwise convolution, then a feed-forward per cell."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        mixed = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(self.up(self.norm(mixed))))


class UniversalUpsampler(nn.Module):
    """Upsamples features (B, D, h, w) of any width to any larger grid, guided by the image.

    A fresh one is exactly bilinear interpolation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, 2, padding=1), nn.GELU(), nn.Conv2d(STEM_CHANNELS, CHANNELS, 3, 2, padding=1)
        )
        self.stem_norm = nn.LayerNorm(CHANNELS)
        self.place = nn.Linear(_BASIS, 2 * CHANNELS)
        self.alike = nn.Linear(_ALIKE, LOW_CHANNELS)
        self.pool = nn.Linear(CHANNELS, LOW_CHANNELS)
        self.low = nn.Sequential(*(ConvBlock(LOW_CHANNELS) for _ in range(LOW_BLOCKS)), nn.LayerNorm(LOW_CHANNELS))
        self.unpool = nn.Linear(LOW_CHANNELS, CHANNELS)
        self.trunk = nn.Sequential(*(ConvBlock(CHANNELS) for _ in range(BLOCKS)), nn.LayerNorm(CHANNELS))
        self.query = nn.Linear(CHANNELS, ATTENTION_CHANNELS)
        self.key = nn.Linear(CHANNELS, ATTENTION_CHANNELS)
        self.low_key = nn.Linear(LOW_CHANNELS, ATTENTION_CHANNELS)
        self.attention = nn.Parameter(torch.zeros(()))
        self.similarity = nn.Parameter(torch.zeros(()))
        self.change = nn.Linear(CHANNELS, 2 * (CELLS + 1))  # of the logits, and the signed part
        for layer in (self.change, self.unpool):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.place.weight, -0.05, 0.05)
        nn.init.zeros_(self.place.bias)

    def forward(self, features: Tensor, guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Upsample features.

        Args:
            features: (B, D, h, w).
            guide: (B, 3, any, any), RGB in [0, 1].
            size_hw: H and W, at least h and w.

        Returns:
            (B, D, H, W), channels last in memory.
        """
        return self.upsample(features, features, guide, size_hw)

    def upsample(self, features: Tensor, similar: Tensor, guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Upsample features (B, D, h, w) with the weights that suit ``similar`` (B, any, h, w); else as forward."""
        grid = OutputGrid((features.shape[2], features.shape[3]), size_hw, features.device)
        table = cell_table(similar)
        cells = window_cells(table, grid)
        weights = self.weights(inner_products(cells), mean_length(table), guide, grid)
        if similar is not features:
            cells = window_cells(cell_table(features), grid)
        return weighted_sums(cells, weights, grid)

    def weights(self, gram: Tensor, typical: Tensor, guide: Tensor, grid: OutputGrid) -> Tensor:
        """The weights of the cells of a window in every output cell: (B, h, w, S, 26), float32.

        ``gram``: their :func:`inner_products`. The mean feature, which is subtracted from all other cells, has the
        weight 1.
        """
        stem = self.stem_map(resize_guide(guide, grid.size_hw))
        low = self.low(self.alike_map(gram, typical) + self.pooled(stem, grid))
        unpooled = self.unpool(low).permute(0, 3, 1, 2)
        unpooled = F.interpolate(unpooled, size=grid.size_hw, mode="bilinear", align_corners=False)
        x = self.trunk(stem + self.place_map(grid) + unpooled.permute(0, 2, 3, 1))
        return self.weights_of(x, self.keys(x, low, grid), gram, grid)

    def stem_map(self, guide: Tensor) -> Tensor:
        """What is seen of the image, from :func:`resize_guide`: (B, 3, 4H, 4W) -> (B, H, W, C).

        Without the norm the image would be faint beside the rest at the start, and training much slower.
        """
        first, activation, second = self.stem
        seen: Tensor = self.stem_norm(_halved(second, activation(_halved(first, guide))).permute(0, 2, 3, 1))
        return seen

    def alike_map(self, gram: Tensor, typical: Tensor) -> Tensor:
        """What the network reads of :func:`likeness`: (B, h, w, C')."""
        return self.alike(likeness(gram, typical).to(self.alike.weight.dtype))

    def keys(self, x: Tensor, low: Tensor, grid: OutputGrid) -> Tensor:
        """Keys of low-resolution cells from the trunk's output (B, H, W, C) and ``low`` (B, h, w, C'): (B, h*w, c).

        torch.compile cannot index a sum of flattened maps (pytorch/pytorch#187337), so they are flat before.
        """
        return self.key(grid.to_slots(x).mean(3).flatten(1, 2)) + self.low_key(low.flatten(1, 2))

    def pooled(self, stem: Tensor, grid: OutputGrid) -> Tensor:
        """The mean of the stem (B, H, W, C) over the output cells of every low-resolution cell: (B, h, w, C')."""
        return self.pool(grid.to_slots(stem).mean(3))

    def place_map(self, grid: OutputGrid, start: int = 0, stop: int | None = None) -> Tensor:
        """Encode the places of the output rows ``start`` to ``stop`` in their low-resolution cells: (rows, W, C)."""
        offsets = (grid.down.offset[start:stop], grid.across.offset)
        scales = [outputs / cells for outputs, cells in zip(grid.size_hw, grid.grid_hw, strict=True)]
        basis = [_place_basis(offset, scale) for offset, scale in zip(offsets, scales, strict=True)]
        (y, y2), (x, x2) = (self.place(values.to(self.place.weight.dtype)).chunk(2, -1) for values in basis)
        return y[:, None] + x + y2[:, None] * x2

    def weights_of(self, x: Tensor, keys: Tensor, gram: Tensor, grid: OutputGrid) -> Tensor:
        """The weights, from the trunk's output (B, H, W, C), all keys (B, h*w, c) and inner products.

        ``x`` and ``gram`` are those of the grid's rows. Returns (B, h, w, S, 26).
        """
        bilinear = grid.to_slots(grid.bilinear_weights()[None])
        x = grid.to_slots(x)
        logits, signed = self.change(x).float().split(CELLS + 1, -1)
        attention = 10 * self.attention * self._attention(x, keys, grid)
        similarity = 10 * self.similarity * _similarity(bilinear, gram)
        logits = logits + F.pad(attention + similarity, (0, 1))
        start = (bilinear + _FLOOR).log()
        moved = (start + logits).softmax(-1) - start.softmax(-1)
        weights = bilinear + moved + signed - signed.mean(-1, keepdim=True)
        return torch.cat([weights[..., :-1], torch.ones_like(weights[..., -1:])], -1)

    def _attention(self, x: Tensor, keys: Tensor, grid: OutputGrid) -> Tensor:
        """Inner products of queries in output cells with keys of their windows' cells: (B, h, w, S, C) to 25 each."""
        index = grid.window_index()
        keys = keys.index_select(1, index.flatten()).unflatten(1, index.shape)  # B h w 25 c
        return (self.query(x) @ keys.mT).float()


def _similarity(bilinear: Tensor, gram: Tensor) -> Tensor:
    """Cosines of the interpolated feature in output cells, less the mean, to the 25 cells: (B, h, w, S, 25)."""
    between = bilinear[..., :-1]  # 1 h w S 25
    products = gram[..., :-1, :-1]
    dot = between @ products  # B h w S 25
    square = (dot * between).sum(-1, keepdim=True)
    length = products.diagonal(dim1=-2, dim2=-1)[..., None, :]
    return dot * (square * length).clamp_min(1e-12).rsqrt()


def _halved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of stride 2 on even sides, padded on all of them: (B, C, 2H, 2W) -> (B, C', H, W).

    Its last row and column of padding are never read. Compilers get it without them: they can halve 2H, and cannot
    simplify (2H - 1) // 2 + 1.
    """
    if torch.compiler.is_compiling():
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), conv.weight, conv.bias, conv.stride)
    halved: Tensor = conv(x)
    return halved


def resize_guide(guide: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """The guide in [-2, 2] with 4 x 4 pixels per output cell: (B, 3, any, any) -> (B, 3, 4H, 4W)."""
    wanted = (GUIDE_PX * size_hw[0], GUIDE_PX * size_hw[1])
    if (guide.shape[2], guide.shape[3]) != wanted:
        guide = F.interpolate(guide, size=wanted, mode="bilinear", align_corners=False)
    return (4 * guide - 2).contiguous(memory_format=torch.channels_last)


def _place_basis(offset: Tensor, scale: float) -> Tensor:
    """Functions of the place in a cell, and the scale: (H,) -> (H, 5)."""
    waves = [wave(k * torch.pi * offset) for k in (1, 2) for wave in (torch.sin, torch.cos)]
    return torch.stack([*waves, torch.full_like(offset, scale).log2()], 1)
