"""Tiles: every cell covered, all equal, weights that sum to one; and what a blend of maps must keep."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.images.find_images import SCENE
from brixel.inference.memory.strategies import Tiles
from brixel.inference.memory.tiling import blend_weights, plan_tiling


@pytest.mark.parametrize(
    ("grid_hw", "side", "overlap", "tops", "lefts"),
    [
        ((8, 8), 8, 2, (0,), (0,)),
        ((5, 30), 8, 2, (0,), (0, 5, 11, 16, 22)),
        ((9, 14), 8, 2, (0, 1), (0, 6)),
        ((16, 16), 8, 0, (0, 8), (0, 8)),
        ((1, 1), 8, 7, (0,), (0,)),
    ],
)
def test_tiles_of_a_grid(grid_hw, side, overlap, tops, lefts):
    tiling = plan_tiling(grid_hw, side, overlap)
    assert (tiling.tops, tiling.lefts) == (tops, lefts)
    assert tiling.tile_hw == (min(side, grid_hw[0]), min(side, grid_hw[1]))
    assert list(tiling.tiles()) == list(itertools.product(tops, lefts))
    assert tiling.count == len(tops) * len(lefts)


def test_tiles_cover_every_cell_overlap_enough_and_weights_sum_to_one():
    rng = random.Random(0)
    for _ in range(300):
        side = rng.randint(1, 20)
        overlap, cells, upscale = rng.randint(0, side - 1), rng.randint(1, 120), rng.choice([1, 4])
        tiling = plan_tiling((cells, 3), side, overlap)
        tile, starts = tiling.tile_hw[0], tiling.tops
        assert starts[0] == 0
        assert starts[-1] + tile == cells
        assert all(0 < after - before <= tile - overlap for before, after in itertools.pairwise(starts))
        weights = blend_weights(starts, tile, cells, upscale)
        assert weights.shape == (len(starts), tile * upscale)
        assert weights.min() > 0
        sums = torch.zeros(cells * upscale)
        for start, weight in zip(starts, weights, strict=True):
            sums[start * upscale : (start + tile) * upscale] += weight
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize(("side", "overlap"), [(4, 4), (4, -1), (0, 0)])
def test_an_overlap_that_leaves_no_step_is_refused(side, overlap):
    with pytest.raises(BrixelError, match="cannot overlap"):
        plan_tiling((9, 9), side, overlap)


class Pointwise(torch.nn.Module):
    """In the place of a student: a cell knows its own patch alone, so that tiles change nothing."""

    patch_px, embed_dim, scale = 4, 3, 4
    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixels):
        return torch.sin(3 * pixels)  # patches of 4 px, four cells to each: a cell is a pixel


@pytest.mark.parametrize("image_hw", [(60, 60), (32, 100), (132, 40)])
def test_what_does_not_look_beyond_a_cell_is_the_same_in_tiles(image_hw):
    pixels = torch.randn(2, 3, *image_hw)
    tiled = Tiles(8).run(Pointwise(), pixels)
    torch.testing.assert_close(torch.stack(tiled), torch.sin(3 * pixels))


def test_one_tile_is_the_whole(tiny):
    pixels = torch.randn(1, 3, 64, 128)
    (tiled,) = Tiles(8).run(tiny, pixels)
    with torch.no_grad():
        torch.testing.assert_close(tiled, tiny(pixels)[0], rtol=1e-5, atol=1e-5)


def test_a_constant_image_gives_a_blend_of_one_tile_s_map(tiny):
    """All tiles are alike, so that the map repeats with them where their distance is the same."""
    side, step = 8 * tiny.patch_px, 6 * tiny.patch_px
    pixels = torch.full((1, 3, side + 2 * step, side), 0.3)
    (tiled,) = Tiles(8).run(tiny, pixels)
    with torch.no_grad():
        tile = tiny(pixels[:, :, :side])[0]
    torch.testing.assert_close(tiled[:, :24], tile[:, :24], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled[:, 24:32], tiled[:, 48:56], rtol=1e-5, atol=1e-5)


def jumps(features):
    """Mean distance of neighbouring rows, one for each border between rows: (H - 1,)."""
    return (features[:, 1:] - features[:, :-1]).norm(dim=0).mean(dim=-1)


@pytest.mark.slow
def test_nothing_jumps_where_a_tile_ends():
    """On the drawn scene the step from row to row is no larger at the edges of tiles than inside them."""
    model = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    scene = np.asarray(Image.open(SCENE).resize((512, 512)))
    pixels = (torch.from_numpy(scene.copy()).permute(2, 0, 1)[None] / 255 - 0.45) / 0.23
    tiles = Tiles(16)
    (tiled,) = tiles.run(model, pixels)
    tiling = tiles.tiling((512 // model.patch_px, 512 // model.patch_px))
    for features, starts in ((tiled, tiling.tops), (tiled.mT, tiling.lefts)):
        steps = jumps(features)
        borders = {4 * start - 1 for start in starts[1:]} | {4 * (start + 16) - 1 for start in starts[:-1]}
        inside = [float(step) for index, step in enumerate(steps) if index not in borders]
        assert borders
        assert max(float(steps[index]) for index in borders) <= max(inside)
