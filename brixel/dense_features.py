"""A student that takes pictures: any kind of them in, feature maps out, within a limit of memory."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from brixel.backbones.protocol import Backbone
from brixel.bounded import BoundedRun, check_host
from brixel.config import BrixelConfig
from brixel.devices import dtype_name
from brixel.engine import run_batches
from brixel.errors import BrixelError
from brixel.feature_map import FeatureMap
from brixel.geometry import NATIVE, Geometry, plan_geometry
from brixel.images import ImageInput, load_image, preprocess
from brixel.map_file import check_map_path, make_map_file
from brixel.memory_plan import Job, Plan
from brixel.modes import evaluating
from brixel.student import UPSCALE, Student
from brixel.ways import crop

PathLike = str | os.PathLike[str]


class DenseFeatures(Student):
    """A student with the config that says what it is; as a module as its base, on pictures by the methods below."""

    def __init__(self, backbone: Backbone, trainable: nn.ModuleDict, config: BrixelConfig) -> None:
        super().__init__(backbone, trainable["adapter"], trainable["head"], config.adapter.blocks)  # type: ignore[arg-type]
        self.config = config

    # ---------------------------------------------------------------- facts

    @property
    def embed_dim(self) -> int:
        """Channels of the maps, D."""
        return self.backbone.width

    @property
    def patch_px(self) -> int:
        """Side of a patch in pixels: H and W of the model's input must be multiples of it."""
        return self.backbone.patch_px

    @property
    def stride_px(self) -> float:
        """Distance between neighbouring cells of the dense map, in pixels of the model's input: a quarter patch."""
        return self.patch_px / UPSCALE

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.adapter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, and so the maps'."""
        return next(self.adapter.parameters()).dtype

    # ---------------------------------------------------------------- pictures

    def extract(
        self,
        image: ImageInput,
        *,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        out: PathLike | None = None,
    ) -> FeatureMap:
        """Dense features of one picture.

        ``image``: a path, PIL image, array (H, W, 3) or (H, W), or tensor (3, H, W). ``short_side_px``: the size that
        its short side is brought to, aspect kept; None for the size the adapter was trained on, "native" for its own.
        Then it is padded to whole patches, and the map cropped back to the picture.
        ``memory_limit``: bytes or text such as "4GiB" that bounds what is allocated on the model's device, weights
        included; None for what is free there, less a margin. ``tiles``: "auto" computes the map in blended tiles, an
        approximation, where nothing exact fits; or "never", or "always". ``out``: a `.npy` file, into which the map is
        written as it is made. See `docs/memory.md`.
        Returns a :class:`FeatureMap` on the CPU, (D, Hf, Wf). Raises ImageError for a picture that cannot be used,
        MemoryLimitError for one that does not fit.
        """
        run = BoundedRun(self, limit=memory_limit, tiles=tiles)
        if out is None:
            return next(self._stream(run, UPSCALE, [image], batch_size=1, short_side_px=short_side_px))
        path = check_map_path(out)
        pixels, geometry = self._prepare(image, self._side(short_side_px), lambda hw: run.check(hw, to_file=True))

        def fill(cells: Tensor) -> Mapping[str, str]:
            with evaluating(self):
                return self._meta(geometry, run.fill(pixels[None], cells))

        shape, stride = (self.embed_dim, *geometry.map_hw(UPSCALE)), geometry.map_stride(UPSCALE)
        return make_map_file(path, shape, self.dtype, fill, image_hw=geometry.image_hw, stride=stride)

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 1,
        short_side_px: int | str | None = None,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
    ) -> Iterator[FeatureMap]:
        """Dense features of many pictures, lazily and in order; see :meth:`extract`.

        Neighbours that come to one size share a batch of at most ``batch_size``. A picture that cannot be used raises
        ImageError after the maps of those before it.
        """
        run = BoundedRun(self, limit=memory_limit, tiles=tiles)
        return self._stream(run, UPSCALE, images, batch_size=batch_size, short_side_px=short_side_px)

    def plan(
        self,
        image_hw: tuple[int, int],
        *,
        batch: int = 1,
        memory_limit: int | str | None = None,
        tiles: str = "auto",
        short_side_px: int | str | None = NATIVE,
        to_file: bool = False,
    ) -> Plan:
        """How the maps of ``batch`` pictures of ``image_hw`` pixels would be computed, and the memory that takes.

        Nothing is computed. Arguments as for :meth:`extract`; ``to_file``: as with ``out``. Raises MemoryLimitError
        where it cannot be done.
        """
        geometry = plan_geometry(image_hw, self.patch_px, self._side(short_side_px))
        run = BoundedRun(self, limit=memory_limit, tiles=tiles)
        return run.plan(Job(batch, geometry.padded_hw, to_file))

    def extract_backbone(self, image: ImageInput, *, short_side_px: int | str | None = None) -> FeatureMap:
        """The frozen backbone's own map of the picture, prepared as in :meth:`extract`: what brixel starts from."""

        def forward(pixels: Tensor) -> Tensor:
            return self.backbone_features(pixels.to(self.device, self.dtype))

        return next(self._stream(forward, 1, [image], batch_size=1, short_side_px=short_side_px))

    def _stream(
        self,
        forward: Callable[[Tensor], Sequence[Tensor] | Tensor],
        upscale: int,
        images: Iterable[ImageInput],
        *,
        batch_size: int,
        short_side_px: int | str | None,
    ) -> Iterator[FeatureMap]:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BrixelError(f"batch_size is {batch_size!r}; expected a positive whole number")
        side = self._side(short_side_px)
        bounded = forward if isinstance(forward, BoundedRun) else None
        check = check_host if bounded is None else bounded.check

        def run(pixels: Tensor) -> Sequence[Tensor] | Tensor:
            with evaluating(self):
                return forward(pixels)

        prepared = (self._prepare(image, side, check) for image in images)
        results = run_batches(run, prepared, batch_size=batch_size)
        return (
            self._feature_map(features, geometry, upscale, "" if bounded is None else bounded.tiles_of(features))
            for features, geometry in results
        )

    def _side(self, short_side_px: int | str | None) -> int | str:
        return self.config.adapter.short_side_px if short_side_px is None else short_side_px

    def _feature_map(self, features: Tensor, geometry: Geometry, upscale: int, tiles: str) -> FeatureMap:
        """The cells (D, Hf, Wf) that cover the picture, out of those of the padded one."""
        cells = crop(features, geometry.map_hw(upscale))
        return FeatureMap(cells, geometry.image_hw, geometry.map_stride(upscale), self._meta(geometry, tiles))

    def _prepare(
        self, image: ImageInput, short_side_px: int | str, check: Callable[[tuple[int, int]], None]
    ) -> tuple[Tensor, Geometry]:
        """Normalised pixels (3, H, W) and how they lie; ``check`` may refuse their size before they are made."""
        planes = load_image(image)
        geometry = plan_geometry((planes.shape[1], planes.shape[2]), self.patch_px, short_side_px)
        check(geometry.padded_hw)
        vit = self.config.backbone.vit
        return preprocess(planes, geometry, vit.mean, vit.std), geometry

    def _meta(self, geometry: Geometry, tiles: str = "") -> Mapping[str, str]:
        """What made a map, kept in its file; ``tiles``: what it was put together from, if it was."""
        height, width = geometry.resized_hw
        facts = {
            "backbone": self.config.backbone.title,
            "resized_hw": f"{height}x{width}",
            "dtype": dtype_name(self.dtype),
            **({"tiles": tiles} if tiles else {}),
        }
        commits = ", ".join(f"{name}@{commit}" for name, commit in self.config.commits.items())
        return {**facts, "commits": commits} if commits else facts
