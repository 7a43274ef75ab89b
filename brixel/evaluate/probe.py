"""A small readout on frozen features, trained by one fixed protocol, so that sources differ in their features alone.

Features are brought to mean 0 and deviation 1 per channel (a 1x1 convolution could do it itself), AdamW runs a fixed
number of steps on a cosine schedule, and the learning rate is searched on a fifth of the training pictures that is held
out meanwhile; then all of them train the readout that is reported. Batches, starts and splits follow from the seed and
are the same for every source. All learning rates are trained side by side on one reading of the features.

Shapes: B batch, D channels, C outputs, h x w cells.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.evaluate.feature_store import Features

_STATISTICS_PICTURES = 64  # means and deviations of channels are taken on at most so many

Loss = Callable[[Tensor, Sequence[int]], Tensor]
"""From outputs (B, C, h, w) and the pictures' numbers to a mean over what is known there."""

Score = Callable[[nn.Module, Sequence[int]], float]
"""How good a readout is on pictures, by number; higher is better."""


@dataclass(frozen=True)
class ProbeSettings:
    """The protocol. ``held_out``: share of the training pictures on which the learning rate is chosen."""

    steps: int = 1000
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
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


def convolutional_readout(width: int, outputs: int, hidden: int = 64) -> nn.Module:
    """The small readout for depth and normals: 1x1 to ``hidden`` channels, 3x3, 3x3, with GELU between."""
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(hidden, outputs, 3, padding=1, padding_mode="replicate"),
    )


def train_probe(
    new: Callable[[int], nn.Module], features: Features, loss: Loss, score: Score, settings: ProbeSettings
) -> Probe:
    """Search the learning rate on a split of these pictures, then train on all of them.

    ``new``: from D to an untrained readout. Raises BrixelError for fewer than two pictures.
    """
    count = len(features)
    if count < 2:
        raise BrixelError(f"{count} training pictures; expected two at least, one of them to choose a learning rate on")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held = max(1, round(settings.held_out * count))
    chosen, rest = sorted(order[:held]), sorted(order[held:])
    readouts = fit(new, features, rest, loss, settings.learning_rates, settings)
    pairs = zip(settings.learning_rates, readouts, strict=True)
    scores = {rate: score(readout, chosen) for rate, readout in pairs}
    best = max(scores, key=lambda rate: scores[rate])
    return Probe(fit(new, features, range(count), loss, [best], settings)[0], best, scores)


def fit(
    new: Callable[[int], nn.Module],
    features: Features,
    pictures: Sequence[int],
    loss: Loss,
    learning_rates: Sequence[float],
    settings: ProbeSettings,
) -> list[nn.Module]:
    """Readouts trained on the pictures of these numbers, one for each learning rate, from one start."""
    generator = torch.Generator().manual_seed(settings.seed)
    scale = _standardised(features, pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        first = new(features[pictures[0]].shape[0])
    readouts = [copy.deepcopy(first) for _ in learning_rates]
    groups = [{"params": each.parameters(), "lr": rate} for each, rate in zip(readouts, learning_rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    for batch in _batches(pictures, settings, generator):
        maps = scale(features.batch(batch))
        total = torch.stack([loss(readout(maps), batch) for readout in readouts]).sum()  # their gradients do not meet
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
    return [nn.Sequential(scale, readout).eval().requires_grad_(False) for readout in readouts]


def _batches(pictures: Sequence[int], settings: ProbeSettings, generator: torch.Generator) -> list[list[int]]:
    """Numbers of the pictures of every step: shuffled anew whenever all had their turn."""
    needed = settings.steps * settings.batch_size
    numbers: list[int] = []
    while len(numbers) < needed:
        numbers += [pictures[place] for place in torch.randperm(len(pictures), generator=generator).tolist()]
    return [numbers[first : first + settings.batch_size] for first in range(0, needed, settings.batch_size)]


def _standardised(features: Features, pictures: Sequence[int]) -> Standardised:
    """Mean and deviation of each channel over evenly spaced ones of the pictures."""
    step = max(1, len(pictures) // _STATISTICS_PICTURES)
    sums, squares, cells = torch.zeros(()), torch.zeros(()), 0
    for picture in list(pictures)[::step]:
        maps = features[picture].double().flatten(1)  # D h*w
        sums, squares, cells = sums + maps.sum(1), squares + maps.square().sum(1), cells + maps.shape[1]
    mean = sums / cells
    deviation = (squares / cells - mean.square()).clamp(min=1e-12).sqrt()
    return Standardised(mean.float(), deviation.float())
