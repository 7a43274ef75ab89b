"""Draws a georeferenced raster, computes its feature raster in windows, and finds what resembles a place on the ground.

    python examples/raster.py [MODEL]

Needs rasterio: pip install 'brixel[geo]'.
"""

import sys

import numpy as np
import rasterio
from rasterio import Affine

from brixel import BrixelFeatures


def draw(path: str, side: int = 700) -> None:
    """Fields, a river and a road, in pixels of 10 m: four bands of 16 bits, 0 where there is no data."""
    y, x = np.mgrid[:side, :side]
    fields = ((x // 90 + y // 70) % 4)[None] * np.array([120, 260, 180, 900])[:, None, None] + 400
    river = abs(y - 300 - 80 * np.sin(x / 90)) < 22
    road = abs(x - 0.4 * y - 180) < 5
    noise = np.random.default_rng(0).normal(0, 25, (4, side, side))
    bands = np.where(river, np.array([600, 500, 300, 80])[:, None, None], fields)
    bands = np.where(road, np.array([1500, 1550, 1600, 1700])[:, None, None], bands) + noise
    bands = np.where(x + y < 200, 0, bands.clip(1)).astype(np.uint16)  # the edge of the scene
    size = {"count": 4, "height": side, "width": side, "dtype": "uint16", "nodata": 0}
    place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500_000, 0, -10, 4_650_000)}
    with rasterio.open(path, "w", driver="GTiff", tiled=True, **size, **place) as file:
        file.write(bands)
        file.descriptions = ("blue", "green", "red", "near infrared")


def main() -> None:
    model = BrixelFeatures.from_pretrained(*sys.argv[1:2])
    draw("scene.tif")
    summary = model.extract_raster(
        "scene.tif", "scene_features.tif", window=280, overlap=56, bands=(3, 2, 1), stretch=(2, 98), overwrite=True
    )
    print(summary)
    with rasterio.open("scene_features.tif") as file:
        features, place = file.read(), file.profile
        river = file.index(500_000 + 10 * 350, 4_650_000 - 10 * (300 + 80 * np.sin(350 / 90)))  # a point in the river
    unit = features / np.linalg.norm(features, axis=0)
    similarity = np.einsum("dhw,d->hw", unit, unit[:, river[0], river[1]])
    place.update(count=1)
    with rasterio.open("like_the_river.tif", "w", **place) as file:
        file.write(similarity[None])
    print(f"like_the_river.tif: {np.nanmin(similarity):.2f} to {np.nanmax(similarity):.2f}")


if __name__ == "__main__":
    main()
