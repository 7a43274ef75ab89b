"""Scenes with exact depth and surface normals: a floor, walls, tilted boards and balls, covered with photographs.

python examples/render_scenes.py PHOTOS OUT --count 100 --seed 0   ->   OUT/{images,depth,normals}/NNNN.{png,npy,npy}

A pinhole camera looks along +z, x right, y down; a point at pixel (r, c) lies on the ray ((c + 0.5 - W/2) / f,
(r + 0.5 - H/2) / f, 1). Depth is z in metres, float32 (H, W); normals (H, W, 3) point to the camera. Take the
photographs of two splits from different folders, so that they share no textures.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIDE_PX = 512
FOCAL_PX = 480.0
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def rays():
    """Directions of all pixels with z = 1, (H, W, 3)."""
    at = (np.arange(SIDE_PX) + 0.5 - SIDE_PX / 2) / FOCAL_PX
    x, y = np.meshgrid(at, at)
    return np.stack([x, y, np.ones_like(x)], -1)


def plane(directions, point, normal, half_m, turn):
    """Depth, normals and texture coordinates of a rectangle, of a plane where ``half_m`` is infinite."""
    normal = normal / np.linalg.norm(normal)
    with np.errstate(divide="ignore"):
        depth = (point @ normal) / (directions @ normal)  # H W
    helper = np.array([0.0, 1, 0]) if abs(normal[1]) < 0.9 else np.array([0.0, 0, 1])
    first = np.cross(helper, normal)
    first /= np.linalg.norm(first)
    second = np.cross(normal, first)
    first, second = np.cos(turn) * first + np.sin(turn) * second, np.cos(turn) * second - np.sin(turn) * first
    offset = directions * np.where(np.isfinite(depth), depth, 0)[..., None] - point
    u, v = offset @ first, offset @ second
    depth = np.where((depth > 0) & (np.abs(u) <= half_m) & (np.abs(v) <= half_m), depth, np.inf)
    towards = normal if normal @ point < 0 else -normal
    return depth, np.broadcast_to(towards, directions.shape), u, v


def ball(directions, centre, radius_m):
    """Depth, normals and texture coordinates of a ball."""
    a, b = (directions**2).sum(-1), directions @ centre
    inside = b**2 - a * (centre @ centre - radius_m**2)
    depth = np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    hit = directions * np.where(np.isfinite(depth), depth, 0)[..., None]
    normals = (hit - centre) / radius_m
    u, v = np.arctan2(normals[..., 0], -normals[..., 2]), np.arcsin(np.clip(normals[..., 1], -1, 1))
    return depth, normals, u * radius_m, v * radius_m


def coloured(texture, u, v, metre_px):
    """A photograph, repeated with mirroring, at coordinates in metres: (H, W, 3)."""
    height, width = texture.shape[:2]
    rows, columns = (
        np.abs((metres * metre_px).astype(int) % (2 * side - 1) - (side - 1))
        for metres, side in ((v, height), (u, width))
    )
    return texture[rows, columns]


def scene(numbers, textures):
    """One scene: colours (H, W, 3) uint8, depth (H, W), normals (H, W, 3)."""
    directions = rays()
    wall = np.array([numbers.uniform(-0.6, 0.6), 0, 1])
    shapes = [
        plane(directions, np.array([0, numbers.uniform(0.8, 1.6), 0.0]), np.array([0.0, 1, 0]), np.inf, 0),
        plane(directions, np.array([0, 0, numbers.uniform(5, 9)]), wall, np.inf, 0),
    ]
    for _ in range(numbers.integers(1, 4)):
        point = np.array([*numbers.uniform((-1.5, -1), (1.5, 0.8)), numbers.uniform(2.5, 5)])
        tilt = np.array([*numbers.uniform(-1, 1, 2), 1])
        shapes.append(plane(directions, point, tilt, numbers.uniform(0.3, 0.8), numbers.uniform(0, np.pi)))
    for _ in range(numbers.integers(1, 4)):
        point = np.array([*numbers.uniform((-1.3, -0.8), (1.3, 0.9)), numbers.uniform(2, 4.5)])
        shapes.append(ball(directions, point, numbers.uniform(0.2, 0.6)))
    depth, normals = np.full(directions.shape[:2], np.inf), np.zeros_like(directions)
    colours = np.zeros_like(directions)
    light = np.array([*numbers.uniform(-1, 1, 2), -1.5])
    for its_depth, its_normals, u, v in shapes:
        texture = textures[numbers.integers(len(textures))]
        shade = 0.35 + 0.65 * np.clip(its_normals @ light / np.linalg.norm(light), 0, 1)
        shown = coloured(texture, u, v, numbers.uniform(120, 300)) * shade[..., None]
        nearer = its_depth < depth
        depth = np.where(nearer, its_depth, depth)
        normals, colours = (np.where(nearer[..., None], a, b) for a, b in ((its_normals, normals), (shown, colours)))
    far = ~np.isfinite(depth) | (depth > 20)  # no measurement there
    return colours.round().astype(np.uint8), np.where(far, 0, depth), np.where(far[..., None], 0, normals)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    paths = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in ENDINGS)
    textures = [np.asarray(Image.open(path).convert("RGB").resize((640, 480))) for path in paths]
    numbers = np.random.default_rng(options.seed)
    for kind in ("images", "depth", "normals"):
        (options.out / kind).mkdir(parents=True, exist_ok=True)
    for index in range(options.count):
        colours, depth, normals = scene(numbers, textures)
        Image.fromarray(colours).save(options.out / "images" / f"{index:04}.png")
        np.save(options.out / "depth" / f"{index:04}.npy", depth.astype(np.float32))
        np.save(options.out / "normals" / f"{index:04}.npy", normals.astype(np.float16))


if __name__ == "__main__":
    main()
