"""What a map costs over how fine it is: a diagram for each architecture, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from brixel.evaluate.diagram import COLOURS, Spot, decades, diagram, in_rows


def cost_plot(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The operations, and where they were measured the peak memory, of the rows of a cost report.

    A diagram's x is the number of cells along a side of the map that comes out.
    """
    diagrams: list[Image.Image] = []
    for key, unit in (("gflop", "GFLOP"), ("peak_mib", "peak memory, MiB")):
        for name in dict.fromkeys(row["architecture"] for row in rows if row.get(key)):
            lines: dict[str, list[Spot]] = {}
            for row in rows:
                if row["architecture"] == name and row.get(key):
                    spot = Spot(float(row["output_cells"].partition(" ")[0]), float(row[key]))
                    spots = lines.setdefault(row["variant"], [])
                    if spot not in spots:  # a row for each size of batch
                        spots.append(spot)
            diagrams.append(_drawn(f"{name}: {unit}, over cells along a side", lines))
    return in_rows(diagrams)


def _drawn(title: str, lines: Mapping[str, Sequence[Spot]]) -> Image.Image:
    spots = [spot for each in lines.values() for spot in each]
    across, up = decades([spot.x for spot in spots], 2), decades([spot.y for spot in spots], 10)
    return diagram(title, lines, across, up, dict(zip(lines, COLOURS, strict=False)))
