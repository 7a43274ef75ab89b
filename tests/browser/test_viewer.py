"""The viewer in a browser: what it shows is what `FeatureMap` computes, up to the loss that the page states."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import brixel
from brixel import FeatureMap, PcaBasis

pytestmark = pytest.mark.browser

COLOUR_STEP = 1 / 255  # of the scale from 0 to 1
IMAGE_HW = (118, 180)
STRIDE = (8.0, 8.0)  # 15 x 23 cells: those of the last row and column extend beyond the image


def smooth_features(height: int, width: int, channels: int = 80, seed: int = 0) -> torch.Tensor:
    """Features of 16 directions that vary slowly, all in one half of the space, as real ones do."""
    mixing = torch.randn(channels, 16, generator=torch.Generator().manual_seed(99))
    coarse = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    return torch.einsum("cd,dhw->chw", mixing, fine) + 2 * mixing.mean(1)[:, None, None] + 1


FIRST = FeatureMap(smooth_features(15, 23), IMAGE_HW, STRIDE)
# the same content, three cells further down and four to the left
SECOND = FeatureMap(FIRST.features.roll((3, -4), (1, 2)), IMAGE_HW, STRIDE)
OTHER = FeatureMap(smooth_features(20, 12, seed=3), (200, 120), (10.0, 10.0))
COARSE = [FeatureMap(smooth_features(4, 6, 20, seed), each.image_hw, (each.image_hw[0] / 4, each.image_hw[1] / 6))
          for seed, each in enumerate((FIRST, SECOND, OTHER))]  # fmt: skip
PICTURES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*each.image_hw, 3), dtype=np.uint8))
    for each in (FIRST, SECOND, OTHER)
]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    """Three images, one of them upright, with two kinds of features."""
    path = tmp_path_factory.mktemp("view") / "view.html"
    maps = [{"backbone": coarse, "brixel": fine} for coarse, fine in zip(COARSE, (FIRST, SECOND, OTHER), strict=True)]
    brixel.view(maps, path, images=PICTURES, names=["first.png", "second.png", "upright.png"])
    return path


def frame(page, image, kind=None):
    """The frame of an image, of the kind that is shown."""
    which = "" if kind is None else f"[data-kind='{kind}']"
    return page.locator(f"figure[data-image='{image}']{which}:visible .frame").first


def place(page, image, point, feature_map=FIRST, kind=None):
    """Where a point (y, x) of an image lies in the window: x, y."""
    frame(page, image, kind).scroll_into_view_if_needed()
    box = frame(page, image, kind).bounding_box()
    height, width = feature_map.image_hw
    return box["x"] + point[1] / width * box["width"], box["y"] + point[0] / height * box["height"]


def settle(page):
    """Wait until what was asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def hover(page, image, point, feature_map=FIRST):
    page.mouse.move(*place(page, image, point, feature_map))
    settle(page)


def click(page, image, point, feature_map=FIRST):
    page.mouse.click(*place(page, image, point, feature_map))
    settle(page)


def readout(page, image):
    return page.locator(f"figure[data-image='{image}']:visible output").first.inner_text()


def middle(locator):
    """The middle of an element in the window: x, y."""
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def point_of(page, image):
    """The point that the page says it compares with."""
    return numbers(readout(page, image))


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def pixels(locator):
    """The pixels of a canvas, (H, W, 3)."""
    content = locator.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.mode == "RGB" or np.asarray(image)[..., 3].min() == 255
        return np.asarray(image.convert("RGB")).astype(int)


def shown_values(page, image):
    """What the colours of an image's cells mean on the page's own scale, from 0 to 1: (Hf, Wf)."""
    scale = pixels(page.locator("#bar"))[0]
    colours = pixels(page.locator(f"figure[data-image='{image}']:visible canvas.cells").first)
    distances = abs(colours[:, :, None] - scale).sum(-1)
    assert (distances.min(-1) == 0).all()  # no colour that the scale does not have
    return distances.argmin(-1) / 255


def loss(page, kind=1):
    """The largest difference of similarities that the page states."""
    return float(page.locator("#facts tr").nth(kind).locator("td").last.inner_text()) + 0.001


def test_hover_colours_every_cell_by_its_similarity_in_all_images(open_page, page_path):
    page = open_page(page_path)
    assert page.locator("canvas.cells:visible").count() == 0
    for image, feature_map, wanted in ((0, FIRST, (60, 90)), (0, FIRST, (116, 3)), (2, OTHER, (33.3, 71.7))):
        hover(page, image, wanted, feature_map)
        point = point_of(page, image)
        assert point == pytest.approx(wanted, abs=0.5)
        for other, target in enumerate((FIRST, SECOND, OTHER)):
            expected = target.similarity(point, of=feature_map).numpy()
            found = shown_values(page, other)
            assert found.shape == target.grid_hw
            np.testing.assert_allclose(found, expected.clip(0, 1), atol=loss(page) + COLOUR_STEP + 0.003)
            if other != image:
                assert numbers(readout(page, other))[0] == pytest.approx(float(expected.max()), abs=loss(page) + 0.003)


def test_the_stated_loss_is_that_of_the_library(page_path, open_page):
    page = open_page(page_path)
    for kind, maps in enumerate((COARSE, (FIRST, SECOND, OTHER))):
        stated = brixel.feature_maps.viewer.codes.encode([each.features for each in maps]).loss
        row = page.locator("#facts tr").nth(kind).locator("td")
        assert row.all_inner_texts() == [
            *(f"{maps[0].embed_dim}", f"{min(64, maps[0].embed_dim)}"),
            *(f"{value:.4f}" for value in (stated.mean, stated.p99, stated.largest)),
        ]


def test_a_click_pins_the_point_and_draws_the_matches_that_python_finds(open_page, page_path):
    page = open_page(page_path, 1000, 1400)  # nothing lies below the controls, which stay in view
    click(page, 0, (36, 100))
    point = point_of(page, 0)
    matches = {
        1: (SECOND, FIRST.match(SECOND, [point], refine=False)),
        2: (OTHER, FIRST.match(OTHER, [point], refine=False)),
    }
    for image, (target, match) in matches.items():
        score, y, x = numbers(readout(page, image))
        assert score == pytest.approx(float(match.score), abs=loss(page))
        similarity = target.similarity(point, of=FIRST)
        row, column = int(y / target.stride[0]), int(x / target.stride[1])
        assert float(similarity[row, column]) > float(match.score) - 2 * loss(page)
        expected = place(page, image, (y, x), target)
        assert middle(page.locator(f"figure[data-image='{image}']:visible .match")) == pytest.approx(expected, abs=1.5)
    match = matches[1][1]
    assert numbers(readout(page, 1))[1:] == pytest.approx(match.points_yx[0].tolist(), abs=0.06)
    assert bool(match.mutual)
    assert readout(page, 1).endswith("mutual")
    assert page.locator("#links line:not(.casing)").count() == 2
    hover(page, 1, (84, 84))  # the point stays, and the value under the mouse is told
    assert point_of(page, 0) == point
    value = float(SECOND.similarity(point, of=FIRST)[10, 10])
    assert numbers(page.locator("#readout").inner_text()) == pytest.approx([value], abs=loss(page))
    click(page, 1, (80, 80))
    assert readout(page, 1).startswith("point at y 80")
    page.keyboard.press("Escape")
    settle(page)
    hover(page, 0, (20, 20))
    assert readout(page, 0).startswith("point at y 20")
    assert page.locator(".match:visible").count() == 0


def test_a_point_without_way_back_is_told(open_page, tmp_path):
    features = torch.zeros(3, 1, 4)
    features[:, 0] = torch.tensor([[1.0, 0.9, 0, 0], [0, 0.3, 1, 0], [0, 0, 0, 1]])
    target = torch.tensor([[1.0, 0.0], [0.05, 0.0], [0.0, 1.0]])[:, None]
    here, there = FeatureMap(features, (10, 40), (10, 10)), FeatureMap(target, (10, 20), (10, 10))
    brixel.view([here, there], tmp_path / "view.html")
    page = open_page(tmp_path / "view.html")
    for x in (5, 17, 35):
        click(page, 0, (5, x), here)
        match = here.match(there, [(5, x)], refine=False)
        assert readout(page, 1).endswith("mutual" if bool(match.mutual) else "one way")
        assert numbers(readout(page, 1))[1:] == match.points_yx[0].tolist()
        assert page.locator(".match.oneway:visible").count() == (not match.mutual)
    assert page.locator("#kinds").is_hidden()


def test_kinds_are_switched_and_stand_side_by_side(open_page, page_path):
    page = open_page(page_path)
    click(page, 0, (60, 90))
    page.get_by_label("backbone", exact=True).check()
    settle(page)
    point = point_of(page, 0)
    expected = COARSE[1].similarity(point, of=COARSE[0]).numpy().clip(0, 1)
    np.testing.assert_allclose(shown_values(page, 1), expected, atol=loss(page, 0) + COLOUR_STEP + 0.01)
    page.keyboard.press("3")
    settle(page)
    assert page.locator("figure:visible").count() == 6
    assert page.locator(".ring:visible").count() == 2
    assert page.locator(".match:visible").count() == 4
    boxes = [page.locator(f"figure[data-image='0'][data-kind='{kind}'] .frame").bounding_box() for kind in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.get_by_label("brixel", exact=True).check()
    assert page.locator("figure:visible").count() == 3


def test_pca_colours_are_those_of_python(open_page, page_path):
    page = open_page(page_path)
    page.get_by_label("PCA colours", exact=True).check()
    settle(page)
    basis = PcaBasis.fit([each.features for each in (FIRST, SECOND, OTHER)])
    for image, feature_map in enumerate((FIRST, SECOND, OTHER)):
        shown = pixels(page.locator(f"figure[data-image='{image}']:visible canvas.cells"))
        differences = abs(shown - feature_map.pca(basis).astype(int))
        assert differences.max() <= 8
        assert differences.mean() < 1
    hover(page, 0, (60, 90))  # the colours stay, the similarities are told
    assert (pixels(page.locator("figure[data-image='2']:visible canvas.cells")) == shown).all()
    assert readout(page, 1).startswith("best ")
    page.get_by_label("image", exact=True).check()
    settle(page)
    assert page.locator("canvas.cells:visible").count() == 0


def test_opacity_and_stretch(open_page, page_path):
    page = open_page(page_path)
    click(page, 0, (60, 90))
    canvas = page.locator("figure[data-image='0']:visible canvas.cells")
    opacity = "canvas => Number(getComputedStyle(canvas).opacity)"
    assert canvas.evaluate(opacity) == 0.75
    page.locator("#opacity").fill("30")
    assert canvas.evaluate(opacity) == pytest.approx(0.3)
    assert page.locator("#opacity-value").inner_text() == "30 %"
    fixed = shown_values(page, 0)
    page.get_by_label("stretch to what is shown").check()
    settle(page)
    low, high = (float(page.locator(f"#scale-{end}").inner_text()) for end in ("low", "high"))
    similarities = [target.similarity(point_of(page, 0), of=FIRST) for target in (FIRST, SECOND, OTHER)]
    assert low == pytest.approx(min(float(each.min()) for each in similarities), abs=0.02)
    assert high == pytest.approx(max(float(each.max()) for each in similarities), abs=0.02)
    stretched = low + (high - low) * shown_values(page, 0)
    np.testing.assert_allclose(stretched.clip(0, 1), fixed, atol=0.02)


def test_keys(open_page, page_path):
    page = open_page(page_path)
    frame(page, 0).focus()
    page.keyboard.press("ArrowRight")  # from the middle of the image
    settle(page)
    assert point_of(page, 0) == [60.0, 92.0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowUp")
    settle(page)
    assert point_of(page, 0) == [20.0, 100.0]
    for _ in range(5):
        page.keyboard.press("Shift+ArrowLeft")
    settle(page)
    assert point_of(page, 0) == [20.0, 4.0]
    assert page.locator(".match:visible").count() == 0
    page.keyboard.press("Enter")
    settle(page)
    assert page.locator(".match:visible").count() == 2
    said = page.locator("#announcement").inner_text()
    assert said.startswith("Pinned at y 20.0, x 4.0. second.png: best ")
    page.keyboard.press("ArrowDown")  # pinned, it still moves
    settle(page)
    assert point_of(page, 0) == [28.0, 4.0]
    assert page.locator(".match:visible").count() == 2
    page.keyboard.press("Escape")
    settle(page)
    assert page.locator(".match:visible").count() == 0
    page.keyboard.press("Escape")
    settle(page)
    assert page.locator(".ring:visible").count() == 0
    for key, layer in (("p", "pca"), ("i", "none"), ("s", "similarity")):
        page.keyboard.press(key)
        assert page.locator(f"[name=layer][value={layer}]").is_checked()
    page.keyboard.press("1")
    assert page.get_by_label("backbone", exact=True).is_checked()
    page.keyboard.press("-")
    assert page.locator("#opacity").input_value() == "65"
    page.keyboard.press("c")
    assert page.locator("#stretch").is_checked()
    for control in page.locator("input").all():
        assert control.evaluate("input => input.labels.length") == 1


def test_the_ring_is_dragged_and_a_click_on_it_frees_the_point(open_page, page_path):
    page = open_page(page_path)
    click(page, 0, (60, 90))
    page.mouse.move(*place(page, 0, (60, 90)))
    page.mouse.down()
    page.mouse.move(*place(page, 0, (70, 110)))
    page.mouse.move(*place(page, 0, (30, 150)))
    page.mouse.up()
    settle(page)
    assert point_of(page, 0) == pytest.approx([30, 150], abs=0.5)
    assert page.locator(".match:visible").count() == 2
    click(page, 0, (30, 150))
    assert page.locator(".match:visible").count() == 0


def test_touch(open_page, page_path):
    page = open_page(page_path, 390, 844, has_touch=True, is_mobile=True)
    frame(page, 0).scroll_into_view_if_needed()
    page.touchscreen.tap(*place(page, 0, (60, 90)))
    settle(page)
    assert point_of(page, 0) == pytest.approx([60, 90], abs=0.5)
    assert page.locator("#hint").inner_text() == "Drag the ring, or tap it to free the point."
    assert page.locator(".ring.pinned:visible").count() == 1
    scrolled = page.evaluate("scrollY")
    session = page.context.new_cdp_session(page)

    def touch(kind, point=None):
        points = [] if point is None else [dict(zip("xy", place(page, 0, point), strict=True))]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (60, 90))
    for y in (55, 50, 40, 30):
        touch("touchMove", (y, 100))
    touch("touchEnd")
    settle(page)
    assert point_of(page, 0) == pytest.approx([30, 100], abs=0.5)
    assert page.evaluate("scrollY") == scrolled  # the ring moved, not the page
    page.touchscreen.tap(*place(page, 0, (30, 100)))
    settle(page)
    assert page.locator(".ring.pinned:visible").count() == 0


@pytest.mark.parametrize("width", [320, 390, 700, 1100, 2000])
def test_no_width_scrolls_sideways_and_marks_stay_in_place(open_page, page_path, width):
    page = open_page(page_path, 1000, 700)
    click(page, 0, (36, 100))
    before = numbers(readout(page, 1))
    page.set_viewport_size({"width": width, "height": 700})
    settle(page)
    for kind in "123":
        page.keyboard.press(kind)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("2")
    settle(page)
    assert numbers(readout(page, 1)) == before
    expected = place(page, 1, before[1:])
    centre = middle(page.locator("figure[data-image='1']:visible .match"))
    assert centre == pytest.approx(expected, abs=1.5)
    canvas, image = (
        page.locator(f"figure[data-image='0']:visible {each}").bounding_box() for each in (".cells", "img")
    )
    assert canvas["height"] / image["height"] == pytest.approx(15 * 8 / 118, rel=0.01)  # beyond the image, cut off
    line = page.locator("#links line:not(.casing)").first
    assert line.is_visible() == (width > 559)
    if width > 559:
        ends = [float(line.get_attribute(name)) for name in ("x1", "y1", "x2", "y2")]
        origin = page.locator("#gallery").bounding_box()
        distance = np.hypot(ends[2] + origin["x"] - centre[0], ends[3] + origin["y"] - centre[1])
        assert distance == pytest.approx(12, abs=1.5)  # at the edge of the ring


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(open_page, page_path, scheme):
    page = open_page(page_path, color_scheme=scheme)
    colours = page.evaluate(
        "() => [document.body, document.querySelector('header'), document.querySelector('footer'), "
        "document.querySelector('legend')].map(each => [getComputedStyle(each).color, "
        "getComputedStyle(each).backgroundColor])"
    )
    ground = luminance(colours[0][1])
    assert (ground < 0.1) == (scheme == "dark")
    for text, own_ground in colours:
        behind = ground if own_ground.startswith("rgba(0, 0, 0, 0") else luminance(own_ground)
        lighter, darker = max(behind, luminance(text)), min(behind, luminance(text))
        assert (lighter + 0.05) / (darker + 0.05) > 4.5  # WCAG AA


def luminance(colour):
    """Relative luminance of a CSS colour, as WCAG defines it."""
    shares = np.array([int(value) / 255 for value in re.findall(r"\d+", colour)[:3]])
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_names_are_shown_as_text(open_page, tmp_path):
    names = [
        "<img src=x onerror='window.hacked=1'>.jpg",
        "</script><script>window.hacked=1</script>",
        '"><svg onload=window.hacked=1>&amp;',
        "\u202egpj.exe\x1b[31m" + "long" * 60,
    ]
    brixel.view([{"<i>kind</i>": FIRST, "b": FIRST}] * 4, tmp_path / "view.html", names=names)
    page = open_page(tmp_path / "view.html", 390)
    shown = page.locator("figure[data-kind='0'] b").all_inner_texts()
    assert shown == [*names[:3], names[3].replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")]
    assert page.get_by_text("<i>kind</i>", exact=True).count() > 0
    assert page.evaluate("window.hacked") is None
    assert page.title().startswith(names[0])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_policy_stops_other_programs_and_connections(open_page, page_path):
    page = open_page(page_path)
    page.evaluate("""async () => {
        document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hacked = 1" }));
        const image = document.createElement("div");
        image.innerHTML = "<img src='data:,' onerror='window.hacked = 1'>";
        document.body.append(image);
        await fetch("https://example.org/").catch(() => { window.refused = true; });
        await new Promise(done => setTimeout(done, 100));
    }""")
    assert page.evaluate("[window.hacked ?? null, window.refused]") == [None, True]
    assert len(page.expected) >= 3
    assert all("Content Security Policy" in text for text in page.expected)
    page.expected.clear()


def test_one_image_and_no_picture(open_page, tmp_path):
    FIRST.to_html(tmp_path / "view.html")
    page = open_page(tmp_path / "view.html")
    base = pixels(page.locator("canvas.base"))
    assert abs(base - FIRST.pca().astype(int)).max() <= 8
    hover(page, 0, (60, 90))
    expected = FIRST.similarity(point_of(page, 0)).numpy().clip(0, 1)
    np.testing.assert_allclose(shown_values(page, 0), expected, atol=loss(page, 0) + COLOUR_STEP + 0.003)
    click(page, 0, (60, 90))
    assert page.locator("#links line").count() == 0


def test_cells_of_zeros_are_similar_to_nothing(open_page, tmp_path):
    features = smooth_features(4, 5)
    features[:, 1, 1] = 0
    feature_map = FeatureMap(features, (40, 50), (10, 10))
    feature_map.to_html(tmp_path / "view.html", PICTURES[0].resize((50, 40)))
    page = open_page(tmp_path / "view.html")
    hover(page, 0, (15, 15), feature_map)
    hover(page, 0, (35, 45), feature_map)
    assert shown_values(page, 0)[1, 1] == 0
    assert shown_values(page, 0)[0, 0] > 0.05
    frame(page, 0).focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    for key in ("ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    settle(page)
    assert point_of(page, 0) == [15.0, 15.0]
    assert (shown_values(page, 0) == 0).all()


def test_eight_images(open_page, tmp_path):
    maps = [FeatureMap(smooth_features(64, 96, seed=seed), (64, 96), (1, 1)) for seed in range(8)]
    brixel.view(maps, tmp_path / "view.html", images=[PICTURES[0].resize((96, 64))] * 8)
    page = open_page(tmp_path / "view.html", 1600, 900)
    boxes = [frame(page, image).bounding_box() for image in range(8)]
    assert len({box["y"] for box in boxes}) == 2  # four in a row
    assert max(box["y"] + box["height"] for box in boxes) < 900  # all in one window
    click(page, 5, (20, 30), maps[5])
    point = point_of(page, 5)
    for image in range(8):
        expected = maps[image].similarity(point, of=maps[5]).numpy().clip(0, 1)
        np.testing.assert_allclose(shown_values(page, image), expected, atol=loss(page, 0) + COLOUR_STEP + 0.02)
    assert page.locator(".match:visible").count() == 7


def test_a_notebook_shows_it_in_a_frame(open_page, tmp_path):
    page_in_frame = brixel.view([FIRST, SECOND], images=PICTURES[:2])._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><meta charset='utf-8'>{page_in_frame}", encoding="utf-8")
    page = open_page(tmp_path / "notebook.html")
    inside = page.frames[1]
    inside.locator("figure[data-image='0'] .frame").click(position={"x": 50, "y": 40})
    inside.locator("figure[data-image='1'] .match").wait_for(state="visible")
    assert inside.evaluate("window.origin") == "null"  # it sees nothing of the notebook
