import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import brixel
from brixel import BrixelError, FeatureMap
from brixel.feature_maps import feature_map as module


def random_map(
    channels: int = 5, grid_hw: tuple[int, int] = (4, 6), image_hw: tuple[int, int] = (40, 60)
) -> FeatureMap:
    stride = (image_hw[0] / grid_hw[0], image_hw[1] / grid_hw[1])
    return FeatureMap(torch.randn(channels, *grid_hw), image_hw, stride)


def shown(page: brixel.inference.view.ViewPage) -> tuple[list[str], list[tuple[str, bool]]]:
    """Names of kinds; of images, names and whether there is a picture."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.html, re.DOTALL)[1])
    return [kind["name"] for kind in data["kinds"]], [(each["name"], bool(each["source"])) for each in data["images"]]


def test_one_map_several_maps_and_kinds(tmp_path, image_path):
    one = random_map()
    assert shown(brixel.view(one)) == (["features"], [("image 1", False)])
    assert shown(brixel.view([one, random_map(grid_hw=(3, 2))])) == (
        ["features"],
        [("image 1", False), ("image 2", False)],
    )
    kinds = [{"backbone": one, "brixel": random_map(7)}, {"brixel": random_map(7), "backbone": one}]
    target = tmp_path / "view.html"
    page = brixel.view(kinds, target, images=[image_path, str(image_path)], names=("a", "b"))
    assert shown(page) == (["backbone", "brixel"], [("a", True), ("b", True)])
    assert target.read_text(encoding="utf-8") == page.html


def test_images_of_any_kind_and_their_names(image_path):
    one, array = random_map(), np.zeros((40, 60, 3), np.uint8)
    with Image.open(image_path) as opened:
        given = [image_path, opened, array, array.astype(np.float32), torch.zeros(3, 40, 60), Image.new("L", (60, 40))]
        names = [name for name, _ in shown(brixel.view([one] * 6, images=given))[1]]
    assert names == ["waves.png", "waves.png", "image 3", "image 4", "image 5", "image 6"]
    assert shown(brixel.view(one, images=array))[1] == [("image 1", True)]


def test_maps_with_too_many_cells_are_resized_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 60)
    big = random_map(grid_hw=(20, 30))
    page = brixel.view([big, random_map()])
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.html, re.DOTALL)[1])
    assert [each["maps"][0]["grid"] for each in data["images"]] == [[6, 9], [4, 6]]
    assert data["kinds"][0]["resizedFrom"] == ["20 × 30"]
    thin = FeatureMap(torch.randn(2, 1, 900), (1, 900), (1, 1))
    assert module.viewed_map(thin).features.shape == (2, 1, 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda one: ([],), "no maps to view; give at least one FeatureMap"),
        (lambda one: ({},), "no maps to view"),
        (lambda one: ([one, "map.safetensors"],), "maps hold 'map.safetensors'; expected a FeatureMap, a mapping"),
        (lambda one: ({"a": one.features},), "maps hold tensor"),
        (lambda one: ([{"a": one}, {"b": one}],), r"image 2 has maps of the kinds \['b'\], the first one of \['a'\]"),
        (lambda one: ([one, random_map(6)],), "the maps 'features' have 5 and 6 channels; expected maps of one model"),
        (lambda one: (one, "view.png"), "expected a name that ends in .html or .htm"),
        (lambda one: (one, "no/view.html"), "no folder no"),
    ],
)
def test_what_cannot_be_viewed(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BrixelError, match=message):
        brixel.view(*arguments(random_map()))
    assert not list(tmp_path.iterdir())


def test_images_that_do_not_fit_their_maps(image_path, tmp_path):
    one = random_map()
    with pytest.raises(BrixelError, match="1 images for 2 feature maps"):
        brixel.view([one, one], images=[image_path])
    with pytest.raises(BrixelError, match="1 names for 2 images; expected one for each"):
        brixel.view([one, one], names=["a"])
    with pytest.raises(BrixelError, match=r"'waves.png' has 60 x 90 px, and its map is of an image of 90 x 60 px"):
        brixel.view(random_map(image_hw=(90, 60)), images=image_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        brixel.view(one, images=tmp_path / "missing.png")
    broken = FeatureMap(torch.full((5, 4, 6), torch.nan), (40, 60), (10, 10))
    with pytest.raises(BrixelError, match="holds values that are not finite"):
        brixel.view(broken)
