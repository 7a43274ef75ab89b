"""Rasters that the tests draw."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine

UTM = Affine(0.6, 0.0, 500_000.3, 0.0, -0.6, 4_649_776.7)


@pytest.fixture
def draw(tmp_path):
    """Write a raster of numbers (C, H, W); returns its path."""

    def write(values, name="scene.tif", *, colours=None, descriptions=None, mask=None, **profile) -> Path:
        values = np.asarray(values)
        count, height, width = values.shape
        profile = {"driver": "GTiff", "crs": "EPSG:32633", "transform": UTM, **profile}
        size = {"count": count, "height": height, "width": width, "dtype": values.dtype}
        with rasterio.open(tmp_path / name, "w", **{**size, **profile}) as file:
            file.write(values)
            if colours is not None:
                file.colorinterp = [rasterio.enums.ColorInterp[name] for name in colours]
            for number, text in enumerate(descriptions or (), 1):
                file.set_band_description(number, text)
            if mask is not None:
                file.write_mask(mask)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def rgb(waves) -> np.ndarray:
    """Waves as bands: (3, 130, 260) bytes."""
    return np.ascontiguousarray(waves.transpose(2, 0, 1))
