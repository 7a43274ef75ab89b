"""Draw videos whose truth is known, in the layout of DAVIS 2017, for `brixel evaluate video`.

    python examples/draw_videos.py FOLDER [COUNT [SEED]]

Textured shapes move over a textured background that moves itself: they turn, grow and shrink, hide each other and lie
partly outside. Video i has the seed SEED + i.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH, FRAMES = 240, 432, 24


def texture(noise: np.random.Generator, height: int, width: int, contrast: float) -> Image.Image:
    """A colour with noise of several scales."""
    total = np.broadcast_to(noise.uniform(40, 215, 3), (height, width, 3)).copy()
    for cell in (64, 24, 9, 4):
        grain = noise.normal(0, 1, (height // cell + 3, width // cell + 3, 3)) * [1, 1, 1]
        spread = np.stack(
            [np.asarray(Image.fromarray(g).resize((width, height), 3)) for g in np.moveaxis(grain, 2, 0)], 2
        )
        total += contrast * spread * cell**0.25
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def shape(noise: np.random.Generator, kind: str, side: int) -> Image.Image:
    """A textured shape of about ``side`` pixels, transparent around it."""
    mask = Image.new("L", (side, side))
    draw, edge = ImageDraw.Draw(mask), side - 1
    if kind == "disk":
        draw.ellipse((0, 0, edge, edge), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, edge, edge), fill=255)
        draw.ellipse((side * 0.33, side * 0.33, side * 0.67, side * 0.67), fill=0)
    elif kind == "square":
        draw.rectangle((0, side * 0.1, edge, side * 0.9), fill=255)
    else:  # a star
        turns = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.24, 0.5) * side
        draw.polygon(
            [(side / 2 + r * np.sin(t), side / 2 - r * np.cos(t)) for t, r in zip(turns, radii, strict=True)], 255
        )
    picture = texture(noise, side, side, 8.0).convert("RGBA")
    picture.putalpha(mask)
    return picture


def draw_video(seed: int, kinds: tuple[str, ...] = ()) -> tuple[list[Image.Image], list[np.ndarray]]:
    """The frames of a video, and the number of the object at every pixel, 0 for none."""
    noise = np.random.default_rng(seed)
    kinds = kinds or tuple(noise.permutation(["disk", "ring", "square", "star"])[: noise.integers(2, 5)])
    ground, drift = texture(noise, HEIGHT + 80, WIDTH + 80, 6.0), noise.uniform(-1.2, 1.2, 2)
    shapes = [shape(noise, kind, int(noise.integers(64, 110))) for kind in kinds]
    centres = noise.uniform([70, 70], [WIDTH - 70, HEIGHT - 70], (len(kinds), 2))
    speeds = noise.uniform(2, 5, (len(kinds), 2)) * noise.choice([-1, 1], (len(kinds), 2))
    spins, pulses = noise.uniform(-3, 3, len(kinds)), noise.uniform(0, 0.35, len(kinds))
    images, masks = [], []
    for time in range(FRAMES):
        left, top = np.round(40 + drift * time).astype(int)
        image, mask = ground.crop((left, top, left + WIDTH, top + HEIGHT)), Image.new("L", (WIDTH, HEIGHT))
        for number, picture in enumerate(shapes):
            scale = 1 + pulses[number] * np.sin(time / 6 + number)
            turned = picture.resize((round(picture.width * scale),) * 2, 3).rotate(spins[number] * time, 3, expand=True)
            corner = tuple(np.round(centres[number] - np.array(turned.size) / 2).astype(int).tolist())
            inside = turned.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
            image.paste(turned.convert("RGB"), corner, inside)
            mask.paste(number + 1, corner, inside)
        centres += speeds
        speeds *= np.where((centres < 30) | (centres > [WIDTH - 30, HEIGHT - 30]), -1, 1)
        images.append(image)
        masks.append(np.asarray(mask))
    return images, masks


def main(folder: str, count: str = "6", seed: str = "0") -> None:
    names = [f"drawn-{int(seed) + number:03d}" for number in range(int(count))]
    for number, name in enumerate(names):
        images, masks = draw_video(int(seed) + number)
        for kind in ("JPEGImages", "Annotations"):
            (Path(folder) / kind / "480p" / name).mkdir(parents=True, exist_ok=True)
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            image.save(Path(folder) / "JPEGImages" / "480p" / name / f"{index:05d}.jpg", quality=95)
            Image.fromarray(mask).save(Path(folder) / "Annotations" / "480p" / name / f"{index:05d}.png")
    listed = Path(folder) / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
