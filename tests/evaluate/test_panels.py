import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.cli.app import main
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.panels import panel_of
from brixel.feature_maps.panel import HEIGHT_PX, LABEL_PX, MARGIN_PX


def halves(pixels):
    """Two cells on each axis: the left ones like each other, the right ones against them."""
    return (
        torch.tensor([[1.0, -1.0], [1.0, -1.0]]).expand(len(pixels), 3, 2, 2) * torch.tensor([1.0, 2, 3])[:, None, None]
    )


def tile(panel, row, column):
    top = MARGIN_PX + LABEL_PX + row * (HEIGHT_PX + LABEL_PX + MARGIN_PX)
    left = MARGIN_PX + column * (HEIGHT_PX + MARGIN_PX)
    return np.asarray(panel)[top : top + HEIGHT_PX, left : left + HEIGHT_PX]


def test_likeness_to_a_point_is_that_of_the_source(image_path):
    sources = [FeatureSource("mine", halves, patch_px=8), FeatureSource("same", halves, patch_px=8)]
    panel = panel_of(sources, [image_path], 32, (4.0, 20.0))
    assert panel.height == 2 * (HEIGHT_PX + LABEL_PX + MARGIN_PX) + MARGIN_PX
    for column in (1, 2):
        likeness = tile(panel, 1, column)
        assert (likeness[:, : HEIGHT_PX // 2] == 0).all()
        assert (likeness[:, HEIGHT_PX // 2 :] == 255).all()
        colours = tile(panel, 0, column)
        assert (colours[0, 0] != colours[0, -1]).any()
        assert (colours[0, 0] == colours[-1, 0]).all()


def test_a_point_outside_or_no_image(image_path):
    source = FeatureSource("mine", halves, patch_px=8)
    with pytest.raises(BrixelError, match=r"the point is \(4, 32\); expected row and column from 0 to below 32"):
        panel_of([source], [image_path], 32, (4, 32))
    with pytest.raises(BrixelError, match="no images to show"):
        panel_of([source], [], 32)


@pytest.mark.slow
def test_the_command_writes_an_image(backbone_folder, image_path, tmp_path, capsys):
    out = tmp_path / "panel.png"
    arguments = [
        "evaluate",
        "panel",
        str(image_path),
        "--backbone",
        str(backbone_folder),
        "--device",
        "cpu",
        "-o",
        str(out),
    ]
    assert main([*arguments, "--teacher-px", "112", "--point", "50", "60"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as made:
        assert made.width > 4 * HEIGHT_PX
