import numpy as np
import pytest
from PIL import Image

from brixel import PcaBasis
from brixel.feature_maps.panel import LABEL_PX, MARGIN_PX
from brixel.inference.comparison_panel import comparison_panel


@pytest.fixture(scope="module")
def model(patch14):
    """28 px on the short side where nothing else is said."""
    return patch14


def enlarge(colours, times):
    """(H, W, 3) with every cell as a square of ``times`` x ``times`` pixels."""
    return colours.repeat(times, axis=0).repeat(times, axis=1)


def test_a_row_shows_image_backbone_and_dense_map_in_one_basis(model, image_path):
    """28 px on the short side: 8 x 12 cells, 48 px each; the backbone's map is upsampled to as many."""
    panel = np.asarray(comparison_panel(model, [image_path]))
    height, width = 8 * 48, 12 * 48
    assert panel.shape == (height + LABEL_PX + 2 * MARGIN_PX, 3 * (width + MARGIN_PX) + MARGIN_PX, 3)

    top = MARGIN_PX + LABEL_PX
    tiles = [panel[top : top + height, MARGIN_PX + i * (width + MARGIN_PX) :][:, :width] for i in range(3)]
    dense, bilinear = model.extract(image_path), model.extract_backbone(image_path).resize((8, 12))
    basis = PcaBasis.fit([bilinear.features, dense.features])
    np.testing.assert_array_equal(tiles[2], enlarge(dense.pca(basis), 48))
    np.testing.assert_array_equal(tiles[1], enlarge(bilinear.pca(basis), 48))
    expected = Image.open(image_path).resize((width, height), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(tiles[0], np.asarray(expected))


def test_the_teacher_is_shown_in_the_same_basis(model, image_path):
    panel = np.asarray(comparison_panel(model, [image_path], teacher=True))
    height, width = 8 * 48, 12 * 48
    assert panel.shape == (height + LABEL_PX + 2 * MARGIN_PX, 4 * (width + MARGIN_PX) + MARGIN_PX, 3)
    dense, bilinear = model.extract(image_path), model.extract_backbone(image_path).resize((8, 12))
    teacher = model.extract_backbone(image_path, short_side_px=4 * 28)
    basis = PcaBasis.fit([bilinear.features, dense.features, teacher.features])
    tile = panel[MARGIN_PX + LABEL_PX :, MARGIN_PX + 3 * (width + MARGIN_PX) :][:height, :width]
    np.testing.assert_array_equal(tile, enlarge(teacher.pca(basis), 48))


def test_tiles_end_where_the_image_ends(model):
    """30 x 60 at its own size: the cells reach 1.5 px beyond its lower edge and 3 px beyond the right one; cut off."""
    panel = comparison_panel(model, [np.zeros((30, 60, 3), np.uint8)], short_side_px="native")
    zoom = round(384 / 9)
    width, height = (round(side / 3.5 * zoom) for side in (60, 30))
    assert panel.size == (3 * (width + MARGIN_PX) + MARGIN_PX, height + LABEL_PX + 2 * MARGIN_PX)


def test_long_thin_images_stay_within_bounds_and_labels_are_whole(model):
    wide = comparison_panel(model, [np.zeros((20, 800, 3), np.uint8)])
    assert wide.width < 3 * 4 * 384 * 1.3
    tall = comparison_panel(model, [np.zeros((400, 30, 3), np.uint8)], short_side_px="native")
    assert tall.width > 3 * 90


def test_several_images_are_rows_of_one_panel(model, image_path):
    one = comparison_panel(model, [image_path])
    two = comparison_panel(model, [image_path, np.zeros((30, 30), np.float32)])
    assert two.height > one.height
    np.testing.assert_array_equal(np.asarray(two)[: one.height - MARGIN_PX, : one.width], np.asarray(one)[:-MARGIN_PX])
