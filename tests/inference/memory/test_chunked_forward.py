"""Pieces equal the whole: over patches, grids, batches, kinds of heads, and piece sizes that do not divide."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from brixel.backbones.registry import known_backbone
from brixel.backbones.vit import ViT
from brixel.feature_maps.host_copy import crop
from brixel.inference.memory.chunked_forward import dense_in_pieces
from brixel.inference.memory.row_chunks import resize_rows, row_ranges, source_rows
from brixel.inference.memory.strategies import Way, maps_of, new_results, run_way
from brixel.model.config import AdapterConfig
from brixel.model.student import Student
from brixel.model.upsampler import Upsampler

SMALL = {"depth": 4, "width": 64, "heads": 4}


def student(architecture, *, blend, detour):
    """A small one whose every weight matters, in both meanings."""
    torch.manual_seed(0)
    vit = dataclasses.replace(known_backbone(architecture).vit, **SMALL)
    config = AdapterConfig((0, 1, 2, 3), residual_detour=detour, short_side_px=64, blend=blend)
    upsampler = Upsampler(64, config)
    made = Student(ViT(vit), upsampler, config.blocks)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture(scope="module", params=["dinov3-vits16", "dinov2-vits14", "dinov3-vits16plus"])
def blended(request):
    return student(request.param, blend=True, detour=False)


@pytest.fixture(scope="module", params=["dinov3-vits16", "dinov2-vits14"])
def released(request):
    return student(request.param, blend=False, detour=True)


def whole_and_pieces(model, grid_hw, rows):
    height, width = (cells * model.backbone.patch_px for cells in grid_hw)
    pixels = torch.randn(1, 3, height, width)
    with torch.no_grad():
        whole = model(pixels)[0]
    pieces = torch.full(whole.shape, torch.nan)
    dense_in_pieces(model, pixels, pieces, rows)
    return whole, pieces


# one patch; fewer rows than a piece, a last piece of one, two and four rows, rows that divide, squares
GRIDS_AND_ROWS = [
    *(((1, 1), 1), ((2, 9), 5), ((5, 7), 1), ((5, 7), 3)),
    *(((8, 3), 4), ((13, 4), 3), ((13, 4), 9), ((16, 16), 5)),
]


@pytest.mark.parametrize(("grid_hw", "rows"), GRIDS_AND_ROWS)
def test_pieces_of_a_blended_model_equal_the_whole(blended, grid_hw, rows):
    whole, pieces = whole_and_pieces(blended, grid_hw, rows)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid_hw", "rows"), GRIDS_AND_ROWS)
def test_pieces_of_a_released_model_equal_the_whole(released, grid_hw, rows):
    whole, pieces = whole_and_pieces(released, grid_hw, rows)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_pieces_in_bfloat16_are_as_near_to_float32_as_the_whole_is():
    model = student("dinov3-vits16", blend=True, detour=False)
    pixels = torch.randn(1, 3, 96, 80)
    exact = maps_of(model, Way("whole"), pixels)[0]
    model = model.to(torch.bfloat16)
    rounded = [maps_of(model, way, pixels)[0].float() for way in (Way("whole"), Way("pieces", rows=2))]
    of_whole, of_pieces = ((each - exact).norm() / exact.norm() for each in rounded)
    assert 1e-3 < of_whole < 0.2
    assert of_pieces < 1.2 * of_whole


def test_every_way_of_a_batch_gives_its_maps(blended):
    pixels = torch.randn(3, 3, 4 * blended.backbone.patch_px, 5 * blended.backbone.patch_px)
    with torch.no_grad():
        whole = blended(pixels)
    for way in (
        Way("whole", batch=3),
        Way("whole", batch=2),
        Way("whole"),
        Way("pieces", rows=3),
        Way("tiles", side=8),
    ):
        maps = maps_of(blended, way, pixels)
        assert len(maps) == 3
        for ours, expected in zip(maps, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [Way("whole"), Way("pieces", rows=2), Way("tiles", side=8)])
def test_a_result_may_have_room_for_some_cells_alone(blended, way):
    pixels = torch.randn(1, 3, 5 * blended.backbone.patch_px, 6 * blended.backbone.patch_px)
    whole = new_results(blended, pixels)
    run_way(blended, way, pixels, whole)
    part = torch.full((64, 15, 21), torch.nan)
    run_way(blended, way, pixels, [part])
    torch.testing.assert_close(part, whole[0][:, :15, :21])


def test_pieces_leave_pixels_and_weights_alone(blended):
    pixels = torch.randn(1, 3, 4 * blended.backbone.patch_px, 4 * blended.backbone.patch_px)
    before, weights = pixels.clone(), {name: each.clone() for name, each in blended.state_dict().items()}
    maps_of(blended, Way("pieces", rows=1), pixels)
    assert torch.equal(pixels, before)
    assert all(torch.equal(each, weights[name]) for name, each in blended.state_dict().items())


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("new_hw", [(1, 3), (4, 8), (7, 5), (28, 12), (32, 9)])
def test_resized_rows_are_rows_of_the_resized_map(total, new_hw):
    maps = torch.randn(2, 3, total, 4)
    whole = F.interpolate(maps, size=new_hw, mode="bilinear", align_corners=False)
    for wanted in row_ranges(new_hw[0], 3):
        first, behind = source_rows(wanted, total, new_hw[0])
        assert 0 <= first < behind <= total
        part = resize_rows(maps[:, :, first:behind], first, total, wanted, new_hw, torch.float32)
        torch.testing.assert_close(part, whole[:, :, wanted[0] : wanted[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("total", "rows", "expected"), [(5, 2, [(0, 2), (2, 4), (4, 5)]), (2, 9, [(0, 2)])])
def test_row_ranges_cover_all_rows_once(total, rows, expected):
    assert row_ranges(total, rows) == expected


def test_a_sketch_has_the_first_and_the_last_ranges():
    assert row_ranges(11, 2, sketch=True) == [(0, 2), (2, 4), (8, 10), (10, 11)]
    assert row_ranges(8, 2, sketch=True) == row_ranges(8, 2)


@pytest.mark.parametrize("map_hw", [(4, 5), (3, 5), (4, 2), (1, 1)])
def test_a_map_is_cropped_to_a_contiguous_one(map_hw):
    features = torch.randn(6, 4, 5)
    expected = features[:, : map_hw[0], : map_hw[1]].clone()
    place = features.data_ptr()
    batch = torch.stack([features, features])[0]
    last = features.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in (batch, last, features):  # the last one is cut in place
        cropped = crop(given, map_hw)
        assert torch.equal(cropped, expected)
        assert cropped.is_contiguous()
    assert cropped.data_ptr() == place


@pytest.mark.gpu
def test_pieces_on_cuda_equal_the_whole():
    torch.backends.cuda.matmul.allow_tf32 = False
    model = student("dinov3-vits16", blend=True, detour=False).cuda()
    pixels = torch.randn(1, 3, 9 * 16, 7 * 16)
    with torch.no_grad():
        whole = model(pixels.cuda())[0].cpu()
    (pieces,) = maps_of(model, Way("pieces", rows=2), pixels)
    assert pieces.device.type == "cpu"
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)  # cuDNN may take another kernel for another size
