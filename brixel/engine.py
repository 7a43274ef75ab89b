"""The one loop over batches in the library. It takes any callable and knows no model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")


def run_batches(
    forward: Callable[[Tensor], Sequence[Tensor] | Tensor], items: Iterable[tuple[Tensor, Tag]], *, batch_size: int
) -> Iterator[tuple[Tensor, Tag]]:
    """Run ``forward`` over pictures, lazily and in order; yields one result for each, with its tag.

    ``items``: pixels (3, H, W) with anything that belongs to them. Neighbours of one size share a batch of at most
    ``batch_size``; after a full batch no item is asked for before its results were taken. Where ``items`` raises, the
    results of those before come first.
    """
    batch: list[tuple[Tensor, Tag]] = []
    iterator = iter(items)
    failure: Exception | None = None
    while failure is None:
        try:
            item = next(iterator, None)
        except Exception as error:
            item, failure = None, error
        if batch and (item is None or item[0].shape != batch[0][0].shape):
            yield from _run(forward, batch)
            batch = []
        if item is None:
            break
        batch.append(item)
        if len(batch) == batch_size:
            yield from _run(forward, batch)
            batch = []
    if failure is not None:
        raise failure


def _run(
    forward: Callable[[Tensor], Sequence[Tensor] | Tensor], batch: list[tuple[Tensor, Tag]]
) -> Iterator[tuple[Tensor, Tag]]:
    # no_grad rather than inference_mode: a probe may be trained on the results
    with torch.no_grad():
        # one picture is not copied into a batch: it may be most of the memory
        results = forward(batch[0][0][None] if len(batch) == 1 else torch.stack([pixels for pixels, _ in batch]))
    for result, (_, tag) in zip(results, batch, strict=True):
        yield result, tag
