"""Draw the scene that the package contains: `python examples/draw_scene.py brixel/assets/scene.jpg`."""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 960, 640


def main(path: str) -> None:
    noise = np.random.default_rng(0)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    sky = (1 - rows) * np.array([70, 130, 215]) + rows * np.array([225, 238, 250])
    scene = Image.fromarray(np.broadcast_to(sky, (HEIGHT, WIDTH, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(scene)
    draw.ellipse((760, 50, 850, 140), fill=(255, 236, 150))
    draw.polygon([(0, 400), (210, 190), (370, 340), (560, 150), (960, 420), (960, 640), (0, 640)], fill=(104, 118, 142))
    draw.polygon([(490, 205), (560, 150), (640, 205), (600, 220), (560, 200), (530, 225)], fill=(246, 248, 252))
    draw.polygon([(0, 420), (300, 380), (960, 440), (960, 640), (0, 640)], fill=(96, 148, 62))
    draw.polygon([(430, 640), (470, 430), (500, 430), (640, 640)], fill=(196, 172, 132))
    draw.rectangle((600, 330, 790, 490), fill=(206, 92, 72))
    draw.polygon([(575, 335), (695, 235), (815, 335)], fill=(92, 58, 48))
    draw.rectangle((675, 410, 720, 490), fill=(70, 44, 36))
    for x in (620, 740):
        draw.rectangle((x, 365, x + 35, 400), fill=(240, 240, 205), outline=(255, 255, 255), width=4)
    for x, y, size in ((130, 330, 85), (260, 370, 60), (890, 380, 70)):
        draw.rectangle((x - size / 8, y, x + size / 8, y + 1.7 * size), fill=(88, 62, 40))
        for dx, dy in noise.uniform(-0.55, 0.55, (40, 2)) * size:
            green = tuple(int(c) for c in np.array([38, 92, 44]) + noise.integers(-16, 26))
            draw.ellipse((x + dx - size / 3, y + dy - size / 3, x + dx + size / 3, y + dy + size / 3), fill=green)
    draw.ellipse((330, 520, 410, 570), fill=(235, 235, 235))  # a sheep
    draw.ellipse((395, 510, 430, 545), fill=(52, 48, 48))
    for x in (345, 360, 380, 395):
        draw.rectangle((x, 560, x + 6, 590), fill=(52, 48, 48))
    grain = np.asarray(scene.filter(ImageFilter.GaussianBlur(0.8))) + noise.normal(0, 5, (HEIGHT, WIDTH, 1))
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, quality=92)


if __name__ == "__main__":
    main(sys.argv[1])
