"""The public class: a backbone and its adapter from files, pictures in, feature maps out."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from brixel.backbones.loading import LoadedBackbone, load_backbone
from brixel.backbones.vit import ViT
from brixel.backbones.vit_config import ViTConfig
from brixel.checkpoints import fit, read_tensors, shapes_of, write_tensors
from brixel.config import BackboneConfig, BrixelConfig, fingerprint, read_config, write_config
from brixel.devices import choose_device, choose_dtype, dtype_name
from brixel.engine import run_batches
from brixel.errors import BrixelError, CheckpointError
from brixel.feature_map import FeatureMap
from brixel.geometry import Geometry, plan_geometry
from brixel.images import ImageInput, load_image, preprocess
from brixel.model_table import KNOWN_BACKBONES
from brixel.release import read_release
from brixel.sources import BUNDLED, locate
from brixel.student import UPSCALE, AdapterConfig, Student, default_blocks, new_trainable

PathLike = str | os.PathLike[str]
CONFIG, ADAPTER, BACKBONE = "config.json", "adapter.safetensors", "backbone.safetensors"
_PATCHES_ON_SHORT_SIDE = 16  # what fresh adapters are made for: 256 px at patch 16, 224 px at patch 14
_RELEASE_SHORT_SIDE_PX = 256


class BrixelFeatures(Student):
    """Dense features of pictures: a frozen ViT with a distilled adapter, four cells to a patch on each axis.

    Built by :meth:`from_pretrained`, :meth:`from_backbone` or :meth:`from_release`. As a module it takes normalised
    pixels (B, 3, H, W) and gives (B, D, 4h, 4w); :meth:`extract` and :meth:`stream` take pictures of any kind.
    Method: arXiv 2511.05168.
    """

    def __init__(self, backbone: ViT, trainable: nn.ModuleDict, config: BrixelConfig) -> None:
        super().__init__(backbone, trainable["adapter"], trainable["head"], config.adapter.blocks)  # type: ignore[arg-type]
        self.config = config

    # ---------------------------------------------------------------- from files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: PathLike = BUNDLED,
        *,
        backbone: PathLike | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> "BrixelFeatures":
        """Load a folder that :meth:`save_pretrained` wrote, or the model that comes with the package.

        ``name_or_path``: a folder; "brixel-tiny", also where nothing is given, is the small model inside the package
        (5 M parameters, Apache-2.0, no download; `docs/brixel-tiny.md` tells what it is good for and what not).
        ``backbone``: where its backbone lies, if the folder does not hold it and it is no longer where it was.
        ``device``: "auto" takes CUDA, then MPS, then the CPU. ``dtype``: "auto" is bfloat16 on CUDA devices that
        compute in it, else float32. ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` concern downloads,
        which this version does not do: a local folder needs none of them.
        Raises BrixelError where there is no such folder, CheckpointError where files in it do not fit.
        """
        folder = locate(name_or_path, what="model")
        config = read_config(folder / CONFIG)
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        vit = _backbone_of(folder, config.backbone, backbone, dtype)
        what = f"{folder / ADAPTER} does not fit an adapter for {config.backbone.title}"
        trainable = fit(
            lambda: new_trainable(vit.width, config.adapter), read_tensors(folder / ADAPTER), dtype, what=what
        )
        return cls(vit, trainable, config).to(device)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: PathLike,
        *,
        architecture: str | ViTConfig | None = None,
        blocks: Iterable[int] | None = None,
        short_side_px: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **vit_fields: object,
    ) -> "BrixelFeatures":
        """A backbone from disk with a fresh adapter, which starts as the identity: the backbone's map, upsampled.

        ``name_or_path``: a folder in Hugging Face or timm layout, or a weight file (Meta's `.pth`, safetensors).
        ``architecture``: a name such as "dinov3-vits16" or a :class:`ViTConfig`; needed only where a file leaves it
        open. ``blocks``: the four blocks, from 0, that feed the adapter; by depth where None. ``short_side_px``: the
        size that :meth:`extract` brings pictures to, 16 patches where None. ``vit_fields``: any field of
        :class:`ViTConfig`, over what the file's family implies (`rope_rounding`, `position_antialias`, `mean`, ...).
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        path = locate(name_or_path, what="backbone")
        loaded = load_backbone(path, architecture=architecture, dtype=dtype, fields=vit_fields)
        config = AdapterConfig(
            blocks=_blocks(blocks, loaded.vit),
            residual_detour=False,
            short_side_px=_PATCHES_ON_SHORT_SIDE * loaded.vit.patch_px if short_side_px is None else short_side_px,
            blend=True,
        )
        trainable = new_trainable(loaded.vit.width, config).to(dtype)
        return cls(loaded.vit, trainable, _config(loaded, path, config)).to(device)

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
        **vit_fields: object,
    ) -> "BrixelFeatures":
        """The authors' own adapter file on its backbone.

        ``adapter_pth``: a `.pth` of the release. ``backbone``, ``architecture``, ``blocks``, ``vit_fields``: as in
        :meth:`from_backbone`. ``short_side_px``: 256 for four of the released files, 480 for the denser ViT-B.
        Raises CheckpointError where the file lacks a tensor, has another shape, or holds a key that nobody knows.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        adapter_path, backbone_path = locate(adapter_pth, what="adapter"), locate(backbone, what="backbone")
        loaded = load_backbone(backbone_path, architecture=architecture, dtype=dtype, fields=vit_fields)
        adapter = AdapterConfig(_blocks(blocks, loaded.vit), residual_detour=True, short_side_px=short_side_px)
        config = _config(loaded, backbone_path, adapter)
        what = f"{adapter_path} does not fit an adapter for {config.backbone.title}"

        def build() -> nn.ModuleDict:
            return new_trainable(loaded.vit.width, adapter)

        trainable = fit(build, read_release(adapter_path, shapes_of(build), what=what), dtype, what=what)
        return cls(loaded.vit, trainable, config).to(device)

    def save_pretrained(self, folder: PathLike, *, include_backbone: bool = False) -> None:
        """Write `config.json` and `adapter.safetensors` (and `backbone.safetensors`) into a folder, made if need be.

        Each file is written whole or not at all; `config.json` comes last. Without the backbone, the folder says which
        one it needs and where that was; its licence may forbid to hand it on.
        """
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
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, and so the maps'."""
        return self.backbone.norm.weight.dtype

    # ---------------------------------------------------------------- pictures

    def extract(self, image: ImageInput, *, short_side_px: int | str | None = None) -> FeatureMap:
        """Dense features of one picture.

        ``image``: a path, PIL image, array (H, W, 3) or (H, W), or tensor (3, H, W). ``short_side_px``: the size that
        its short side is brought to, aspect kept; None for the size the adapter was trained on, "native" for its own.
        Then it is padded to whole patches, and the map cropped back to the picture.
        Returns a :class:`FeatureMap` on the CPU, (D, Hf, Wf). Raises ImageError for a picture that cannot be used.
        """
        return next(self.stream([image], short_side_px=short_side_px))

    def stream(
        self, images: Iterable[ImageInput], *, batch_size: int = 1, short_side_px: int | str | None = None
    ) -> Iterator[FeatureMap]:
        """Dense features of many pictures, lazily and in order; see :meth:`extract`.

        Neighbours that come to one size share a batch of at most ``batch_size``. A picture that cannot be used raises
        ImageError after the maps of those before it.
        """
        return self._stream(self, UPSCALE, images, batch_size=batch_size, short_side_px=short_side_px)

    def extract_backbone(self, image: ImageInput, *, short_side_px: int | str | None = None) -> FeatureMap:
        """The frozen backbone's own map of the picture, prepared as in :meth:`extract`: what brixel starts from."""
        return next(self._stream(self.backbone_features, 1, [image], batch_size=1, short_side_px=short_side_px))

    def _stream(
        self,
        forward: Callable[[Tensor], Tensor],
        upscale: int,
        images: Iterable[ImageInput],
        *,
        batch_size: int,
        short_side_px: int | str | None,
    ) -> Iterator[FeatureMap]:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise BrixelError(f"batch_size is {batch_size!r}; expected a positive whole number")
        side = self.config.adapter.short_side_px if short_side_px is None else short_side_px

        def run(pixels: Tensor) -> Tensor:
            with evaluating(self):
                return forward(pixels.to(self.device, self.dtype))

        prepared = (self._prepare(image, side) for image in images)
        results = run_batches(run, prepared, batch_size=batch_size)
        return (self._feature_map(features, geometry, upscale) for features, geometry in results)

    def _feature_map(self, features: Tensor, geometry: Geometry, upscale: int) -> FeatureMap:
        """The cells (D, Hf, Wf) that cover the picture, out of those of the padded one."""
        height, width = geometry.map_hw(upscale)
        cells = features[:, :height, :width].cpu().clone(memory_format=torch.contiguous_format)
        return FeatureMap(cells, geometry.image_hw, geometry.map_stride(upscale), self._meta(geometry))

    def _prepare(self, image: ImageInput, short_side_px: int | str) -> tuple[Tensor, Geometry]:
        planes = load_image(image)
        geometry = plan_geometry((planes.shape[1], planes.shape[2]), self.patch_px, short_side_px)
        vit = self.config.backbone.vit
        return preprocess(planes, geometry, vit.mean, vit.std), geometry

    def _meta(self, geometry: Geometry) -> Mapping[str, str]:
        """What made a map, kept in its file."""
        height, width = geometry.resized_hw
        return {
            "backbone": self.config.backbone.title,
            "resized_hw": f"{height}x{width}",
            "dtype": dtype_name(self.dtype),
        }


_MODES = threading.Lock()  # of all models: a lock of its own would keep a model from being copied


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each part's own mode again after; nothing is touched where all are in it already."""
    with _MODES:  # another thread may be here, with the modes changed for a while
        training = [part for part in module.modules() if part.training]
        if training:
            module.eval()
            try:
                yield
            finally:
                for part in training:
                    part.training = True
    if not training:
        yield


def _blocks(blocks: Iterable[int] | None, vit: ViT) -> tuple[int, ...]:
    """What the user gave, as it is: :class:`AdapterConfig` checks it and makes a tuple of it."""
    return default_blocks(vit.depth) if blocks is None else cast("tuple[int, ...]", blocks)


def _config(loaded: LoadedBackbone, path: Path, adapter: AdapterConfig) -> BrixelConfig:
    source = str(path.resolve())
    backbone = BackboneConfig(loaded.architecture, source, loaded.vit.config, fingerprint(loaded.vit))
    return BrixelConfig(backbone, adapter)


def _where_to_get(architecture: str | None) -> str:
    known = KNOWN_BACKBONES.get(architecture or "")
    return f"; it is published as {known.huggingface} and {known.timm}" if known else ""


def _backbone_of(folder: Path, config: BackboneConfig, given: PathLike | None, dtype: torch.dtype) -> ViT:
    """The backbone that a saved model needs: given by the user, in its folder, or where it was."""
    if given is None and (folder / BACKBONE).is_file():
        what = f"{folder / BACKBONE} does not fit {config.title}"
        vit = fit(lambda: ViT(config.vit), read_tensors(folder / BACKBONE), dtype, what=what).requires_grad_(False)
        config.check_weights(vit, str(folder / BACKBONE))
        return vit
    if given is None and not Path(config.source).exists():
        raise CheckpointError(
            f"{folder} holds an adapter without its backbone, {config.title}, which was at {config.source} and is no "
            f"longer there: give the backbone's folder or file as backbone={_where_to_get(config.architecture)}"
        )
    path = locate(given or config.source, what="backbone")
    vit = load_backbone(path, architecture=config.vit, dtype=dtype).vit
    config.check_weights(vit, str(path))
    return vit
