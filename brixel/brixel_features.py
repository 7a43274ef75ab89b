"""The public class: a backbone and its upsampler from files, images in, feature maps out."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn

from brixel.backbones.base import Backbone, check_maps
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints.bundled_universal import load_universal
from brixel.checkpoints.hub_download import Access, portable_sources
from brixel.checkpoints.hub_upload import push
from brixel.checkpoints.locate_files import DEFAULT, locate
from brixel.checkpoints.model_folder import ADAPTER, CONFIG, FLOAT, read_config, save
from brixel.checkpoints.release_adapters import check_width, choose_release, our_names, read_release
from brixel.checkpoints.saved_backbone import match_module, move_module, read_backbone, resolve_backbone, wrap_module
from brixel.checkpoints.weight_files import load_into, read_tensors, shapes_of
from brixel.errors import BrixelError
from brixel.images.find_images import SCENE
from brixel.images.load import ImageInput
from brixel.inference.comparison_panel import comparison_panel
from brixel.inference.dense_features import DenseFeatures
from brixel.inference.export.export import Export, export_model
from brixel.model.config import (
    BILINEAR,
    TRAINED,
    UNIVERSAL,
    AdapterConfig,
    BackboneConfig,
    BrixelConfig,
    default_blocks,
)
from brixel.model.upsampler import AnyUpsampler, Upsampler, WithUniversal, make_upsampler
from brixel.utils.devices import choose_device, choose_dtype
from brixel.utils.fields import boolean, check_field, number, one_of, optional, path_like

PathLike = str | os.PathLike[str]
FRESH = "fresh"
_PATCHES_ON_SHORT_SIDE = 16  # where no training says: 256 px at patch 16, 224 px at patch 14


class BrixelFeatures(DenseFeatures):
    """Dense features of images: a frozen ViT and a distilled adapter that gives four cells per patch on each axis.

    Created by :meth:`from_pretrained`, :meth:`from_backbone` or :meth:`from_release`. As a module it maps normalised
    pixels (B, 3, H, W) to features (B, D, 4h, 4w) for the patch grid h x w; :meth:`extract` and :meth:`stream` take
    images of any kind. Method: arXiv 2511.05168.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: PathLike = DEFAULT,
        *,
        backbone: PathLike | nn.Module | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> "BrixelFeatures":
        """Load a model that :meth:`save_pretrained` wrote, or the one in the package.

        Args:
            name_or_path: A folder; a repository on the Hub, as a string "ORG/NAME" or "ORG/NAME@REVISION"; or
                a model in the package: "brixel-small", the default (DINOv2-S with an adapter, `docs/brixel-small.md`),
                or "brixel-tiny" (6.5 M parameters, `docs/brixel-tiny.md`), both under Apache-2.0.
            backbone: The model's backbone, as in :meth:`from_backbone`, where it is not at the sources that the model's
                config names; required for a model that was made on a module.
            device: Such as "cpu" or "cuda:1"; "auto" is CUDA, then MPS, then the CPU.
            dtype: Of the weights; "auto" is bfloat16 on CUDA devices that compute in it, else float32.
            revision: Branch, tag or commit of the repository; a commit needs no request once it is cached. An error
                where anything but a repository is named.
            token: Access token for the Hub in place of that of `hf auth login`; False for none.
            cache_dir: Cache of the Hub's client in place of its default.
            local_files_only: Whether files are only taken from the cache.

        Returns:
            The model on ``device``, in evaluation mode.

        Raises:
            BrixelError: There is no such folder or name.
            DownloadError: The Hub does not give a file.
            CheckpointError: The files do not fit the model, or the backbone has other weights than the adapter needs.
        """
        access = _access(token, cache_dir, local_files_only)
        files = locate(name_or_path, what="model", revision=revision, access=access)
        config = read_config(files.need(CONFIG))
        path = files.need(ADAPTER)
        with files.reading():
            tensors = read_tensors(path)  # before anything is fetched for it
        vit: Backbone
        if isinstance(backbone, nn.Module):
            vit = match_module(config.backbone, backbone)
            device, dtype = move_module(backbone, device, dtype)
        else:
            device = choose_device(device)
            dtype = choose_dtype(dtype, device)
            vit, config = resolve_backbone(files, config, backbone, dtype, access)
        what = f"{path} does not fit an adapter for {config.backbone.title}"
        with files.reading():
            upsampler = load_into(
                lambda: make_upsampler(config.backbone.vit, config.adapter), tensors, dtype, what=what
            )
        config = dataclasses.replace(config, commits={**config.commits, **files.commits})
        if files.snapshot:  # once saved here, the config must not name paths of the machine that it came from
            config = config.with_sources(portable_sources(config.backbone.sources))
        return cls(vit, upsampler, config).to(device)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: PathLike | nn.Module,
        *,
        adapter: str = UNIVERSAL,
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
        """Put an adapter on a backbone that needs no training for it, or one to be trained.

        Args:
            name_or_path: A name or an alias in :func:`brixel.list_models`, such as "dinov2-small" or "brixel-tiny",
                whose repositories are tried in order; a repository on the Hub, as a string "ORG/NAME" or
                "ORG/NAME@REVISION"; a folder in Hugging Face's or timm's layout; a weight file (Meta's `.pth`,
                safetensors, a checkpoint of a training); or a module: a model of `transformers` or torch.hub (with
                ``mean`` and ``std``) or timm, or your own, see :class:`brixel.backbones.base.Backbone`. A path on disk
                takes precedence over a name. A module is taken out of wrappers such as torch.compile's, frozen and put
                in evaluation mode; "auto" keeps its device and dtype.
            adapter: "universal", the upsampler in the package that sharpens the features of any backbone along the
                outlines in the image (`docs/universal.md`); "bilinear" interpolation; or "fresh", an untrained adapter
                for :mod:`brixel.train`, which starts as the universal one.
            architecture: A name or an alias, or a :class:`ViTConfig`; only needed where the files leave it open.
            blocks: The four blocks, from 0, whose maps a fresh adapter reads; chosen by depth where None.
            short_side_px: Short side in pixels that :meth:`extract` resizes images to; 16 patches where None.
            device, dtype, revision, token, cache_dir, local_files_only: As in :meth:`from_pretrained`.
            **vit_fields: Fields of :class:`ViTConfig` that replace what the file's format implies, such as ``mean``,
                ``native_grid``, ``rope_rounding`` or ``position_antialias``.

        Returns:
            The model on ``device``, in evaluation mode.

        Raises:
            BrixelError: There is no such file or name, or a setting is wrong.
            DownloadError: The Hub does not give a file.
            CheckpointError: The files fit no known architecture, or not the one that was given.
        """
        check_field("adapter", adapter, one_of(UNIVERSAL, BILINEAR, FRESH))
        if isinstance(name_or_path, nn.Module):
            of_files = {"revision": revision, "token": token, "cache_dir": cache_dir, "architecture": architecture}
            settings = {**of_files, "local_files_only": local_files_only, **vit_fields}
            module, described = wrap_module(name_or_path, settings)
            device, dtype = move_module(name_or_path, device, dtype)
            config = _adapter_config(adapter, module, blocks, short_side_px)
            upsampler = _new_upsampler(described, config, dtype).to(device)
            check_maps(module, config.blocks, device, dtype)
            return cls(module, upsampler, BrixelConfig(described, config))
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        access = _access(token, cache_dir, local_files_only)
        files = locate(name_or_path, what="backbone", revision=revision, access=access)
        vit, described = read_backbone(files, architecture, dtype, vit_fields)
        config = _adapter_config(adapter, vit, blocks, short_side_px)
        upsampler = _new_upsampler(described, config, dtype)
        return cls(vit, upsampler, BrixelConfig(described, config, files.commits)).to(device)

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
        """Load one of the authors' own adapter files, with its backbone.

        Args:
            adapter_pth: The `.pth` file on disk.
            backbone: As in :meth:`from_backbone`, but no module; that of ``release`` where None.
            release: Which file it is: "vits16-256", "vitb16-256", "vitl16-256", "vith16plus-256" or "vitb16-480". It
                implies backbone, architecture and short side.
            architecture, blocks: As in :meth:`from_backbone`.
            short_side_px: Short side in pixels that :meth:`extract` resizes images to; where None, that of ``release``,
                or 256.
            device, dtype, token, cache_dir, local_files_only: As in :meth:`from_pretrained`.
            revision: Branch, tag or commit of the backbone's repository.
            **vit_fields: As in :meth:`from_backbone`.

        Returns:
            The model on ``device``, in evaluation mode.

        Raises:
            BrixelError: There is no such file or name, or neither ``backbone`` nor ``release`` is given.
            DownloadError: The Hub does not give a file.
            CheckpointError: The adapter lacks a tensor, has another shape than the backbone needs or an unknown key; or
                the backbone's files do not fit.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        adapter_path = locate(adapter_pth, what="adapter").path
        backbone, architecture, side = choose_release(release, backbone, architecture, short_side_px)
        tensors = read_release(adapter_path)  # before anything is fetched for it
        check_width(adapter_path, tensors, backbone, architecture)
        access = _access(token, cache_dir, local_files_only)
        files = locate(backbone, what="backbone", revision=revision, access=access)
        vit, described = read_backbone(files, architecture, dtype, vit_fields)
        adapter = AdapterConfig(_blocks(blocks, vit), residual_detour=True, short_side_px=side)
        training = {"adapter": f"{adapter_path.name} of the authors of arXiv 2511.05168, as they trained it"}
        what = f"{adapter_path} does not fit an adapter for {described.title}"

        def build() -> Upsampler:
            return Upsampler(vit.width, adapter)

        upsampler = load_into(build, our_names(tensors, shapes_of(build), what=what), dtype, what=what)
        return cls(vit, upsampler, BrixelConfig(described, adapter, files.commits, training)).to(device)

    def mixed_with_universal(self, own_share: float = 0.5) -> "BrixelFeatures":
        """Hold a first-generation adapter near the universal upsampler, for image sizes that it was not trained at.

        The map is U + ``own_share`` (own - U), with the map U of the universal upsampler. Figures:
        `docs/results/second-generation.md`.

        Args:
            own_share: 1 for the adapter's own map, 0 for the universal upsampler's.

        Returns:
            A model that shares its weights with this one, and can be saved.

        Raises:
            BrixelError: The adapter is not a trained one of the first generation, or the share is not from 0 to 1.
        """
        config = self.config.adapter
        if config.kind != TRAINED or config.generation != 1:
            raise BrixelError("this model's adapter starts from the universal upsampler, or is no trained one")
        share = check_field("own_share", own_share, number(0, 1 + 1e-9))
        adapter = dataclasses.replace(config, own_share=min(share, 1.0))
        upsampler = _new_upsampler(self.config.backbone, adapter, self.dtype).to(self.device)
        assert isinstance(upsampler, Upsampler)
        upsampler.adapter, upsampler.head = self.adapter, self.head
        return BrixelFeatures(self.backbone, upsampler, dataclasses.replace(self.config, adapter=adapter))

    def export(
        self,
        path: PathLike,
        *,
        format: str | None = None,
        dynamic: bool = True,
        image_hw: tuple[int, int] | None = None,
        batch: int = 1,
        scale: int | None = None,
        dtype: str | torch.dtype | None = None,
        opset: int = 18,
        verify: bool = True,
    ) -> Export:
        """Write the model as one file for other engines, from normalised pixels to the dense map.

        The file holds the backbone's weights: its licence must allow passing it on. It is run and compared with the
        model before it gets its name. `docs/export.md` says how to use it.

        Args:
            path: The file. One that exists is replaced.
            format: "onnx" (needs the extra "onnx") or "torch", a program of `torch.export`; by the ending of ``path``
                where None, `.onnx` or `.pt2`.
            dynamic: Whether the number of images, height and width are free, from two patches a side; otherwise the
                file takes one size.
            image_hw: Height and width in pixels of that size; where None, a square of the adapter's short side.
            batch: Number of images of that size.
            scale: Cells of the map per patch, on each axis; 4 where None.
            dtype: Of weights, input and output: "float32", the default; "float16"; for "torch" also "bfloat16".
                Positions, moments and the universal upsampler's weights are computed in float32 in any case.
            opset: Version of the operators of ONNX, 18 to 23.
            verify: Whether the file is run and compared.

        Returns:
            The path, the facts in the file's metadata, and in them the comparison; as text the comparison's table.

        Raises:
            BrixelError: An argument is wrong, the model cannot be traced, a package is missing, or the file differs
                from the model by more than `brixel/inference/export/parity.py` allows; then no file is left.
        """
        scaled = self.at_scale(scale)
        return export_model(
            scaled,
            path,
            format=format,
            dynamic=dynamic,
            image_hw=image_hw,
            batch=batch,
            dtype=dtype,
            opset=opset,
            verify=verify,
        )

    def save_pretrained(self, folder: PathLike, *, include_backbone: bool = False, weights: str = FLOAT) -> None:
        """Write the model into a folder, which is created if it does not exist.

        Writes `adapter.safetensors`, the card `README.md` and, last, `config.json`, each whole or not at all. A card
        that you changed is kept.

        Args:
            folder: Where to write.
            include_backbone: Whether `backbone.safetensors` is written as well, for which the backbone's licence must
                allow passing it on. Otherwise the config names the sources of the backbone. A backbone that was given
                as a module cannot be included.
            weights: Of the backbone: "float", in the dtype of the model, or "int8", whose linear layers are stored as
                8-bit integers with a scale per output channel. They become floats again when they are loaded, so that
                only the files are smaller.

        Raises:
            BrixelError: ``folder`` is a file, or the backbone cannot be included, or "int8" is asked for without it.
        """
        save(
            self,
            self.config,
            check_field("folder", folder, path_like()),
            include_backbone=include_backbone,
            weights=weights,
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        include_backbone: bool = False,
        weights: str = FLOAT,
        image: ImageInput = SCENE,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str = "Model made with brixel",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, and a panel for the card, in a single commit.

        Sources of the backbone that are paths of this machine are left out of the config. A card that was changed on
        the Hub is kept.

        Args:
            repository: "ORG/NAME"; created if it does not exist.
            include_backbone: Whether the backbone's weights are uploaded, for which its licence must allow it.
            weights: As for :meth:`save_pretrained`.
            image: The image of the panel on the card.
            private: Whether a new repository is private; the account's default where None.
            token: Access token for the Hub in place of that of `hf auth login`.
            message: Message of the commit.

        Returns:
            "ORG/NAME@COMMIT".

        Raises:
            UploadError: The Hub does not accept it; nothing was changed there.
            BrixelError: The model could not be loaded from there, or ``repository`` is no name of one.
        """
        return push(
            self,
            self.config,
            repository,
            lambda: comparison_panel(self, [image]),
            include_backbone=include_backbone,
            weights=weights,
            private=private,
            token=token,
            message=message,
        )


def _adapter_config(
    adapter: str, vit: Backbone, blocks: Iterable[int] | None, short_side_px: int | None
) -> AdapterConfig:
    side = _PATCHES_ON_SHORT_SIDE * vit.patch_px if short_side_px is None else short_side_px
    if adapter == FRESH:
        grids = (max(1, round(side / vit.patch_px)),)
        return AdapterConfig(
            _blocks(blocks, vit), residual_detour=False, short_side_px=side, blend=True, generation=2, grids=grids
        )
    if blocks is not None:
        raise BrixelError(f"blocks={blocks!r} goes with adapter='fresh'; a {adapter} adapter reads the last block")
    return AdapterConfig((vit.depth - 1,), residual_detour=False, short_side_px=side, kind=adapter)


def _new_upsampler(backbone: BackboneConfig, config: AdapterConfig, dtype: torch.dtype) -> AnyUpsampler:
    """An untrained upsampler, but with the package's weights where it is the universal one."""
    made = make_upsampler(backbone.vit, config).to(dtype)
    if isinstance(made, WithUniversal):
        made.universal = load_universal(dtype)
    return made


def _blocks(blocks: Iterable[int] | None, vit: Backbone) -> tuple[int, ...]:
    """The user's choice as it is (:class:`AdapterConfig` checks it and converts it to a tuple), or the default."""
    return default_blocks(vit.depth) if blocks is None else cast("tuple[int, ...]", blocks)


def _access(token: str | bool | None, cache_dir: PathLike | None, local_files_only: bool) -> Access:
    cache: Path | None = check_field("cache_dir", cache_dir, optional(path_like()))
    return Access(
        token,
        None if cache is None else cache.expanduser(),
        check_field("local_files_only", local_files_only, boolean()),
    )
