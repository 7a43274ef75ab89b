"""The page as a file: what is in it, what is not, and where it may be written. What it does: tests/browser."""

import base64
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.feature_maps.viewer.page import MAX_IMAGE_PX, ViewedImage, ViewedMap, ViewPage, build_page, check_page_path
from brixel.images.find_images import SCENE


def viewed(channels: int = 6, grid_hw: tuple[int, int] = (4, 6), image_hw: tuple[int, int] = (40, 60)) -> ViewedMap:
    stride = (image_hw[0] / grid_hw[0], image_hw[1] / grid_hw[1])
    features = torch.randn(channels, *grid_hw, generator=torch.Generator().manual_seed(0))
    return ViewedMap(features, image_hw, stride)


def data_of(page: ViewPage) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)[1])


def test_the_page_says_what_it_holds():
    picture = Image.new("RGB", (1536, 1024), "orange")
    maps = {"backbone": viewed(grid_hw=(2, 3)), "brixel": viewed(channels=9)}
    data = data_of(build_page([ViewedImage("a.png", maps, picture), ViewedImage("b.png", maps)]))
    assert [(kind["name"], kind["channels"], len(kind["low"])) for kind in data["kinds"]] == [
        ("backbone", 6, 6),
        ("brixel", 9, 9),
    ]
    first, second = data["images"]
    assert (first["name"], first["height"], first["width"]) == ("a.png", 40, 60)
    assert [(each["grid"], each["stride"]) for each in first["maps"]] == [([2, 3], [20, 20]), ([4, 6], [10, 10])]
    assert len(base64.b64decode(first["maps"][1]["codes"])) == 24 * 9
    assert len(base64.b64decode(first["maps"][1]["lengths"])) == 24 * 2
    jpeg = base64.b64decode(first["source"].removeprefix("data:image/jpeg;base64,"))
    assert jpeg[:3] == b"\xff\xd8\xff"
    assert second["source"] is None
    assert picture.size == (1536, 1024)
    small = ViewedImage("a.png", maps, picture).picture
    assert small is not None
    assert small.size == (MAX_IMAGE_PX, round(MAX_IMAGE_PX * 2 / 3))


def test_the_page_allows_its_own_program_and_style_and_nothing_else():
    text = build_page([ViewedImage("a.png", {"features": viewed()})]).html
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    for tag in ("script", "style"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(content) == 1
        assert base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_names_are_text():
    name = "</script><script>alert(1)</script>\u202e\ud800"
    page = build_page([ViewedImage(name, {"<b>kind</b>": viewed()})])
    assert "alert(1)</script>" not in page.html
    assert data_of(page)["images"][0]["name"] == "</script><script>alert(1)</script>\\u202e\\ud800"
    assert data_of(page)["kinds"][0]["name"] == "<b>kind</b>"
    assert (
        "<title>&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\u202e\\ud800 - brixel view</title>" in page.html
    )


@pytest.mark.slow
def test_four_photographs_with_three_kinds_stay_under_six_megabytes():
    with Image.open(SCENE) as scene:
        picture = scene.convert("RGB")
    fine = viewed(64, (64, 96), (640, 960))
    maps = {"backbone": viewed(64, (16, 24), (640, 960)), "brixel": fine, "teacher": fine}
    page = build_page([ViewedImage("scene.jpg", maps, picture)] * 4)
    assert 4_000_000 < len(page.html.encode()) < 6_000_000


def test_an_image_of_other_proportions_is_refused():
    maps = {"features": viewed()}
    ViewedImage("a.png", maps, Image.new("RGB", (61, 41)))  # a copy of about that size
    with pytest.raises(BrixelError, match=r"'a.png' has 60 x 40 px, and its map is of an image of 40 x 60 px"):
        ViewedImage("a.png", maps, Image.new("RGB", (40, 60)))
    with pytest.raises(BrixelError, match=r"the maps of 'a.png' are of images of 40 x 60 px and 60 x 40 px"):
        ViewedImage("a.png", {"a": viewed(), "b": viewed(image_hw=(60, 40))})


def test_saved_pages_replace_pages(tmp_path: Path):
    page = build_page([ViewedImage("a.png", {"features": viewed()})])
    target = tmp_path / "view.html"
    page.save(target)
    assert target.read_text(encoding="utf-8") == page.html
    check_page_path(target, overwrite=False)
    page.save(os.fspath(target))
    mine = tmp_path / "mine.HTM"
    mine.write_text("<!doctype html>")
    with pytest.raises(BrixelError, match=r"mine.HTM exists, and brixel has not written it"):
        check_page_path(mine, overwrite=False)
    check_page_path(mine)
    for name, message in (
        ("view.png", r"view.png: expected a name that ends in .html or .htm"),
        ("no/view.html", "no folder"),
        ("folder.html", "folder.html is a folder; expected the name of a page to write"),
    ):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        with pytest.raises(BrixelError, match=message):
            page.save(tmp_path / name)
    for wrong in (None, 5, ""):
        with pytest.raises(BrixelError, match="path is .*; expected a path"):
            page.save(wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "mine.HTM", "view.html"]


def test_notebooks_get_a_frame():
    page = build_page([ViewedImage('"quotes"', {"features": viewed()})])
    frame = page._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" ')
    assert frame.count('"') == 6  # three attributes: no text of the page ends one
    assert repr(page) == "ViewPage(0.0 MB)"


def test_the_same_maps_make_the_same_page():
    images = [ViewedImage("a.png", {"features": viewed()}, Image.fromarray(np.zeros((40, 60, 3), np.uint8)))]
    assert build_page(images).html == build_page(images).html
