"""Sources of dense features: student, interpolated backbone, teacher, or any function, all evaluated by the same code.

Every source starts from one square crop of T pixels: with ``scale`` 4 it sees all of them, with ``scale`` 1 an image of
a quarter of the side, as the student does.

Shapes: B batch, D channels, h x w cells; T the crop's side and S = T / 4 the small image's, in pixels.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brixel.backbones.vit_config import IMAGENET_MEAN, IMAGENET_STD
from brixel.brixel_features import BrixelFeatures
from brixel.checkpoints.bundled_universal import load_universal
from brixel.checkpoints.fingerprint import digest
from brixel.errors import BrixelError
from brixel.evaluate.cost.timing import flops_of, seconds_of
from brixel.images.crops import DOWNSAMPLING, check_teacher_px, normalised, student_view
from brixel.model.student import Student
from brixel.model.upsampler import UPSCALE, GuidedUpsampler
from brixel.utils.devices import dtype_name
from brixel.utils.eval_mode import evaluation_mode
from brixel.utils.fields import check_field, check_names, one_of, optional

STUDENT, UNIVERSAL, TEACHER = "student", "universal", "teacher"
BASE = "bilinear"  # other sources are compared with it
INTERPOLATED = ("nearest", "bilinear", "bicubic")
SOURCES = (*INTERPOLATED, UNIVERSAL, STUDENT, TEACHER)


@dataclass(frozen=True)
class FeatureSource:
    """A function from normalised pixels to dense features, with what is needed to call it.

    Args:
        name: For reports.
        maps: From pixels (B, 3, H, W) to maps (B, D, h, w) of any grid.
        patch_px: H and W are multiples of it.
        mean: Mean of the normalisation, by channel.
        std: Standard deviation of the normalisation, by channel.
        scale: 1 for a source of the small image, 4 for one of the large.
        resize: "nearest", "bilinear" or "bicubic" interpolates the map to four cells per patch; None leaves it.
        identity: A text that differs for all other features; under it they are kept on disk. Empty: they are not.
        device: Where ``maps`` computes, for timing.

    Raises:
        BrixelError: ``scale`` or ``resize`` is none of these.
    """

    name: str
    maps: Callable[[Tensor], Tensor]
    patch_px: int
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    scale: int = 1
    resize: str | None = None
    identity: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.scale not in (1, DOWNSAMPLING):
            raise BrixelError(f"scale of source {self.name!r} is {self.scale!r}; expected 1 (small image) or 4 (large)")
        check_field(f"resize of source {self.name!r}", self.resize, optional(one_of(*INTERPOLATED)))

    @property
    def key(self) -> object:
        """Equal for sources whose maps are the same before interpolation."""
        return (self.identity, self.scale) if self.identity else self

    def features(self, crops: Tensor) -> Tensor:
        """Dense maps of crops, square or not.

        Args:
            crops: (B, 3, T, T), RGB in [0, 1]; both sides four whole patches.

        Returns:
            (B, D, h, w), float32 on the CPU.

        Raises:
            BrixelError: T is not a multiple of four patches, or ``maps`` gave something other than finite maps.
        """
        return self.finish(self.raw(crops))

    def row(self, model: str, teacher_px: int) -> dict[str, Any]:
        """The start of a report's row: ``SOURCE_COLUMNS``."""
        return {"model": model, "image_px": teacher_px * self.scale // DOWNSAMPLING, "source": self.name}

    def raw(self, crops: Tensor) -> Tensor:
        """Compute the maps before interpolation, which are what is cached.

        Args:
            crops: (B, 3, T, T), RGB in [0, 1].

        Returns:
            (B, D, h, w), float32 on the CPU.

        Raises:
            BrixelError: T does not fit the patch size, or the source gives another shape or values that are not finite.
        """
        for side_px in crops.shape[-2:]:
            check_teacher_px(side_px, self.patch_px)
        seen = crops.clamp(0, 1) if self.scale == DOWNSAMPLING else student_view(crops)
        with torch.no_grad():
            found = self.maps(normalised(seen, self.mean, self.std))
        if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != len(crops):
            gave = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise BrixelError(f"source {self.name!r} gave {gave}; expected a tensor ({len(crops)}, D, h, w)")
        maps = found.float().cpu()
        if not maps.isfinite().all():
            raise BrixelError(f"source {self.name!r} gave features that are not finite; they cannot be evaluated")
        return maps

    def finish(self, raw: Tensor) -> Tensor:
        """Interpolate the maps of :meth:`raw` if the source asks for it.

        Args:
            raw: (B, D, h, w).

        Returns:
            (B, D, 4h, 4w) for interpolated sources, ``raw`` for others.
        """
        if self.resize is None:
            return raw
        corners = None if self.resize == "nearest" else False
        return F.interpolate(raw, scale_factor=UPSCALE, mode=self.resize, align_corners=corners)


def check_source_names(sources: Sequence[FeatureSource]) -> None:
    """Raise BrixelError where two sources have the same name: results are kept by name."""
    names = [source.name for source in sources]
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise BrixelError(f"two sources are named {repeated[0]!r}; give each a name of its own")


def features_by_name(sources: Sequence[FeatureSource], crops: Tensor) -> dict[str, Tensor]:
    """Dense maps (B, D, h, w) of crops (B, 3, T, T) by source; maps that several sources interpolate are shared."""
    check_source_names(sources)
    distinct = {source.key: source for source in sources}
    raw = {key: source.raw(crops) for key, source in distinct.items()}
    return {source.name: source.finish(raw[source.key]) for source in sources}


def sources_of(model: BrixelFeatures, names: Sequence[str] = SOURCES) -> list[FeatureSource]:
    """The feature sources of a model.

    Args:
        model: The model.
        names: "nearest", "bilinear", "bicubic" (the backbone's own map, interpolated), "universal" (upsampled by the
            universal upsampler of the package), "student" (the dense map), or "teacher" (the backbone on the large
            image).

    Returns:
        A source per name.

    Raises:
        BrixelError: A name is unknown.
    """
    check_names(names, SOURCES, "unknown source")
    return [_source(model, name) for name in names]


def _source(model: BrixelFeatures, name: str) -> FeatureSource:
    vit, described = model.config.backbone.vit, model.config.backbone
    identity = f"{described.title} {list(described.fingerprint)} {dtype_name(model.dtype)}"
    if name == STUDENT:
        identity = f"{identity} adapter {digest(model.upsampler.children())}"
    call = model if name == STUDENT else model.backbone_features
    if name == UNIVERSAL:
        guided = GuidedUpsampler(vit.mean, vit.std)
        guided.universal = load_universal(model.dtype).to(model.device)
        identity = f"{identity} universal {digest([guided.universal])}"
        call = Student(model.backbone, guided, model.blocks[-1:])

    def maps(pixels: Tensor) -> Tensor:
        with evaluation_mode(model):
            return call(pixels.to(model.device, model.dtype))

    scale = DOWNSAMPLING if name == TEACHER else 1
    resize = name if name in INTERPOLATED else None
    return FeatureSource(name, maps, model.patch_px, vit.mean, vit.std, scale, resize, identity, str(model.device))


def cost_of(source: FeatureSource, teacher_px: int, rounds: int = 5) -> dict[str, float]:
    """GFLOP and the median time in ms for one crop of T pixels of noise, on the source's own device."""
    side = teacher_px * source.scale // DOWNSAMPLING
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def call() -> Tensor:
        return source.finish(source.maps(pixels))

    with torch.no_grad():
        flops = flops_of(call)  # a warm-up as well
        seconds = statistics.median(seconds_of(call, torch.device(source.device)) for _ in range(rounds))
    return {"gflop": flops / 1e9, "ms": seconds * 1e3}
