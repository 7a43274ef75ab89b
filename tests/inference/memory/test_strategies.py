import pytest
import torch

from brixel.inference.memory.strategies import RowChunks, Tiles, Whole, new_outputs


@pytest.fixture(scope="module", params=["dinov3-vits16", "dinov2-vits14", "dinov3-vits16plus"])
def model(request, random_model):
    return random_model(request.param, blend=True, detour=False)


@pytest.mark.slow
def test_every_strategy_gives_the_maps_of_a_batch(model):
    pixels = torch.randn(3, 3, 4 * model.patch_px, 5 * model.patch_px)
    with torch.no_grad():
        whole = model(pixels)
    for strategy in (Whole(3), Whole(2), Whole(), RowChunks(3), Tiles(8)):
        maps = strategy.run(model, pixels)
        assert len(maps) == 3
        for dense, expected in zip(maps, whole, strict=True):
            torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [Whole(), RowChunks(2), Tiles(8)])
def test_an_output_may_cover_some_cells_alone(model, strategy):
    pixels = torch.randn(1, 3, 5 * model.patch_px, 6 * model.patch_px)
    whole, part = new_outputs(model, pixels), torch.full((64, 15, 21), torch.nan)
    assert strategy.run(model, pixels, whole) is whole
    strategy.run(model, pixels, [part])
    torch.testing.assert_close(part, whole[0][:, :15, :21])


def test_smaller_strategies_end_with_the_smallest_tile():
    strategy, tried = Whole(5), []
    while strategy is not None:
        tried.append(strategy)
        strategy = strategy.smaller((20, 40), tiles=True)
    chunks, tiles = [RowChunks(rows) for rows in (10, 5, 2, 1)], [Tiles(side) for side in (32, 16, 8)]
    assert tried == [Whole(5), Whole(2), Whole(1), *chunks, *tiles]
    assert RowChunks(1).smaller((20, 40), tiles=False) is None
    assert RowChunks(1).smaller((8, 8), tiles=True) is None  # no tile is smaller than the image


@pytest.mark.parametrize(
    ("strategy", "pixels", "text", "fields"),
    [
        (Whole(2), 2 * 140 * 280, "whole", {"micro_batch": 2}),
        (RowChunks(3), 42 * 280, "exact chunks of 3 rows", {"chunk_rows": 3}),
        (
            Tiles(8),
            112**2,
            "6 of 112x112 px, overlapping by 28 px or more",
            {"tiles": 6, "tile_px": (112, 112), "overlap_px": 28},
        ),
    ],
)
def test_strategies_describe_themselves(strategy, pixels, text, fields):
    """On a grid of 10 x 20 patches of 14 px."""
    assert strategy.pixels_at_once((10, 20), 14) == pixels
    assert strategy.describe((10, 20), 14) == text
    assert strategy.plan_fields((10, 20), 14) == fields
    assert strategy.exact == (strategy.name != "tiles")
