"""The public class: a backbone and its adapter from files, pictures in, feature maps out."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from brixel.backbones.protocol import Backbone, check_maps
from brixel.backbones.vit_config import ForeignConfig, ViTConfig
from brixel.bounded import BoundedRun, check_host
from brixel.checkpoints import fit, read_tensors, shapes_of, write_tensors
from brixel.config import ADAPTER, BACKBONE, CONFIG, BrixelConfig, read_config, write_config
from brixel.devices import choose_device, choose_dtype, dtype_name
from brixel.engine import run_batches
from brixel.errors import BrixelError
from brixel.feature_map import FeatureMap
from brixel.file_backbone import describe_loaded, find_again, load_from
from brixel.geometry import NATIVE, Geometry, plan_geometry
from brixel.hub import Access
from brixel.images import ImageInput, load_image, preprocess
from brixel.map_file import check_map_path, make_map_file
from brixel.memory_plan import Job, Plan
from brixel.modes import evaluating
from brixel.module_backbone import bring, same_as, take_in
from brixel.release import read_release
from brixel.sources import BUNDLED, locate, repositories_in
from brixel.student import UPSCALE, AdapterConfig, Student, default_blocks, new_trainable
from brixel.ways import crop

PathLike = str | os.PathLike[str]
_PATCHES_ON_SHORT_SIDE = 16  # what fresh adapters are made for: 256 px at patch 16, 224 px at patch 14
_RELEASE_SHORT_SIDE_PX = 256


class BrixelFeatures(Student):
    """Dense features of pictures: a frozen ViT with a distilled adapter, four cells to a patch on each axis.

    Built by :meth:`from_pretrained`, :meth:`from_backbone` or :meth:`from_release`. As a module it takes normalised
    pixels (B, 3, H, W) and gives (B, D, 4h, 4w); :meth:`extract` and :meth:`stream` take pictures of any kind.
    Method: arXiv 2511.05168.
    """

    def __init__(self, backbone: Backbone, trainable: nn.ModuleDict, config: BrixelConfig) -> None:
        super().__init__(backbone, trainable["adapter"], trainable["head"], config.adapter.blocks)  # type: ignore[arg-type]
        self.config = config

    # ---------------------------------------------------------------- from files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: PathLike = BUNDLED,
        *,
        backbone: PathLike | nn.Module | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> "BrixelFeatures":
        """Load a model that :meth:`save_pretrained` wrote, or the one that comes with the package.

        ``name_or_path``: a folder, or a repository on the Hub as a string, "ORG/NAME" or "ORG/NAME@REVISION";
        "brixel-tiny", also where nothing is given, is the small model inside the package
        (5 M parameters, Apache-2.0, no download; `docs/brixel-tiny.md` tells what it is good for and what not).
        ``backbone``: its backbone, as in :meth:`from_backbone`, if it is not where the model's config says; needed
        where the model was made on a module.
        ``device``: "auto" takes CUDA, then MPS, then the CPU. ``dtype``: "auto" is bfloat16 on CUDA devices that
        compute in it, else float32. Of downloads: ``revision`` of the model is a branch, tag or commit, of which the
        last needs no request once it is cached; ``token`` is another than that of `hf auth login`; ``cache_dir`` is the
        client's cache; ``local_files_only`` takes files from there alone.
        Raises BrixelError where there is no such folder, DownloadError where something cannot be had from the Hub,
        CheckpointError where files do not fit.
        """
        access = _access(token, cache_dir, local_files_only)
        place = locate(name_or_path, what="model", revision=revision, access=access)
        config = read_config(place.need(CONFIG))
        path = place.need(ADAPTER)
        if isinstance(backbone, nn.Module):
            vit, commits = same_as(config.backbone, backbone), config.commits
            device, dtype = bring(backbone, device, dtype)
        else:
            device = choose_device(device)
            dtype = choose_dtype(dtype, device)
            vit, commits = find_again(place, config, backbone, dtype, access)
        what = f"{path} does not fit an adapter for {config.backbone.title}"
        with place.reading():
            trainable = fit(lambda: new_trainable(vit.width, config.adapter), read_tensors(path), dtype, what=what)
        config = dataclasses.replace(config, commits={**commits, **place.commits})
        if place.snapshot:  # paths of another machine would be followed once the model is saved on this one
            own = dataclasses.replace(config.backbone, sources=repositories_in(config.backbone.sources))
            config = dataclasses.replace(config, backbone=own)
        return cls(vit, trainable, config).to(device)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: PathLike | nn.Module,
        *,
        architecture: str | ViTConfig | None = None,
        blocks: Iterable[int] | None = None,
        short_side_px: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        **vit_fields: object,
    ) -> "BrixelFeatures":
        """A backbone with a fresh adapter, which starts as the identity: the backbone's map, upsampled.

        ``name_or_path``: a folder in Hugging Face or timm layout, ORG/NAME of a repository of either on the Hub, a name
        of :func:`brixel.list_models`, or a weight file (Meta's `.pth`, safetensors). Or a module: a model of
        `transformers` (with ``mean`` and ``std``) or timm, or your own, as :class:`brixel.backbones.protocol.Backbone`
        says; it is frozen, put in evaluation mode, and stays on its device and in its dtype where these are "auto".
        ``revision`` to ``local_files_only``: as in :meth:`from_pretrained`.
        ``architecture``: a name such as "dinov3-vits16" or a :class:`ViTConfig`; needed only where a file leaves it
        open. ``blocks``: the four blocks, from 0, that feed the adapter; by depth where None. ``short_side_px``: the
        size that :meth:`extract` brings pictures to, 16 patches where None. ``vit_fields``: any field of
        :class:`ViTConfig`, over what the file's family implies (`rope_rounding`, `position_antialias`, `mean`, ...).
        """
        if isinstance(name_or_path, nn.Module):
            of_files = {"revision": revision, "token": token, "cache_dir": cache_dir, "architecture": architecture}
            fields = {**of_files, "local_files_only": local_files_only, **vit_fields}
            vit, described = take_in(name_or_path, fields)
            device, dtype = bring(name_or_path, device, dtype)
            adapter = _fresh(vit, blocks, short_side_px)
            trainable = new_trainable(vit.width, adapter).to(device, dtype)
            check_maps(vit, adapter.blocks, device, dtype)
            return cls(vit, trainable, BrixelConfig(described, adapter))
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        access = _access(token, cache_dir, local_files_only)
        place = locate(name_or_path, what="backbone", revision=revision, access=access)
        loaded = load_from(place, architecture, dtype, vit_fields)
        adapter = _fresh(loaded.vit, blocks, short_side_px)
        trainable = new_trainable(loaded.vit.width, adapter).to(dtype)
        config = BrixelConfig(describe_loaded(loaded, place), adapter, place.commits)
        return cls(loaded.vit, trainable, config).to(device)

    @classmethod
    def from_release(
        cls,
        adapter_pth: PathLike,
        backbone: PathLike,
        *,
        architecture: str | ViTConfig | None = None,
        blocks: Iterable[int] | None = None,
        short_side_px: int = _RELEASE_SHORT_SIDE_PX,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        **vit_fields: object,
    ) -> "BrixelFeatures":
        """The authors' own adapter file on its backbone.

        ``adapter_pth``: a `.pth` of the release, on disk. ``backbone`` and all others: as in :meth:`from_backbone`.
        ``short_side_px``: 256 for four of the released files, 480 for the denser ViT-B.
        Raises CheckpointError where the file lacks a tensor, has another shape, or holds a key that nobody knows.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        adapter_path = locate(adapter_pth, what="adapter").path
        access = _access(token, cache_dir, local_files_only)
        place = locate(backbone, what="backbone", revision=revision, access=access)
        loaded = load_from(place, architecture, dtype, vit_fields)
        adapter = AdapterConfig(_blocks(blocks, loaded.vit), residual_detour=True, short_side_px=short_side_px)
        config = BrixelConfig(describe_loaded(loaded, place), adapter, place.commits)
        what = f"{adapter_path} does not fit an adapter for {config.backbone.title}"

        def build() -> nn.ModuleDict:
            return new_trainable(loaded.vit.width, adapter)

        trainable = fit(build, read_release(adapter_path, shapes_of(build), what=what), dtype, what=what)
        return cls(loaded.vit, trainable, config).to(device)

    def save_pretrained(self, folder: PathLike, *, include_backbone: bool = False) -> None:
        """Write `config.json` and `adapter.safetensors` (and `backbone.safetensors`) into a folder, made if need be.

        Each file is written whole or not at all; `config.json` comes last. Without the backbone, the folder says which
        one it needs and where that was; its licence may forbid to hand it on. A backbone that came as a module cannot
        be included, as its code cannot.
        """
        if include_backbone and isinstance(self.config.backbone.vit, ForeignConfig):
            raise BrixelError(
                f"the backbone is a module of your own program, {self.config.backbone.title}, and cannot be written "
                "along: save without include_backbone, and load with from_pretrained(folder, backbone=module)"
            )
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise BrixelError(f"{target} is a file; expected a folder to write a model into")
        target.mkdir(parents=True, exist_ok=True)
        write_tensors(target / ADAPTER, nn.ModuleDict({"adapter": self.adapter, "head": self.head}).state_dict())
        if include_backbone:
            write_tensors(target / BACKBONE, self.backbone.state_dict())
        else:
            (target / BACKBONE).unlink(missing_ok=True)  # of a model that was here before
        write_config(target / CONFIG, self.config)

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


def _fresh(vit: Backbone, blocks: Iterable[int] | None, short_side_px: int | None) -> AdapterConfig:
    side = _PATCHES_ON_SHORT_SIDE * vit.patch_px if short_side_px is None else short_side_px
    return AdapterConfig(_blocks(blocks, vit), residual_detour=False, short_side_px=side, blend=True)


def _blocks(blocks: Iterable[int] | None, vit: Backbone) -> tuple[int, ...]:
    """What the user gave, as it is: :class:`AdapterConfig` checks it and makes a tuple of it."""
    return default_blocks(vit.depth) if blocks is None else cast("tuple[int, ...]", blocks)


def _access(token: str | bool | None, cache_dir: PathLike | None, local_files_only: bool) -> Access:
    return Access(token, None if cache_dir is None else Path(cache_dir).expanduser(), local_files_only)
