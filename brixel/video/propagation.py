"""Labels carried through a video by the similarity of features, without training.

As the DAVIS evaluation of self-supervised features does it, in the form of Jabri et al., "Space-Time Correspondence as
a Contrastive Random Walk" (https://arxiv.org/abs/2006.14613), and of DINO (https://arxiv.org/abs/2104.14294): the
labels of a cell are a weighted mean of the labels of the cells in earlier frames that resemble it most: those near its
place, in the first frame and in the last few. Labels stay soft between frames. Differences: the shares of labels in a
cell are exact areas in place of the nearest pixel, the neighbourhood is a share of the image, so that it does not
depend on the grid, and masks are not stretched to [0, 1] by label before the largest is taken.

Shapes: D channels, Hf x Wf cells, L labels, H x W pixels.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from brixel.brixel_features import BrixelFeatures
from brixel.errors import BrixelError
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.load import ImageInput
from brixel.inference.stream import several_images
from brixel.utils.fields import check_fields, number, short_repr, whole_number
from brixel.utils.torch_defaults import plain_defaults

_QUERY_CELLS = 16  # side of the squares of cells that are compared together
_MOST_SIMILARITIES = 2**23  # that exist at a time
_LABELS_AT_ONCE = 8  # that are resized to pixels together
_MODES = ("1", "L", "P", "I", "I;16")
MOST_LABELS = 1024


@dataclass(frozen=True)
class PropagationSettings:
    """How labels are propagated; the arguments of :func:`propagate`."""

    context: int = 7
    top_k: int = 5
    radius: float = 0.2
    temperature: float = 0.1

    def __post_init__(self) -> None:
        rules = {"context": whole_number(0), "top_k": whole_number(1)}
        check_fields(self, {**rules, "radius": number(above=0), "temperature": number(above=0)})


def propagate(
    first_mask: Tensor | npt.NDArray[Any] | Image.Image,
    frames: Iterable[ImageInput] | Iterable[FeatureMap],
    model: BrixelFeatures | None = None,
    *,
    context: int = 7,
    top_k: int = 5,
    radius: float = 0.2,
    temperature: float = 0.1,
) -> Iterator[Tensor]:
    """Carry the labels of the first frame through a video, by the similarity of features.

    Args:
        first_mask: (H, W), a whole number for every pixel of the first frame, such as 0 for the background and 1, 2, 3
            for objects: an array, a tensor, or a PIL image of grey or palette.
        frames: The frames, the first one first, all of one size: images of any kind, such as
            ``brixel.video.frames("clip.mp4")``, or feature maps, such as ``model.stream(images, short_side_px=448)``.
        model: Makes the maps of images; None for `brixel-small`. Not needed for maps.
        context: How many of the last frames are compared, beside the first one.
        top_k: How many of the most similar cells vote.
        radius: How far a cell may have moved from one compared frame to this one, on each axis, as a share of the
            image's short side.
        temperature: Cosine similarities are divided by it before the softmax that weights the votes.

    Yields:
        For every frame its labels (H, W), int64, on the CPU; for the first one those that were given.

    Raises:
        ImageError: A frame cannot be used; raised after the labels of those before it.
        BrixelError: An argument is out of range, or a frame has another size than the mask.
    """
    settings = PropagationSettings(context, top_k, radius, temperature)
    mask = _as_labels(first_mask)
    return _propagate(mask, _as_maps(frames, model), settings)


def _propagate(mask: Tensor, maps: Iterable[FeatureMap], settings: PropagationSettings) -> Iterator[Tensor]:
    tracker: LabelTracker | None = None
    for position, feature_map in enumerate(maps):
        if tuple(mask.shape) != feature_map.image_hw:
            sizes = " x ".join(map(str, feature_map.image_hw)), " x ".join(map(str, mask.shape))
            raise BrixelError(
                f"frame {position} has {sizes[0]} px (height x width), the mask {sizes[1]}; resize one like the other"
            )
        if tracker is None:
            tracker = LabelTracker(mask, feature_map, settings)
            yield mask
        else:
            yield tracker.next(feature_map)
    if tracker is None:
        raise BrixelError("no frames to carry labels through; give at least the one that the mask belongs to")


def _as_labels(mask: object) -> Tensor:
    """A mask as a tensor (H, W), int64 on the CPU."""
    if isinstance(mask, Image.Image):
        if mask.mode not in _MODES:
            raise BrixelError(
                f"the mask has mode {mask.mode}; expected one whole number per pixel: grey or palette, not colours"
            )
        mask = np.asarray(mask)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biu":
        mask = torch.from_numpy(mask.astype(np.int64))
    if not isinstance(mask, Tensor) or mask.ndim != 2 or 0 in mask.shape or mask.dtype.is_floating_point:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, np.ndarray | Tensor) else short_repr(mask)
        raise BrixelError(f"the mask is {given}; expected (H, W) whole numbers, a label for every pixel")
    return mask.detach().cpu().long()


def _as_maps(frames: object, model: BrixelFeatures | None) -> Iterator[FeatureMap]:
    """The maps of the frames, which may be maps already."""
    if isinstance(frames, FeatureMap):
        raise BrixelError("frames are one feature map; expected several, one per frame")
    iterator = iter(several_images(frames))  # type: ignore[arg-type]
    first = list(itertools.islice(iterator, 1))
    whole: Any = itertools.chain(first, iterator)
    if first and isinstance(first[0], FeatureMap):
        yield from whole
    elif first:
        model = BrixelFeatures.from_pretrained() if model is None else model
        yield from model.stream(whole)


class LabelTracker:
    """The cells of earlier frames with the shares of labels in them, and the step to the next frame."""

    def __init__(self, mask: Tensor, first: FeatureMap, settings: PropagationSettings) -> None:
        self._settings = settings
        self._labels = mask.unique()
        if len(self._labels) > MOST_LABELS:
            raise BrixelError(f"the mask has {len(self._labels)} different labels; expected {MOST_LABELS} at most")
        self._first = first
        cells = _unit_cells(first)
        shares = label_shares(mask, self._labels, first).to(cells.device)
        self._known = [(cells, shares)]
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)
        short_px = min(first.image_hw)
        self._reach_hw = [max(1, round(settings.radius * short_px / step)) for step in first.stride]

    @plain_defaults()
    @torch.no_grad()
    def next(self, feature_map: FeatureMap) -> Tensor:
        """The labels (H, W) of the next frame."""
        if feature_map.features.shape != self._first.features.shape:
            shapes = (tuple(each.features.shape) for each in (feature_map, self._first))
            raise BrixelError(
                "a map has shape {}, that of the first frame {}; expected maps of one model".format(*shapes)
            )
        cells = _unit_cells(feature_map)
        earlier = [*self._known, *self._recent]
        shares = carried_shares(cells, earlier, self._reach_hw, self._settings)
        self._recent.append((cells, shares))
        return self._labels[largest_label(shares, feature_map)]


def _unit_cells(feature_map: FeatureMap) -> Tensor:
    """The cells as vectors of length 1: (Hf, Wf, D), float32 or wider."""
    features = feature_map.features
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide, dim=0).permute(1, 2, 0).contiguous()


def label_shares(mask: Tensor, labels: Tensor, feature_map: FeatureMap) -> Tensor:
    """The share of every label in the part of each cell that lies on the image: (Hf, Wf, L), float32."""
    rows, columns = (
        _overlaps(cells, step, side)
        for cells, step, side in zip(feature_map.grid_hw, feature_map.stride, feature_map.image_hw, strict=True)
    )
    return torch.stack([rows @ (mask == label).float() @ columns.T for label in labels], -1)


def _overlaps(cells: int, step: float, side: int) -> Tensor:
    """The share of each cell's length that lies on each pixel of an axis: (cells, side); rows sum to 1."""
    start = torch.arange(cells, dtype=torch.float64)[:, None] * step
    pixel = torch.arange(side, dtype=torch.float64)
    common = (torch.minimum(start + step, pixel + 1) - torch.maximum(start, pixel)).clamp_min(0)
    total: Tensor = common.sum(1, keepdim=True)
    return (common / total.clamp_min(1e-9)).float()


def carried_shares(
    cells: Tensor, earlier: list[tuple[Tensor, Tensor]], reach_hw: list[int], settings: PropagationSettings
) -> Tensor:
    """The shares of labels in the cells (Hf, Wf, D) of a frame, by those of earlier frames: (Hf, Wf, L).

    ``earlier``: cells (Hf, Wf, D) and shares (Hf, Wf, L) of frames. ``reach_hw``: how many cells away a similar cell
    may lie, on each axis.
    """
    height, width = cells.shape[:2]
    found = torch.empty(height, width, earlier[0][1].shape[-1], device=cells.device)
    for top, left in itertools.product(range(0, height, _QUERY_CELLS), range(0, width, _QUERY_CELLS)):
        square = slice(top, top + _QUERY_CELLS), slice(left, left + _QUERY_CELLS)
        near = tuple(
            slice(max(0, part.start - reach), part.stop + reach) for part, reach in zip(square, reach_hw, strict=True)
        )
        queries = cells[square].flatten(0, 1)  # Q D
        rows, columns = (torch.arange(size, device=cells.device) for size in (height, width))
        far_y, far_x = (
            (axis[part][:, None] - axis[around]).abs() > reach
            for axis, part, around, reach in zip((rows, columns), square, near, reach_hw, strict=True)
        )
        far = (far_y[:, None, :, None] | far_x[None, :, None, :]).flatten(2).flatten(0, 1)  # Q C
        found[square] = _voted(queries, earlier, near, far, settings).view(*cells[square].shape[:2], -1)
    return found


def _voted(
    queries: Tensor,
    earlier: list[tuple[Tensor, Tensor]],
    near: tuple[slice, ...],
    far: Tensor,
    settings: PropagationSettings,
) -> Tensor:
    """The shares of labels (Q, L) of queries (Q, D): the mean over their best cells in ``near``, not in ``far``."""
    best: tuple[Tensor, Tensor] | None = None  # the top_k similarities so far (Q, k), and their shares (Q, k, L)
    at_once = max(1, _MOST_SIMILARITIES // far.numel())
    for start in range(0, len(earlier), at_once):
        part = earlier[start : start + at_once]
        candidates = torch.cat([each[near].flatten(0, 1) for each, _ in part])  # C D
        shares = torch.cat([each[near].flatten(0, 1) for _, each in part])  # C L
        similarities = (queries @ candidates.T).masked_fill_(far.repeat(1, len(part)), -torch.inf)
        values, indices = similarities.topk(min(settings.top_k, similarities.shape[1]), dim=1)
        chosen = values, shares[indices]
        if best is not None:
            values = torch.cat([best[0], values], 1)
            values, order = values.topk(min(settings.top_k, values.shape[1]), dim=1)
            joined = torch.cat([best[1], chosen[1]], 1)
            chosen = values, joined.gather(1, order[..., None].expand(-1, -1, joined.shape[-1]))
        best = chosen
    assert best is not None
    weights = (best[0] / settings.temperature).softmax(1)  # those in `far` get 0
    return torch.einsum("qk,qkl->ql", weights.to(best[1].dtype), best[1])


def largest_label(shares: Tensor, feature_map: FeatureMap) -> Tensor:
    """The number of the label with the largest share at every pixel, of (Hf, Wf, L): (H, W), int64 on the CPU."""
    image_hw = feature_map.image_hw
    best = torch.full(image_hw, -1.0)
    found = torch.zeros(image_hw, dtype=torch.int64)
    for start in range(0, shares.shape[-1], _LABELS_AT_ONCE):
        part = shares[..., start : start + _LABELS_AT_ONCE].permute(2, 0, 1).contiguous()
        values, labels = FeatureMap(part, image_hw, feature_map.stride).resize(image_hw).features.cpu().max(0)
        better = values > best
        best, found = torch.where(better, values, best), torch.where(better, labels + start, found)
    return found
