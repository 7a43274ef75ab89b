"""A small readout on frozen features, trained by one fixed protocol, so that sources differ in their features alone.

Features are brought to mean 0 and deviation 1 per channel (a 1x1 convolution could do it itself), AdamW runs a fixed
number of steps on a cosine schedule, and the learning rate is searched on a fifth of the training images that is held
out meanwhile; then all of them train the readout that is reported. Batches, starts and splits follow from the seed and
are the same for every source. All learning rates are trained side by side on one reading of the features.

Shapes: B batch, D channels, C outputs, h x w cells; n cells drawn from an image.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from brixel.errors import BrixelError
from brixel.evaluate.feature_cache import Features, check_memory

_STATISTICS_ITEMS = 4096  # means and deviations of channels are taken on at most so many examples, evenly spaced

Loss = Callable[[Tensor, Sequence[int]], Tensor]
"""From outputs (B, C, h, w) and the examples' numbers to a mean over what is known there."""

Score = Callable[[nn.Module, Sequence[int]], float]
"""How good a readout is on images, by number; higher is better."""


@dataclass(frozen=True)
class ProbeSettings:
    """The protocol. ``batch_size``: examples of a step, which are cells or maps; ``held_out``: share of the training
    images on which the learning rate is chosen.
    """

    steps: int = 1000
    batch_size: int = 4096
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    weight_decay: float = 0.01
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rates or not 0 < self.held_out < 1:
            raise BrixelError(f"{self} cannot be run; expected steps, batch_size and learning rates, 0 < held_out < 1")


@dataclass(frozen=True)
class Probe:
    """A trained readout, (B, D, h, w) -> (B, C, h, w); its learning rate and the scores of all that were tried."""

    readout: nn.Module
    learning_rate: float
    scores: dict[float, float]


class Standardised(nn.Module):
    """Channels less a mean and over a deviation that stay as they are."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("deviation", deviation[:, None, None])

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) -> the same."""
        return (maps - self.mean) / self.deviation


def linear_readout(width: int, outputs: int) -> nn.Module:
    """One 1x1 convolution, which starts at zero."""
    layer = nn.Conv2d(width, outputs, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def convolutional_readout(width: int, outputs: int, hidden: int = 32) -> nn.Sequential:
    """The small readout for depth and normals: 1x1 to ``hidden`` channels, 3x3, 3x3, with GELU between."""
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(hidden, outputs, 3, padding=1, padding_mode="replicate"),
    )


class Examples(Protocol):
    """What a readout is trained on: ``per_image`` examples of each of ``images`` images, numbered in a row."""

    images: int
    per_image: int

    def inputs(self, items: Sequence[int]) -> Tensor:
        """Features of examples by number, (B, D, h, w), float32."""


class Cells:
    """Single cells as examples, for readouts of one cell: of every image the same n, drawn once.

    The batch is one map, (1, D, B, 1). Kept in memory, in float16.
    """

    def __init__(self, features: Features, per_image: int, seed: int = 0) -> None:
        first = features[0]  # D h w
        width, *grid_hw = first.shape
        self.images, self.per_image, self.grid_hw = len(features), min(per_image, math.prod(grid_hw)), grid_hw
        order = torch.randperm(math.prod(grid_hw), generator=torch.Generator().manual_seed(seed))
        self.chosen = order[: self.per_image].sort().values  # places in the flattened grid
        shape = (self.images, self.per_image, width)
        check_memory(2 * math.prod(shape), f"cells of {self.images} images", "take fewer images (--limit)")
        rows = torch.empty(shape, dtype=torch.float16)
        for number in tqdm(range(self.images), f"cells, {features.source.name}", disable=None):
            rows[number] = (features[number] if number else first).flatten(1)[:, self.chosen].T
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


def train_probe(
    new: Callable[[int], nn.Module], examples: Examples, loss: Loss, score: Score, settings: ProbeSettings
) -> Probe:
    """Search the learning rate on a split of these images, then train on all of them.

    ``new``: from D to an untrained readout. Raises BrixelError for fewer than two images.
    """
    count = examples.images
    if count < 2:
        raise BrixelError(f"{count} training images; expected two at least, one of them to choose a learning rate on")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held = min(count - 1, max(1, round(settings.held_out * count)))
    chosen, rest = sorted(order[:held]), sorted(order[held:])
    readouts = fit(new, examples, rest, loss, settings.learning_rates, settings)
    pairs = zip(settings.learning_rates, readouts, strict=True)
    scores = {rate: score(readout, chosen) for rate, readout in pairs}
    best = max(scores, key=lambda rate: scores[rate])
    return Probe(fit(new, examples, range(count), loss, [best], settings)[0], best, scores)


def fit(
    new: Callable[[int], nn.Module],
    examples: Examples,
    images: Sequence[int],
    loss: Loss,
    learning_rates: Sequence[float],
    settings: ProbeSettings,
) -> list[nn.Module]:
    """Readouts trained on the images of these numbers, one for each learning rate, from one start."""
    items = items_of(examples, images)
    spaced = items[:: max(1, len(items) // _STATISTICS_ITEMS)].split(settings.batch_size)
    scale = _standardised(examples.inputs(batch.tolist()) for batch in spaced)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        first = new(len(scale.mean))
    readouts = [copy.deepcopy(first) for _ in learning_rates]
    groups = [{"params": each.parameters(), "lr": rate} for each, rate in zip(readouts, learning_rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    for batch in _batches(items, settings):
        maps = scale(examples.inputs(batch))
        total = torch.stack([loss(readout(maps), batch) for readout in readouts]).sum()  # their gradients do not meet
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return [nn.Sequential(scale, readout).eval().requires_grad_(False) for readout in readouts]


def items_of(examples: Examples, images: Sequence[int]) -> Tensor:
    """The numbers of all examples of the images of these numbers."""
    each = examples.per_image
    return (torch.tensor(list(images))[:, None] * each + torch.arange(each)).flatten()


def _batches(items: Tensor, settings: ProbeSettings) -> Iterator[list[int]]:
    """Numbers of the examples of every step: shuffled anew whenever all had their turn."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = items[:0]
    for _ in range(settings.steps):
        while len(left) < settings.batch_size:
            left = torch.cat([left, items[torch.randperm(len(items), generator=generator)]])
        yield left[: settings.batch_size].tolist()
        left = left[settings.batch_size :]


def _standardised(batches: Iterable[Tensor]) -> Standardised:
    """Mean and deviation of each channel of maps (B, D, h, w), a batch at a time.

    Sums are taken around the mean of the first batch, so that a large mean does not drown a small deviation.
    """
    count, around, total, squares = 0, torch.zeros(1), torch.zeros(1), torch.zeros(1)
    for maps in batches:
        cells = maps.double().transpose(0, 1).flatten(1)  # D B*h*w
        if not count:
            around = cells.mean(1)
        cells = cells - around[:, None]
        count, total, squares = count + cells.shape[1], total + cells.sum(1), squares + cells.square().sum(1)
    offset = total / count
    deviation = (squares / count - offset.square()).clamp(min=0).sqrt()
    return Standardised((around + offset).float(), deviation.clamp(min=1e-6).float())
