"""Sizes on the patch grid: a table worked out by hand, and invariants over many random images."""

import dataclasses
import random
from fractions import Fraction

import pytest

from brixel.errors import BrixelError, ImageError
from brixel.images.patch_grid import MOST_ENLARGED, PatchGrid, plan_patch_grid


@pytest.mark.parametrize(
    ("image_hw", "patch_px", "short_side_px", "resized_hw", "padded_hw"),
    [
        ((480, 640), 16, 256, (256, 341), (256, 352)),  # 341.33 goes down
        ((640, 480), 16, 256, (341, 256), (352, 256)),
        ((480, 641), 16, 240, (240, 321), (240, 336)),  # 320.5: a half goes up
        ((100, 100), 14, 518, (518, 518), (518, 518)),
        ((375, 500), 14, "native", (375, 500), (378, 504)),
        ((1, 1), 16, "native", (1, 1), (16, 16)),
        ((1000, 3), 16, 1, (333, 1), (336, 16)),
        ((224, 224), 16, 225, (225, 225), (240, 240)),
    ],
)
def test_plan(
    image_hw: tuple[int, int],
    patch_px: int,
    short_side_px: int | str,
    resized_hw: tuple[int, int],
    padded_hw: tuple[int, int],
) -> None:
    planned = plan_patch_grid(image_hw, patch_px, short_side_px)
    assert planned == PatchGrid(image_hw, resized_hw, padded_hw, patch_px)


@pytest.mark.parametrize(
    ("resized_px", "patch_px", "upscale", "cells"),
    [
        (224, 14, 4, 64),
        (225, 14, 4, 65),
        (7, 14, 4, 2),
        (8, 14, 4, 3),
        (512, 16, 4, 128),
        (1, 16, 4, 1),
        (33, 16, 1, 3),
    ],
)
def test_map_cells(resized_px: int, patch_px: int, upscale: int, cells: int) -> None:
    grid = plan_patch_grid((resized_px, resized_px), patch_px, "native")
    assert grid.map_hw(upscale) == (cells, cells)


def test_map_stride_is_in_pixels_of_the_image_as_given() -> None:
    grid = plan_patch_grid((1024, 2048), 14, 512)  # halved
    assert grid.map_stride(4) == (7.0, 7.0)  # 3.5 px of the resized image
    assert plan_patch_grid((480, 640), 16, "native").map_stride(4) == (4.0, 4.0)


def test_invariants_over_random_images() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        image_hw = rng.randint(1, 3000), rng.randint(1, 3000)  # within the limit as they are
        patch_px = rng.choice([8, 14, 16])
        short_px, long_px = sorted(image_hw)
        most_px = 1200 if long_px <= MOST_ENLARGED * short_px else short_px  # a line is not enlarged
        short_side_px = rng.choice([0, rng.randint(1, most_px)]) or "native"
        grid = plan_patch_grid(image_hw, patch_px, short_side_px)
        _check_resized(grid, short_side_px)
        for upscale in (1, 4):
            _check_map(grid, upscale)


def _check_resized(grid: PatchGrid, short_side_px: int | str) -> None:
    if short_side_px == "native":
        assert grid.resized_hw == grid.image_hw
    else:
        short_px, long_px = sorted(grid.image_hw)
        exact_long_px = Fraction(long_px * int(short_side_px), short_px)
        assert min(grid.resized_hw) == short_side_px
        assert abs(max(grid.resized_hw) - exact_long_px) <= Fraction(1, 2)
        (height, width), (resized_height, resized_width) = grid.image_hw, grid.resized_hw
        assert (height - width) * (resized_height - resized_width) >= 0  # portrait stays portrait
    for resized, padded in zip(grid.resized_hw, grid.padded_hw, strict=True):
        assert padded == min(n for n in range(resized, resized + grid.patch_px) if n % grid.patch_px == 0)


def _check_map(grid: PatchGrid, upscale: int) -> None:
    """The cells cover the image as given, and one fewer would not."""
    axes = zip(grid.image_hw, grid.padded_hw, grid.map_hw(upscale), grid.map_stride(upscale), strict=True)
    for image, padded, cells, stride in axes:
        assert (cells - 1) * stride < image * (1 - 1e-9) + 1e-9
        assert cells * stride >= image * (1 - 1e-9)
        assert cells <= padded // grid.patch_px * upscale  # the cut map lies inside the padded one


@pytest.mark.parametrize("image_hw", [(1, 5000), (5000, 1), (10, 641)])
def test_a_line_is_not_enlarged(image_hw: tuple[int, int]) -> None:
    message = rf"{image_hw[0]}x{image_hw[1]} pixels .* a long side of at most 64 .* a short_side_px of at most"
    with pytest.raises(ImageError, match=message):
        plan_patch_grid(image_hw, 16, 256)
    for short_side_px in ("native", min(image_hw)):
        assert plan_patch_grid(image_hw, 16, short_side_px).resized_hw == image_hw


def test_a_long_panorama_is_enlarged_and_a_longer_one_made_smaller() -> None:
    assert plan_patch_grid((10, 640), 16, 256).resized_hw == (256, 16384)
    assert plan_patch_grid((1000, 200_000), 16, 256).resized_hw == (256, 51200)


@pytest.mark.parametrize("short_side_px", [0, -16, True, False, 3.5, 512.0, "Native", "512", "", None])
def test_short_side_must_be_a_positive_int_or_native(short_side_px: object) -> None:
    with pytest.raises(BrixelError, match=r"short_side_px is .*; expected a whole number .* or 'native'") as raised:
        plan_patch_grid((10, 10), 16, short_side_px)  # type: ignore[arg-type]
    assert repr(short_side_px) in str(raised.value)


def test_a_grid_is_frozen_and_checks_itself() -> None:
    grid = plan_patch_grid((480, 640), 16, 256)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.patch_px = 14  # type: ignore[misc]
    for wrong in ({"padded_hw": (256, 341)}, {"padded_hw": (272, 352)}, {"image_hw": (0, 3)}, {"patch_px": 0}):
        with pytest.raises(AssertionError):
            dataclasses.replace(grid, **wrong)
