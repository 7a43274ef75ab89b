"""Whether an exported file gives the maps of its model: a table over sizes, and a bound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.inference.export.tracing import InputSize, example
from brixel.utils.markdown import markdown_table

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""The largest difference that a file may have, as a share of the largest value of the map in float32."""
# images and patches, beside the traced size: the smallest, squares, lines, many images, the model's own size
_SIZES = ((1, 2, 2), (1, 5, 5), (1, 3, 11), (3, 9, 4), (2, 2, 8))


@dataclass(frozen=True)
class Comparison:
    """The maps of a file and of its model for one size of the input.

    ``largest_difference`` and ``mean_difference`` are absolute; ``largest_value`` is that of the model's map.
    """

    batch: int
    height_px: int
    width_px: int
    traced: bool
    largest_difference: float
    mean_difference: float
    largest_value: float

    @property
    def share(self) -> float:
        """The largest difference as a share of the largest value."""
        return self.largest_difference / max(self.largest_value, 1e-12)


def sizes_to_compare(traced: InputSize, patch_px: int, short_side_px: int, *, dynamic: bool) -> list[InputSize]:
    """The traced size, and for a dynamic file six others."""
    if not dynamic:
        return [traced]
    own = max(2, round(short_side_px / patch_px))
    return [traced, *(InputSize(b, h * patch_px, w * patch_px) for b, h, w in (*_SIZES, (1, own, own)))]


def compare(
    run: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    sizes: Sequence[InputSize],
    dtype: torch.dtype,
) -> list[Comparison]:
    """Compare a file with its model; the first of ``sizes`` is the traced one.

    Args:
        run: The file, from and to ``dtype``.
        reference: The model, in float32.
        sizes: The sizes of the input.
        dtype: Of the file's input.
    """
    rows = []
    for index, size in enumerate(sizes):
        pixels = example(size, dtype, seed=index)
        with torch.no_grad():
            expected = reference(pixels.float())
        found = run(pixels).float()
        if found.shape != expected.shape:
            raise BrixelError(
                f"the file gives {tuple(found.shape)} for {size.shape}, the model {tuple(expected.shape)}"
            )
        difference = (found - expected).abs()
        worst = difference.nan_to_num(nan=torch.inf).max().item()
        rows.append(
            Comparison(
                *(size.batch, size.height_px, size.width_px, index == 0),
                *(worst, difference.mean().item(), expected.abs().max().item()),
            )
        )
    return rows


def check_parity(rows: Sequence[Comparison], dtype: torch.dtype) -> None:
    """Raise BrixelError where a difference is above the bound of the dtype."""
    bound = BOUNDS[dtype]
    worst = max(rows, key=lambda row: row.share)
    if not worst.share <= bound:
        raise BrixelError(
            f"the exported file differs from the model: by {worst.largest_difference:.3g} at "
            f"{worst.batch} x {worst.height_px} x {worst.width_px} px, where the largest value is "
            f"{worst.largest_value:.3g}; expected at most {bound:g} of that. It was not kept; verify=False keeps such "
            "a file"
        )


def as_record(rows: Sequence[Comparison], engine: str, dtype: torch.dtype) -> dict[str, Any]:
    """The comparison as it is stored with the file."""
    return {"engine": engine, "bound": BOUNDS[dtype], "sizes": [asdict(row) for row in rows]}


def as_table(record: Mapping[str, Any]) -> str:
    """What :func:`as_record` stores, as a Markdown table with a line about it."""
    header = ["images", "height x width, px", "largest difference", "mean", "largest value"]
    rows = [
        [
            str(row["batch"]),
            f"{row['height_px']} x {row['width_px']}" + (", traced" if row["traced"] else ""),
            f"{row['largest_difference']:.2g}",
            f"{row['mean_difference']:.2g}",
            f"{row['largest_value']:.3g}",
        ]
        for row in record["sizes"]
    ]
    lines = markdown_table(header, rows, numeric=[True] * len(header), pad=True)
    text = "\n".join(lines)
    return (
        f"{text}\n\n{record['engine']} against the model in float32; allowed: {record['bound']:g} of the largest value"
    )
