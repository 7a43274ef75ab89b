import numpy as np
import pytest
from PIL import Image

from brixel import BrixelFeatures, PcaBasis
from brixel.feature_maps.panel import LABEL_PX, MARGIN_PX, enlarge
from brixel.inference.comparison_panel import show


@pytest.fixture(scope="module")
def model(backbone_folder):
    return BrixelFeatures.from_backbone(backbone_folder, device="cpu", short_side_px=28)


def test_enlarged_cells_are_whole_squares():
    colours = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    large = enlarge(colours, 7)
    assert large.shape == (21, 35, 3)
    for row in range(21):
        for column in range(35):
            assert (large[row, column] == colours[row // 7, column // 7]).all()


def test_a_row_shows_picture_backbone_and_dense_map_in_one_basis(model, picture):
    """28 px on the short side: 8 x 12 cells, 48 px each; the backbone's are four times as large."""
    panel = np.asarray(show(model, [picture]))
    height, width = 8 * 48, 12 * 48
    assert panel.shape == (height + LABEL_PX + 2 * MARGIN_PX, 3 * (width + MARGIN_PX) + MARGIN_PX, 3)

    top = MARGIN_PX + LABEL_PX
    tiles = [panel[top : top + height, MARGIN_PX + i * (width + MARGIN_PX) :][:, :width] for i in range(3)]
    dense, coarse = model.extract(picture), model.extract_backbone(picture)
    basis = PcaBasis.fit([coarse.features, dense.features])
    np.testing.assert_array_equal(tiles[2], enlarge(dense.pca(basis), 48))
    np.testing.assert_array_equal(tiles[1], enlarge(coarse.pca(basis), 4 * 48)[:height, :width])
    expected = Image.open(picture).resize((width, height), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(tiles[0], np.asarray(expected))


def test_the_teacher_stands_beside_them_in_the_same_basis(model, picture):
    panel = np.asarray(show(model, [picture], teacher=True))
    height, width = 8 * 48, 12 * 48
    assert panel.shape == (height + LABEL_PX + 2 * MARGIN_PX, 4 * (width + MARGIN_PX) + MARGIN_PX, 3)
    dense, coarse = model.extract(picture), model.extract_backbone(picture)
    teacher = model.extract_backbone(picture, short_side_px=4 * 28)
    basis = PcaBasis.fit([coarse.features, dense.features, teacher.features])
    tile = panel[MARGIN_PX + LABEL_PX :, MARGIN_PX + 3 * (width + MARGIN_PX) :][:height, :width]
    np.testing.assert_array_equal(tile, enlarge(teacher.pca(basis), 48))


def test_tiles_end_where_the_picture_ends(model):
    """30 x 60 at its own size: the cells reach 1.5 px beyond its lower edge and 3 px beyond the right one; cut off."""
    panel = show(model, [np.zeros((30, 60, 3), np.uint8)], short_side_px="native")
    zoom = round(384 / 9)
    width, height = (round(side / 3.5 * zoom) for side in (60, 30))
    assert panel.size == (3 * (width + MARGIN_PX) + MARGIN_PX, height + LABEL_PX + 2 * MARGIN_PX)


def test_long_thin_pictures_stay_within_bounds_and_labels_are_whole(model):
    wide = show(model, [np.zeros((20, 800, 3), np.uint8)])
    assert wide.width < 3 * 4 * 384 * 1.3
    tall = show(model, [np.zeros((400, 30, 3), np.uint8)], short_side_px="native")
    assert tall.width > 3 * 90


def test_rows_of_several_pictures_stand_below_each_other(model, picture):
    one = show(model, [picture])
    two = show(model, [picture, np.zeros((30, 30), np.float32)])
    assert two.height > one.height
    np.testing.assert_array_equal(np.asarray(two)[: one.height - MARGIN_PX, : one.width], np.asarray(one)[:-MARGIN_PX])
