"""The pictures of docs/viewer.md: `python tests/browser/screenshots.py PHOTO... -o docs`.

The first photograph alone, and all of them with the drawing in the package, by brixel-small; wide, narrow, dark.
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import brixel
from brixel.images.find_images import SCENE
from brixel.inference.comparison_panel import comparison_maps


def point(page: Page, image: int, share_yx: tuple[float, float], pin: bool, touch: bool) -> None:
    frame = page.locator(f"figure[data-image='{image}']:visible .frame").first
    box = frame.bounding_box()
    assert box is not None
    at = (box["x"] + share_yx[1] * box["width"], box["y"] + share_yx[0] * box["height"])
    if touch:
        page.touchscreen.tap(*at)
    else:
        (page.mouse.click if pin else page.mouse.move)(*at)


def shoot(browser: Browser, source: Path, target: Path, size: tuple[int, int], **settings: object) -> None:
    """Open a page, choose ``kind``, point at ``share_yx`` of ``image``, and write a picture."""
    touch = size[0] < 600
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=settings.get("scheme", "light"),
        device_scale_factor=2 if touch else 1,
        has_touch=touch,
        is_mobile=touch,
    )
    page = context.new_page()
    page.goto(source.as_uri())
    page.keyboard.press(str(settings.get("kind", 2)))
    page.keyboard.press(settings.get("layer", "s"))
    page.wait_for_timeout(300)
    if "share_yx" in settings:
        point(page, settings["image"], settings["share_yx"], settings.get("pin", True), touch)
    page.wait_for_timeout(300)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(target, quality=80)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    model = brixel.BrixelFeatures.from_pretrained(device="cpu")
    images = [*options.photos, SCENE]
    maps = [comparison_maps(model, image, teacher=True) for image in images]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        one, many = Path(folder) / "one.html", Path(folder) / "many.html"
        brixel.view(maps[0], one, images=images[0])
        brixel.view(maps, many, images=images)
        executable = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        pictures = {
            "one-wide": (one, (1280, 800), {"image": 0, "share_yx": (0.3, 0.5), "pin": False}),
            "one-kinds-dark": (one, (1280, 560), {"image": 0, "share_yx": (0.55, 0.6), "kind": 4, "scheme": "dark"}),
            "eight-wide": (many, (1600, 900), {"image": 1, "share_yx": (0.4, 0.36)}),
            "eight-pca-dark": (many, (1600, 900), {"layer": "p", "scheme": "dark"}),
            "eight-narrow": (many, (390, 844), {"image": 0, "share_yx": (0.5, 0.5)}),
            "eight-narrow-dark": (many, (390, 844), {"image": 0, "share_yx": (0.3, 0.5), "scheme": "dark"}),
        }
        for name, (source, size, settings) in pictures.items():
            shoot(browser, source, options.output / f"viewer-{name}.webp", size, **settings)
        browser.close()


if __name__ == "__main__":
    main()
