"""The one loop over batches in the library. It takes any callable and knows no model."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")
Result = TypeVar("Result")
BATCHES_IN_FLIGHT = 4  # batches' worth of images among which those of one size share a batch


@dataclass
class QueuedImage(Generic[Tag, Result]):
    """An image in the queue until its result is yielded: first its pixels, then its result; neither if it had none."""

    pixels: Tensor | None
    tag: Tag
    result: Result | None = None


def run_batches(
    forward: Callable[[Tensor], Iterable[Result]],
    items: Iterable[tuple[Tensor | None, Tag]],
    *,
    batch_size: int,
    max_in_flight: Callable[[], int] = lambda: sys.maxsize,
    max_batch: Callable[[tuple[int, int]], int] = lambda image_hw: sys.maxsize,
    finish: Callable[[Result, Tag], Result] = lambda result, tag: result,
) -> Iterator[tuple[Result | None, Tag]]:
    """Run ``forward`` over images, lazily and in order.

    Images of one size share a batch, also where others lie between them. After a full batch no item is read before its
    results were yielded, as far as the order allows. Where ``items`` raises, the results of those before come first.

    Args:
        forward: Takes pixels (B, 3, H, W), gives one result per image.
        items: Pixels (3, H, W) with a tag; an item without pixels is yielded with the result None.
        batch_size: Images in a batch at most.
        max_in_flight: Images and results that may be held; `BATCHES_IN_FLIGHT` batches' worth at most in any case.
        max_batch: Images of a size (H, W) in a batch at most, where that is less than ``batch_size``.
        finish: Makes of a result what waits until it is yielded.

    Yields:
        The result and the tag of every item.
    """
    most = BATCHES_IN_FLIGHT * batch_size if batch_size > 1 else 1
    queue: deque[QueuedImage[Tag, Result]] = deque()
    # what waits for its batch, the size of the oldest first
    groups: dict[torch.Size, list[QueuedImage[Tag, Result]]] = {}
    iterator = iter(items)
    failure: Exception | None = None
    while failure is None:
        try:
            item = next(iterator, None)
        except Exception as error:
            item, failure = None, error
        if item is None:
            break
        image: QueuedImage[Tag, Result] = QueuedImage(*item)
        del item  # the queue alone holds the pixels
        queue.append(image)
        if image.pixels is not None:
            group = groups.setdefault(image.pixels.shape, [])
            group.append(image)
            height, width = image.pixels.shape[1:]
            if len(group) >= min(batch_size, max_batch((height, width))):
                _run(forward, groups.pop(image.pixels.shape), finish)
        yield from _finished(queue)
        while queue and len(queue) >= min(most, max_in_flight()):  # the oldest waits no longer for its batch to fill
            _run(forward, groups.pop(next(iter(groups))), finish)
            yield from _finished(queue)
    for group in groups.values():
        _run(forward, group, finish)
        yield from _finished(queue)
    if failure is not None:
        raise failure


def _finished(queue: deque[QueuedImage[Tag, Result]]) -> Iterator[tuple[Result | None, Tag]]:
    """Take those at the front that wait for nothing out of the queue."""
    while queue and queue[0].pixels is None:
        image = queue.popleft()
        yield image.result, image.tag


def _run(
    forward: Callable[[Tensor], Iterable[Result]],
    group: list[QueuedImage[Tag, Result]],
    finish: Callable[[Result, Tag], Result],
) -> None:
    pixels = [image.pixels for image in group if image.pixels is not None]
    # no_grad rather than inference_mode: a probe may be trained on the results
    with torch.no_grad():
        # one image is not copied into a batch: it may be most of the memory
        results = forward(pixels[0][None] if len(pixels) == 1 else torch.stack(pixels))
        for image, result in zip(group, results, strict=True):
            image.pixels, image.result = None, finish(result, image.tag)
