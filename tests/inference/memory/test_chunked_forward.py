"""Row chunks equal the whole: over patches, grids, kinds of heads, and numbers of rows that do not divide.

The blend, the fusion's moments, the tail of the head and the ViT's block are written twice; this holds both to the
same numbers.
"""

import pytest
import torch

from brixel.inference.memory.chunked_forward import Chunks, dense_map_in_chunks
from brixel.inference.memory.strategies import RowChunks, Whole


@pytest.fixture(scope="module", params=["dinov3-vits16", "dinov2-vits14", "dinov3-vits16plus"])
def blended(request, random_model):
    return random_model(request.param, blend=True, detour=False)


@pytest.fixture(scope="module", params=["dinov3-vits16", "dinov2-vits14"])
def released(request, random_model):
    return random_model(request.param, blend=False, detour=True)


def whole_and_chunks(model, grid_hw, rows):
    height, width = (cells * model.patch_px for cells in grid_hw)
    pixels = torch.randn(1, 3, height, width)
    with torch.no_grad():
        whole = model(pixels)[0]
    out = torch.full(whole.shape, torch.nan)
    dense_map_in_chunks(model, pixels, out, Chunks.split(model, grid_hw, rows))
    return whole, out


# one patch; fewer rows than a chunk, a last chunk of one, two and four rows, rows that divide, squares
GRIDS_AND_ROWS = [
    *(((1, 1), 1), ((2, 9), 5), ((5, 7), 1), ((5, 7), 3)),
    *(((8, 3), 4), ((13, 4), 3), ((13, 4), 9), ((16, 16), 5)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("grid_hw", "rows"), GRIDS_AND_ROWS)
def test_chunks_of_a_blended_model_equal_the_whole(blended, grid_hw, rows):
    whole, chunked = whole_and_chunks(blended, grid_hw, rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("grid_hw", "rows"), GRIDS_AND_ROWS)
def test_chunks_of_a_released_model_equal_the_whole(released, grid_hw, rows):
    whole, chunked = whole_and_chunks(released, grid_hw, rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid_hw", "rows"), [((1, 1), 1), ((5, 7), 3), ((8, 3), 2)])
def test_chunks_of_a_mixed_model_equal_the_whole(random_model, grid_hw, rows):
    model = random_model("dinov2-vits14", blend=True, detour=True, own_share=0.3)
    whole, chunked = whole_and_chunks(model, grid_hw, rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [2, 4, 5])
@pytest.mark.parametrize(("grid_hw", "rows"), [((1, 1), 1), ((5, 7), 3)])
@pytest.mark.parametrize("fields", [{"kind": "bilinear"}, {"kind": "universal"}, {"generation": 2, "grids": (2, 4)}])
def test_chunks_of_other_kinds_equal_the_whole_at_every_scale(random_model, fields, grid_hw, rows, scale):
    for blend in (False, True) if "grids" in fields else (False,):
        model = random_model("dinov2-vits14", blend=blend, **fields).at_scale(scale)
        whole, chunked = whole_and_chunks(model, grid_hw, rows)
        assert whole.shape == (64, scale * grid_hw[0], scale * grid_hw[1])
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_chunks_in_bfloat16_are_as_near_to_float32_as_the_whole_is(random_model):
    model = random_model("dinov3-vits16", blend=True, detour=False)
    pixels = torch.randn(1, 3, 96, 80)
    exact = Whole().run(model, pixels)[0]
    model = model.to(torch.bfloat16)
    rounded = [strategy.run(model, pixels)[0].float() for strategy in (Whole(), RowChunks(2))]
    error_of_whole, error_of_chunks = ((features - exact).norm() / exact.norm() for features in rounded)
    assert 1e-3 < error_of_whole < 0.2
    assert error_of_chunks < 1.2 * error_of_whole


def test_chunks_leave_pixels_and_weights_alone(blended):
    pixels = torch.randn(1, 3, 4 * blended.patch_px, 4 * blended.patch_px)
    before, weights = pixels.clone(), {name: tensor.clone() for name, tensor in blended.state_dict().items()}
    RowChunks(1).run(blended, pixels)
    assert torch.equal(pixels, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in blended.state_dict().items())


def test_few_chunks_are_the_first_one_in_the_middle_and_the_last(tiny):
    chunks = Chunks.split(tiny, (11, 3), 2)
    few = chunks.few()
    assert few.rows == [(0, 2), (6, 8), (10, 11)]
    assert few.tokens == [chunks.tokens[0], chunks.tokens[3], chunks.tokens[-1]]
    assert chunks.tokens[-1][1] == tiny.backbone.config.prefix + 33
    assert list(few.heads) == [0]
    six = Chunks.split(tiny, (6, 3), 2)
    assert six.few().rows == six.rows


@pytest.mark.gpu
def test_chunks_on_cuda_equal_the_whole(random_model):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model("dinov3-vits16", blend=True, detour=False).cuda()
    pixels = torch.randn(1, 3, 9 * 16, 7 * 16)
    with torch.no_grad():
        whole = model(pixels.cuda())[0].cpu()
    (chunked,) = RowChunks(2).run(model, pixels)
    assert chunked.device.type == "cpu"
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)  # cuDNN may take another kernel for another size
