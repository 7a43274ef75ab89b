"""Training of small readouts on frozen features by one fixed protocol, so that sources differ in their features alone.

Features are standardised per channel, and AdamW runs a fixed number of steps with a cosine schedule. The learning rate
is chosen on a held-out fifth of the training images; then all of them train the readout that is reported. Batches,
initial weights and splits depend on the seed alone. Readouts of all learning rates are trained at the same time, so
that features are read once.

Shapes: B batch, D channels, C outputs, h x w cells; n cells drawn from an image.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.evaluate.feature_cache import Features, check_memory
from brixel.probe.readouts import standardised
from brixel.utils.fields import check_fields, number, several, whole_number
from brixel.utils.progress import progress_bar

_STATISTICS_ITEMS = 4096  # mean and deviation of channels are computed on at most so many examples, evenly spaced

Loss = Callable[[Tensor, Sequence[int]], Tensor]
"""From outputs (B, C, h, w) and the examples' numbers to a mean loss."""

Score = Callable[[nn.Module, Sequence[int]], float]
"""The score of a readout on images, by number; higher is better."""


@dataclass(frozen=True)
class ProbeSettings:
    """The protocol of a probe's training.

    Args:
        steps: Of the optimiser.
        batch_size: Examples per step: cells for linear probes, maps for convolutional ones.
        learning_rates: The rates to choose from.
        weight_decay: Of AdamW.
        held_out: Share of the training images on which the learning rate is chosen, between 0 and 1.
        seed: Of batches, initial weights and splits.

    Raises:
        BrixelError: A value is not allowed.
    """

    steps: int = 1000
    batch_size: int = 4096
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decay: float = 0.01
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def describe(self, examples: str) -> str:
        """The protocol in words, for a report; ``examples`` is the name of what a batch consists of."""
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        return (
            f"{self.steps} steps of {self.batch_size} {examples}, seed {self.seed}, learning rate of {rates} chosen on "
            f"{self.held_out:.0%} of the images to fit"
        )


_RULES = {
    **{"steps": whole_number(1), "batch_size": whole_number(1), "seed": whole_number(-(2**63))},
    "learning_rates": several(number(above=0), "one or more numbers above 0", least=1),
    **{"weight_decay": number(0), "held_out": number(above=0, below=1)},
}


@dataclass(frozen=True)
class Probe:
    """A trained readout, (B, D, h, w) -> (B, C, h, w), its learning rate, and the scores of all learning rates."""

    readout: nn.Module
    learning_rate: float
    scores: dict[float, float]


def convolutional_readout(width: int, outputs: int, hidden: int = 32) -> nn.Sequential:
    """The small readout for depth and normals: 1x1 to ``hidden`` channels, 3x3, 3x3, with GELU between."""
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(hidden, outputs, 3, padding=1, padding_mode="replicate"),
    )


class Cells:
    """Single cells as examples, for linear readouts: the same n cells of every image, kept in memory in float16.

    A batch is one map, (1, D, B, 1).
    """

    def __init__(self, features: Features, per_image: int, seed: int = 0) -> None:
        first = features[0]  # D h w
        width, *grid_hw = first.shape
        self.images, self.per_image, self.grid_hw = len(features), min(per_image, math.prod(grid_hw)), grid_hw
        order = torch.randperm(math.prod(grid_hw), generator=torch.Generator().manual_seed(seed))
        self.chosen = order[: self.per_image].sort().values  # indices into the flattened grid
        shape = (self.images, self.per_image, width)
        check_memory(2 * math.prod(shape), f"cells of {self.images} images", "take fewer images (--limit)")
        rows = torch.empty(shape, dtype=torch.float16)
        for index in progress_bar(range(self.images), f"cells, {features.source.name}"):
            rows[index] = rearrange(features[index] if index else first, "d h w -> (h w) d")[self.chosen]
        self._rows = rows.flatten(0, 1)  # images*n D

    def inputs(self, items: Sequence[int]) -> Tensor:
        """(1, D, B, 1), channels last in memory."""
        return self._rows[torch.as_tensor(items)].float()[None, :, None].permute(0, 3, 1, 2)


class Maps:
    """Whole maps as examples, for convolutional readouts; read when they are needed."""

    def __init__(self, features: Features) -> None:
        self.images, self.per_image, self._features = len(features), 1, features

    def inputs(self, items: Sequence[int]) -> Tensor:
        """(B, D, h, w)."""
        return self._features.batch(items)


Examples = Cells | Maps
"""What a readout is trained on: ``per_image`` examples of each of ``images`` images, numbered consecutively."""


def train_probe(
    new: Callable[[int], nn.Module], examples: Examples, loss: Loss, score: Score, settings: ProbeSettings
) -> Probe:
    """Choose the learning rate on held-out images, then train on all images.

    ``new`` makes an untrained readout from D. Raises BrixelError for fewer than two images.
    """
    count = examples.images
    if count < 2:
        raise BrixelError(f"{count} training images; expected at least two, one of them to choose a learning rate on")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held = min(count - 1, max(1, round(settings.held_out * count)))
    chosen, rest = sorted(order[:held]), sorted(order[held:])
    readouts = fit_readouts(new, examples, rest, loss, settings.learning_rates, settings)
    scores = {rate: score(readout, chosen) for rate, readout in zip(settings.learning_rates, readouts, strict=True)}
    best = max(scores, key=lambda rate: scores[rate])
    return Probe(fit_readouts(new, examples, range(count), loss, [best], settings)[0], best, scores)


def fit_readouts(
    new: Callable[[int], nn.Module],
    examples: Examples,
    images: Sequence[int],
    loss: Loss,
    learning_rates: Sequence[float],
    settings: ProbeSettings,
) -> list[nn.Module]:
    """Readouts trained on the images of these numbers, one per learning rate, from the same initial weights."""
    items = items_of(examples, images)
    spaced = items[:: max(1, len(items) // _STATISTICS_ITEMS)].split(settings.batch_size)
    scale = standardised(examples.inputs(batch.tolist()) for batch in spaced)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        initial = new(len(scale.mean))
    readouts = [copy.deepcopy(initial) for _ in learning_rates]
    groups = [{"params": own.parameters(), "lr": rate} for own, rate in zip(readouts, learning_rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    for batch in _batches(items, settings):
        maps = scale(examples.inputs(batch))
        total = torch.stack([loss(readout(maps), batch) for readout in readouts]).sum()  # gradients stay separate
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return [nn.Sequential(scale, readout).eval().requires_grad_(False) for readout in readouts]


def items_of(examples: Examples, images: Sequence[int]) -> Tensor:
    """The numbers of all examples of the images of these numbers."""
    count = examples.per_image
    return (torch.tensor(list(images))[:, None] * count + torch.arange(count)).flatten()


def _batches(items: Tensor, settings: ProbeSettings) -> Iterator[list[int]]:
    """Numbers of the examples of every step, shuffled anew in every epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = items[:0]
    for _ in range(settings.steps):
        while len(left) < settings.batch_size:
            left = torch.cat([left, items[torch.randperm(len(items), generator=generator)]])
        yield left[: settings.batch_size].tolist()
        left = left[settings.batch_size :]
