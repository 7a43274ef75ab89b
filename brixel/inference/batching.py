"""The one loop over batches in the library. It takes any callable and knows no model."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")
WINDOW = 4  # batches' worth of images among which those of one size are brought together

Result = Tensor | Exception
"""What becomes of an image: an error where it alone cannot be computed."""
Forward = Callable[[Tensor], Sequence[Result] | Tensor]


@dataclass
class _Place(Generic[Tag]):
    """An image's place in the order, until its result is taken; what has no pixels passes through."""

    pixels: Tensor | None
    tag: Tag
    result: Result | None = None


def run_batches(
    forward: Forward,
    items: Iterable[tuple[Tensor | None, Tag]],
    *,
    batch_size: int,
    window: Callable[[], int] = lambda: sys.maxsize,
    together: Callable[[tuple[int, int]], int] = lambda image_hw: sys.maxsize,
) -> Iterator[tuple[Result | None, Tag]]:
    """Run ``forward`` over images, lazily and in order; yields one result for each, with its tag.

    ``items``: pixels (3, H, W) with anything that belongs to them; one without pixels comes out as it is, at its place.
    Images of one size share a batch of at most ``batch_size`` and ``together((H, W))``, also where others lie between
    them: at most ``WINDOW`` batches' worth of images and results are held, and no more than ``window()`` of them.
    After a full batch no item is asked for before its results were taken, as far as the order lets them. Where
    ``items`` raises, the results of those before come first.
    """
    most = WINDOW * batch_size if batch_size > 1 else 1
    order: deque[_Place[Tag]] = deque()
    groups: dict[torch.Size, list[_Place[Tag]]] = {}  # what waits for its batch, the size of the oldest first
    iterator = iter(items)
    failure: Exception | None = None
    while failure is None:
        try:
            item = next(iterator, None)
        except Exception as error:
            item, failure = None, error
        if item is None:
            break
        place = _Place(*item)
        del item  # the place alone holds the pixels
        order.append(place)
        if place.pixels is not None:
            group = groups.setdefault(place.pixels.shape, [])
            group.append(place)
            height, width = place.pixels.shape[1:]
            if len(group) >= min(batch_size, together((height, width))):
                _run(forward, groups.pop(place.pixels.shape))
        yield from _finished(order)
        while order and len(order) >= min(most, window()):  # the first of them waits for its batch to fill: no longer
            _run(forward, groups.pop(_shape(order[0])))
            yield from _finished(order)
    for group in groups.values():
        _run(forward, group)
        yield from _finished(order)
    if failure is not None:
        raise failure


def _shape(place: _Place[Tag]) -> torch.Size:
    assert place.pixels is not None
    return place.pixels.shape


def _finished(order: deque[_Place[Tag]]) -> Iterator[tuple[Result | None, Tag]]:
    """Those at the front that wait for nothing, taken out."""
    while order and order[0].pixels is None:
        place = order.popleft()
        yield place.result, place.tag


def _run(forward: Forward, group: list[_Place[Tag]]) -> None:
    pixels = [place.pixels for place in group if place.pixels is not None]
    # no_grad rather than inference_mode: a probe may be trained on the results
    with torch.no_grad():
        # one image is not copied into a batch: it may be most of the memory
        results = forward(pixels[0][None] if len(pixels) == 1 else torch.stack(pixels))
    for place, result in zip(group, results, strict=True):
        place.pixels, place.result = None, result
