"""Matching: points of an image found in a warp of it by nearest features; the warp gives the truth.

The second view is the image's centre crop under a homography that lies inside it, so that nothing is blank. A point
of the first view is found in the second at the centre of the cell with the most similar feature (cosine), and refined:
where between cells a parabola through the similarities is highest, as ``FeatureMap.match`` does.

Shapes: D channels, h x w cells, P points; coordinates (x, y) as shares of a view's side, 0 to 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.errors import BrixelError
from brixel.evaluate.bootstrap import interval
from brixel.evaluate.feature_cache import centre_crop
from brixel.evaluate.feature_sources import BASE, FeatureSource, features_by_name
from brixel.evaluate.metrics import pck
from brixel.evaluate.report import SOURCE_COLUMNS, Report
from brixel.feature_maps.matching import nearest, refined, unit_cells
from brixel.utils.devices import describe_machine
from brixel.utils.progress import progress_bar

THRESHOLDS = (0.01, 0.02, 0.05, 0.1)  # of the view's side
WARPS = 2  # of each image
POINTS = 256  # of each warp
_REACH = 0.25  # how far into the image, of its side, a corner of the second view lies at most


def random_homography(generator: torch.Generator) -> Tensor:
    """A matrix (3, 3) from points of the second view to the first, whose corners lie inside, near its own corners."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    inward = 1 - 2 * corners
    targets = corners + inward * _REACH * torch.rand(4, 2, generator=generator, dtype=torch.float64)
    rows, right = [], []
    for (x, y), (u, v) in zip(corners.tolist(), targets.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    solved = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64))
    return torch.cat([solved, solved.new_ones(1)]).view(3, 3)


def transform_points(points: Tensor, homography: Tensor) -> Tensor:
    """Points (P, 2) under a homography, (P, 2)."""
    lifted = torch.cat([points, torch.ones_like(points[:, :1])], 1) @ homography.T.to(points)
    return lifted[:, :2] / lifted[:, 2:]


def warp_image(crop: Tensor, homography: Tensor) -> Tensor:
    """The second view of a crop (3, T, T), of the same size, read bilinearly."""
    side = crop.shape[-1]
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    pixels = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).view(-1, 2)  # x, y
    return _read(crop, transform_points(pixels, homography)).view(-1, side, side)


def _read(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (C, h, w) at points (P, 2), bilinearly, (C, P)."""
    grid = (2 * points - 1).to(maps)[None, None]  # 1 1 P 2
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]


def match_distances(first: Tensor, second: Tensor, homography: Tensor, points: Tensor) -> Tensor:
    """Distance of each match from the true position, at the cell's centre and refined: (2, P).

    Maps (D, h, w), points (P, 2) of the second view.
    """
    queries = unit_cells(_read(first, transform_points(points, homography))[..., None])  # P D
    cells = unit_cells(second)
    best = nearest(queries, cells)[1]
    height, width = second.shape[1:]
    centres = torch.stack([best // width, best % width], 1).double()
    places = torch.stack([centres, refined(queries, cells, best, (height, width))])  # 2 P yx
    found = ((places + 0.5) / places.new_tensor([height, width])).flip(-1).to(points)
    return (found - points).norm(dim=-1)


def matching(
    sources: Sequence[FeatureSource], images: Sequence[Path], teacher_px: Sequence[int], *, model: str, seed: int = 0
) -> Report:
    """Share of points found within each of ``THRESHOLDS`` (PCK), by source and size.

    Args:
        sources: What is compared; see :func:`sources_of`.
        images: Paths of images.
        teacher_px: Sides of the teacher's image in pixels.
        model: The sources' name in the report.
        seed: Of the warps and points, which are the same for all sources.

    Returns:
        A row per side and source.

    Raises:
        BrixelError: There is no image, or a side is not four whole patches.
        ImageError: An image cannot be used.
    """
    if not images:
        raise BrixelError("no images to match; expected at least one")
    rows: list[dict[str, Any]] = []
    for side in teacher_px:
        found = _at_size(sources, images, side, seed)
        rows += [_row(model, side, source, found) for source in sources]
    columns = {
        **SOURCE_COLUMNS,
        **{f"pck_{limit:g}": (f"PCK at {limit:.0%}", ".1%") for limit in THRESHOLDS},
        **{f"refined_{limit:g}": (f"refined, at {limit:.0%}", ".1%") for limit in THRESHOLDS[:2]},
        "gain_0.05": ("at 5 %, over bilinear, 95 %", "+.1%"),
        "median": ("median error, of the side", ".1%"),
    }
    recipe = (
        f"{len(images)} images, centre crops, {WARPS} homographies each (corners up to {_REACH:.0%} of the side "
        f"inwards), {POINTS} points each, seed {seed}; {describe_machine(torch.device(sources[0].device))}."
    )
    return Report("matching", "Matching under homographies", columns, rows, recipe)


def _at_size(sources: Sequence[FeatureSource], images: Sequence[Path], side: int, seed: int) -> dict[str, Tensor]:
    """Distances of all points by source, (images, 2, WARPS * POINTS), as :func:`match_distances`.

    All sources have the same warps and points.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {source.name: [] for source in sources}
    for image in progress_bar(images, f"images, {side} px"):
        crop = centre_crop(image, side)
        warps = [random_homography(generator) for _ in range(WARPS)]
        points = [torch.rand(POINTS, 2, generator=generator) for _ in warps]
        views = torch.stack([crop, *(warp_image(crop, warp) for warp in warps)])
        for name, maps in features_by_name(sources, views).items():
            triples = zip(maps[1:], warps, points, strict=True)
            found[name].append(torch.cat([match_distances(maps[0], *triple) for triple in triples], 1))
    return {name: torch.stack(distances) for name, distances in found.items()}


def _row(model: str, side: int, source: FeatureSource, found: dict[str, Tensor]) -> dict[str, Any]:
    limits = torch.tensor(THRESHOLDS)
    by_image = {name: torch.stack([pck(row, limits) for row in rows[:, 0]]) for name, rows in found.items()}
    refined_pck = torch.stack([pck(row, limits) for row in found[source.name][:, 1]]).mean(0)
    own, base = by_image[source.name], by_image.get(BASE)  # images, thresholds
    row = source.row(model, side)
    for index, limit in enumerate(THRESHOLDS):
        row[f"pck_{limit:g}"] = float(own[:, index].mean())
        row[f"pck_{limit:g}_interval"] = interval(own[:, index])
        row[f"refined_{limit:g}"] = float(refined_pck[index])
        if base is not None and source.name != BASE:
            row[f"gain_{limit:g}"] = interval(own[:, index] - base[:, index])
    row["median"] = float(found[source.name][:, 0].median())
    return row
