"""The public class: a backbone and its adapter from files, images in, feature maps out."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from brixel.backbones.base import Backbone, check_maps
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.hub_download import Access
from brixel.checkpoints.hub_upload import push
from brixel.checkpoints.locate_files import BUNDLED, locate, repositories_in
from brixel.checkpoints.model_folder import ADAPTER, CONFIG, read_config, save
from brixel.checkpoints.release_adapters import choose_release, read_release
from brixel.checkpoints.saved_backbone import (
    describe_loaded,
    load_from,
    match_module,
    move_module,
    resolve_backbone,
    wrap_module,
)
from brixel.checkpoints.weight_files import load_into, read_tensors, shapes_of
from brixel.images.find_images import SCENE
from brixel.images.load import ImageInput
from brixel.inference.comparison_panel import comparison_panel
from brixel.inference.dense_features import DenseFeatures
from brixel.model.config import AdapterConfig, BrixelConfig, default_blocks
from brixel.model.upsampler import Upsampler
from brixel.utils.devices import choose_device, choose_dtype

PathLike = str | os.PathLike[str]
_PATCHES_ON_SHORT_SIDE = 16  # what fresh adapters are made for: 256 px at patch 16, 224 px at patch 14


class BrixelFeatures(DenseFeatures):
    """Dense features of images: a frozen ViT with a distilled adapter, four cells to a patch on each axis.

    Built by :meth:`from_pretrained`, :meth:`from_backbone` or :meth:`from_release`. As a module it takes normalised
    pixels (B, 3, H, W) and gives (B, D, 4h, 4w); :meth:`extract` and :meth:`stream` take images of any kind.
    Method: arXiv 2511.05168.
    """

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
            vit = match_module(config.backbone, backbone)
            device, dtype = move_module(backbone, device, dtype)
        else:
            device = choose_device(device)
            dtype = choose_dtype(dtype, device)
            vit, config = resolve_backbone(place, config, backbone, dtype, access)
        what = f"{path} does not fit an adapter for {config.backbone.title}"
        with place.reading():
            upsampler = load_into(lambda: Upsampler(vit.width, config.adapter), read_tensors(path), dtype, what=what)
        config = dataclasses.replace(config, commits={**config.commits, **place.commits})
        if place.snapshot:  # paths of another machine would be followed once the model is saved on this one
            own = dataclasses.replace(config.backbone, sources=repositories_in(config.backbone.sources))
            config = dataclasses.replace(config, backbone=own)
        return cls(vit, upsampler, config).to(device)

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
        `transformers` (with ``mean`` and ``std``) or timm, or your own, as :class:`brixel.backbones.base.Backbone`
        says; it is frozen, put in evaluation mode, and stays on its device and in its dtype where these are "auto".
        ``revision`` to ``local_files_only``: as in :meth:`from_pretrained`.
        ``architecture``: a name such as "dinov3-vits16" or a :class:`ViTConfig`; needed only where a file leaves it
        open. ``blocks``: the four blocks, from 0, that feed the adapter; by depth where None. ``short_side_px``: the
        size that :meth:`extract` brings images to, 16 patches where None. ``vit_fields``: any field of
        :class:`ViTConfig`, over what the file's family implies (`rope_rounding`, `position_antialias`, `mean`, ...).
        """
        if isinstance(name_or_path, nn.Module):
            of_files = {"revision": revision, "token": token, "cache_dir": cache_dir, "architecture": architecture}
            fields = {**of_files, "local_files_only": local_files_only, **vit_fields}
            vit, described = wrap_module(name_or_path, fields)
            device, dtype = move_module(name_or_path, device, dtype)
            adapter = _fresh(vit, blocks, short_side_px)
            upsampler = Upsampler(vit.width, adapter).to(device, dtype)
            check_maps(vit, adapter.blocks, device, dtype)
            return cls(vit, upsampler, BrixelConfig(described, adapter))
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        access = _access(token, cache_dir, local_files_only)
        place = locate(name_or_path, what="backbone", revision=revision, access=access)
        loaded = load_from(place, architecture, dtype, vit_fields)
        adapter = _fresh(loaded.vit, blocks, short_side_px)
        upsampler = Upsampler(loaded.vit.width, adapter).to(dtype)
        config = BrixelConfig(describe_loaded(loaded, place), adapter, place.commits)
        return cls(loaded.vit, upsampler, config).to(device)

    @classmethod
    def from_release(
        cls,
        adapter_pth: PathLike,
        backbone: PathLike | None = None,
        *,
        release: str | None = None,
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
        """The authors' own adapter file on its backbone.

        ``adapter_pth``: a `.pth` of the release, on disk. ``release``: which of its five files that is, "vits16-256",
        "vitb16-256", "vitl16-256", "vith16plus-256" or "vitb16-480"; that says its backbone and the size of its
        images where you do not. ``backbone`` and all others: as in :meth:`from_backbone`, ``short_side_px`` 256.
        Raises CheckpointError where the file lacks a tensor, has another shape, or holds a key that nobody knows.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        adapter_path = locate(adapter_pth, what="adapter").path
        backbone, architecture, side = choose_release(adapter_path, release, backbone, architecture, short_side_px)
        access = _access(token, cache_dir, local_files_only)
        place = locate(backbone, what="backbone", revision=revision, access=access)
        loaded = load_from(place, architecture, dtype, vit_fields)
        adapter = AdapterConfig(_blocks(blocks, loaded.vit), residual_detour=True, short_side_px=side)
        told = {"adapter": f"{adapter_path.name} of the authors of arXiv 2511.05168, as they trained it"}
        config = BrixelConfig(describe_loaded(loaded, place), adapter, place.commits, told)
        what = f"{adapter_path} does not fit an adapter for {config.backbone.title}"

        def build() -> Upsampler:
            return Upsampler(loaded.vit.width, adapter)

        upsampler = load_into(build, read_release(adapter_path, shapes_of(build), what=what), dtype, what=what)
        return cls(loaded.vit, upsampler, config).to(device)

    def save_pretrained(self, folder: PathLike, *, include_backbone: bool = False) -> None:
        """Write `config.json`, `adapter.safetensors`, the card `README.md` (and `backbone.safetensors`) into a folder.

        It is made if need be; each file is written whole or not at all, `config.json` last. A card that you changed
        stays. Without the backbone, the folder says which one it needs and where that was; its licence may forbid to
        hand it on. A backbone that came as a module cannot be included, as its code cannot.
        """
        save(self, self.config, Path(folder), include_backbone=include_backbone)

    def push_to_hub(
        self,
        repository: str,
        *,
        include_backbone: bool = False,
        image: ImageInput = SCENE,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str = "Model made with brixel",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, with a panel of ``image`` on its card; "ORG/NAME@COMMIT".

        ``repository``: ORG/NAME, made if need be, ``private`` where so asked. One commit, or none. Sources of the
        backbone that are paths of this machine are left out of the config; ``include_backbone`` uploads its weights,
        for which its licence must allow it. A card that was changed there is left as it is.
        Raises UploadError where the Hub does not take it, BrixelError where the model would not load from there.
        """
        return push(
            self,
            self.config,
            repository,
            lambda: comparison_panel(self, [image]),
            include_backbone=include_backbone,
            private=private,
            token=token,
            message=message,
        )


def _fresh(vit: Backbone, blocks: Iterable[int] | None, short_side_px: int | None) -> AdapterConfig:
    side = _PATCHES_ON_SHORT_SIDE * vit.patch_px if short_side_px is None else short_side_px
    return AdapterConfig(_blocks(blocks, vit), residual_detour=False, short_side_px=side, blend=True)


def _blocks(blocks: Iterable[int] | None, vit: Backbone) -> tuple[int, ...]:
    """What the user gave, as it is: :class:`AdapterConfig` checks it and makes a tuple of it."""
    return default_blocks(vit.depth) if blocks is None else cast("tuple[int, ...]", blocks)


def _access(token: str | bool | None, cache_dir: PathLike | None, local_files_only: bool) -> Access:
    return Access(token, None if cache_dir is None else Path(cache_dir).expanduser(), local_files_only)
