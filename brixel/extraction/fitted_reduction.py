"""The reduction of an output folder: its basis is fitted to a sample of the images once, and kept in the folder."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError, ImageError
from brixel.extraction.distributed import ProcessShare
from brixel.feature_maps.channel_basis import ChannelBasis
from brixel.feature_maps.feature_map import FeatureMap
from brixel.feature_maps.reduction.reduce import Reduce
from brixel.images.frame import Frame
from brixel.utils.progress import progress_bar
from brixel.video.frames import FrameSelection, is_video, sample_frames

REDUCTION_FILE = "reduce.safetensors"
SAMPLE = 64  # images that a basis is fitted to


@dataclass(frozen=True)
class FolderReduction:
    """A reduction that is ready for a folder. ``is_new``: its basis is not in the folder yet."""

    reduce: Reduce
    folder: Path
    is_new: bool

    def save(self) -> None:
        """Keep the basis in the folder, if it has one; only where no other run writes there."""
        if self.is_new:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.reduce.save(self.folder / REDUCTION_FILE)


def reduction_for(
    folder: Path,
    reduce: Reduce,
    model: BrixelFeatures,
    images: Sequence[tuple[Path, Path]],
    share: ProcessShare,
    options: Mapping[str, Any],
    sample: int = SAMPLE,
    *,
    selection: FrameSelection,
    overwrite: bool = False,
) -> FolderReduction:
    """The reduction with the basis of the folder, or with a new one that is fitted to a sample of the images.

    Args:
        folder: The output folder.
        reduce: The reduction.
        model: What makes the maps.
        images: As of `extract_files`.
        share: This process.
        options: Of :meth:`brixel.BrixelFeatures.stream_all`, for the maps of the sample.
        sample: How many images the basis is fitted to.
        selection: Which frames of videos are wanted.
        overwrite: Whether the basis in the folder may be replaced.

    Raises:
        BrixelError: The folder has the basis of another reduction, and ``overwrite`` is not given; or there are several
            processes and no basis.
    """
    if not reduce.makes_maps:  # others look nothing up by name, and a million names are no small table
        reduce = reduce.for_images({str(image): relative_path.as_posix() for image, relative_path in images})
    reduce.check_model(model.config.backbone.title, model.embed_dim)
    kept = _kept(folder / REDUCTION_FILE, reduce, model, overwrite=overwrite)
    if kept is not None:
        return FolderReduction(kept, folder, is_new=False)
    if not reduce.is_fitted:
        if share.processes > 1:
            raise BrixelError(
                f"{reduce.spec} needs a basis, which one process fits: run the same command without torchrun and with "
                "--fit-only first, or give reduce='reduce.safetensors', a fitted one"
            )
        reduce = reduce.fit(_sample_maps(model, images, sample, selection, options))
    return FolderReduction(reduce, folder, is_new=reduce.needs_basis)


def fitted_reduction(folder: Path, reduce: Reduce, model: BrixelFeatures, *, overwrite: bool) -> Reduce:
    """The reduction with the basis that it has, or that the folder keeps. Raises BrixelError where there is none."""
    reduce.check_model(model.config.backbone.title, model.embed_dim)
    kept = _kept(folder / REDUCTION_FILE, reduce, model, overwrite=overwrite)
    if kept is None and not reduce.is_fitted:
        raise BrixelError(
            f"{reduce.spec} needs a basis, which one process fits: run `brixel extract --fit-only` into the same "
            "folder first, or give reduce='reduce.safetensors', a fitted one"
        )
    if kept is None:
        FolderReduction(reduce, folder, is_new=reduce.needs_basis).save()
    return kept or reduce


def fit_reduction(
    model: BrixelFeatures,
    images: Sequence[tuple[Path, Path]],
    folder: Path,
    reduce: Reduce | str,
    sample: int = SAMPLE,
    *,
    scale: int | None = None,
    fps: float | None = None,
    every: int | None = None,
    **options: Any,
) -> Reduce:
    """Fit the basis of a reduction to a sample of the images and keep it in an output folder, unless it has one.

    A basis that is there is never replaced, since maps may depend on it.

    Args:
        model: The model to extract with.
        images: As of :func:`brixel.extraction.extract_files`.
        folder: The output folder; created if it is missing.
        reduce: The reduction.
        sample: How many images the basis is fitted to.
        scale: As of :func:`brixel.extraction.extract_files`, as the next two.
        fps: Of videos, so many frames per second.
        every: Of videos, the frames whose number is a multiple of it.
        options: Further arguments of :meth:`brixel.BrixelFeatures.stream_all`.

    Returns:
        The fitted reduction.

    Raises:
        BrixelError: The folder has the basis of another reduction, or nothing can be fitted.
    """
    share, model, selection = ProcessShare.from_environment(), model.at_scale(scale), FrameSelection(fps, every)
    found = reduction_for(folder, Reduce.of(reduce), model, images, share, options, sample, selection=selection)
    found.save()
    return found.reduce


def _kept(path: Path, reduce: Reduce, model: BrixelFeatures, *, overwrite: bool) -> Reduce | None:
    """The reduction with the basis that a folder keeps; None where it has none, or is to be written over."""
    if not reduce.needs_basis or not path.exists():
        return None
    basis, spec = ChannelBasis.load(path)
    backbone = model.config.backbone.title
    problem = ""
    if spec != reduce.spec or basis.backbone not in ("", backbone):
        problem = f"is of {spec} for {basis.backbone}, and asked for is {reduce.spec} for {backbone}"
    elif reduce.basis is not None and reduce.basis.digest != basis.digest:
        problem = f"holds basis {basis.digest}, and given is {reduce.basis.digest}"
    if not problem:
        return reduce.with_basis(basis)
    if overwrite:
        return None
    raise BrixelError(f"{path} {problem}: give another output folder, or --overwrite")


def _sample_maps(
    model: BrixelFeatures,
    images: Sequence[tuple[Path, Path]],
    count: int,
    selection: FrameSelection,
    options: Mapping[str, Any],
) -> Iterator[tuple[str, FeatureMap]]:
    """The maps of some images, the same ones whatever their order; those that fail are left out."""
    chosen = sorted(images, key=lambda pair: hashlib.sha256(os.fsencode(pair[1].as_posix())).digest())[:count]
    sources = [source for path, _ in chosen for source in _stills(path, -(-count // len(chosen)), selection)]
    results = model.stream_all(sources, **options)
    for source, result in zip(sources, progress_bar(results, "sample", total=len(sources)), strict=True):
        if isinstance(result, FeatureMap):
            yield "a frame" if isinstance(source, Frame) else str(source), result


def _stills(path: Path, count: int, selection: FrameSelection) -> Sequence[Path | Frame]:
    """An image itself, and of a video some of the frames that are wanted; none where it cannot be read."""
    if not is_video(path):
        return [path]
    try:
        return list(sample_frames(path, count, selection))
    except ImageError:  # the run itself reports it
        return []
