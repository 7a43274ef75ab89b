"""A basis of few directions for the channels of feature maps: fitted by uncentred PCA, projected onto, and back.

The fit is that of a truncated singular value decomposition: the mean is not subtracted. So the cosine of two projected
cells is that of what the basis keeps of them, and similarities are computed on reduced maps as on whole ones. After
centring, cosines would be others (`docs/results/reduction.md` compares both).

Shapes: D channels, k directions; cells along any further axes.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from brixel.errors import BrixelError
from brixel.feature_maps.pca import check_cells, directions_by_variance, sample_cells
from brixel.feature_maps.storage import check_version
from brixel.utils.atomic_files import atomic_path
from brixel.utils.fields import check_table, number, one_of, text
from brixel.utils.safetensors_files import open_safetensors
from brixel.utils.structured_files import checking_content, parse_json
from brixel.utils.tensor_kinds import not_plain
from brixel.utils.torch_defaults import plain_defaults

VERSION_KEY, VERSION = "brixel_reduction", "1"
_RULES = {
    **{VERSION_KEY: one_of(VERSION), "reduce": text(), "backbone": text(empty=True)},
    "kept_variance": number(),
}
_VALUES_AT_ONCE = 2**22  # that are converted to float32 at a time
_DIGEST_LETTERS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelBasis:
    """Orthonormal directions of features, in order of falling mean square.

    Args:
        components: (k, D), float32 on the CPU.
        kept_variance: The share of the variance around the mean that is left after projection, of the cells of the fit.
        backbone: What made the maps of the fit, as their ``meta`` says; "" where they say nothing.

    Raises:
        BrixelError: The components have another shape or dtype, or are not finite.
    """

    components: Tensor
    kept_variance: float = 0.0
    backbone: str = ""

    def __post_init__(self) -> None:
        components = self.components
        if not isinstance(components, Tensor) or not_plain(components) or components.ndim != 2:
            given = tuple(components.shape) if isinstance(components, Tensor) else type(components).__name__
            raise BrixelError(f"the components of a basis are {given}; expected a tensor (k, D)")
        count, embed_dim = components.shape
        if not 1 <= count <= embed_dim or components.dtype != torch.float32 or not components.isfinite().all():
            raise BrixelError(
                f"the components of a basis are {tuple(components.shape)} {components.dtype}; expected (k, D) with k "
                "from 1 to D, float32 and finite"
            )

    @functools.cached_property
    def digest(self) -> str:
        """A short sha256 of the components, by which maps name their basis."""
        content = self.components.detach().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(str(tuple(self.components.shape)).encode() + content).hexdigest()[:_DIGEST_LETTERS]

    def project(self, features: Tensor) -> Tensor:
        """The coordinates of cells (D, ...) in the basis: (k, ...), in their dtype, computed in float32 or wider."""
        self._check(features, 1, "channels")
        return _apply(self.components, features)

    def restored(self, features: Tensor) -> Tensor:
        """The cells (D, ...) whose coordinates are (k, ...): the part of the original cells that the basis keeps."""
        self._check(features, 0, "components")
        return _apply(self.components.T, features)

    def _check(self, features: Tensor, axis: int, what: str) -> None:
        if features.shape[0] != self.components.shape[axis]:
            raise BrixelError(
                f"the features have {features.shape[0]} channels, and the basis {self.components.shape[axis]} {what}; "
                "use a basis that was fitted to maps of the same model"
            )

    def save(self, path: Path, spec: str) -> None:
        """Write the basis, and the reduction that it belongs to, completely or not at all."""
        fields = {"reduce": spec, "backbone": self.backbone, "kept_variance": self.kept_variance}
        with atomic_path(path, durable=True) as temporary:
            metadata = {VERSION_KEY: json.dumps({VERSION_KEY: VERSION, **fields})}
            save_file({"components": self.components.contiguous()}, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> tuple["ChannelBasis", str]:
        """Read what :meth:`save` wrote: the basis, and the reduction that it belongs to."""
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            header = parse_json(metadata[VERSION_KEY], path) if VERSION_KEY in metadata else None
            check_version(path, header, VERSION_KEY, (VERSION,))
            with checking_content(path, "a reduction of brixel", "fit it again"):
                fields = check_table("the description", header, _RULES)
                return cls(file.get_tensor("components"), fields["kept_variance"], fields["backbone"]), fields["reduce"]


class BasisFit:
    """Sums over the cells of maps, from which a basis is fitted; in float64, of one size however many maps there are.

    At most 16,384 cells of a map count, drawn with a fixed seed.
    """

    def __init__(self) -> None:
        self._cells = 0
        self._sum = self._moment = torch.zeros(0, dtype=torch.float64)

    @plain_defaults()
    def add(self, features: Tensor) -> None:
        """Count the cells of a map (D, Hf, Wf)."""
        first = features.shape[0] if self._cells == 0 else len(self._sum)
        check_cells(features, "a map of the sample", first, "the first one")
        cells = sample_cells([features])  # (D, K)
        total, moment = cells.sum(1), cells @ cells.T
        self._sum, self._moment = (total, moment) if self._cells == 0 else (self._sum + total, self._moment + moment)
        self._cells += cells.shape[1]

    @plain_defaults()
    def basis(self, count: int, backbone: str = "") -> ChannelBasis:
        """The directions of largest mean square.

        Raises:
            BrixelError: There are fewer channels or cells than ``count``.
        """
        if not self._cells:
            raise BrixelError("no maps to fit a basis to; give a sample of them")
        if count > min(len(self._sum), self._cells):
            raise BrixelError(
                f"{count} components of {self._cells} cells with {len(self._sum)} channels; expected at most as many "
                "as there are of either: ask for fewer, or fit to more images"
            )
        values, directions = directions_by_variance(self._moment / self._cells)
        variance = values.sum() - (self._sum / self._cells).square().sum()
        lost = values[count:].clamp_min(0).sum() / variance.clamp_min(torch.finfo(torch.float64).tiny)
        kept = float(1 - lost.clamp(0, 1))
        return ChannelBasis(directions[:count].float().contiguous(), kept, backbone)


def _apply(matrix: Tensor, features: Tensor) -> Tensor:
    """The product of a matrix (m, n) with cells (n, ...): (m, ...), some rows at a time."""
    wide = torch.promote_types(features.dtype, torch.float32)
    matrix = matrix.to(features.device, wide)
    out = features.new_empty((len(matrix), *features.shape[1:]))
    if out.numel():
        rows = max(1, _VALUES_AT_ONCE // max(1, features[:, 0].numel()))
        for source, target in zip(features.split(rows, 1), out.split(rows, 1), strict=True):
            target.copy_((matrix @ source.to(wide).flatten(1)).view(target.shape))
    return out
