"""What a probe asks for at once, and what it makes of it."""

import pytest
import torch
from torch import nn

from brixel.evaluate.feature_cache import Features
from brixel.evaluate.feature_sources import FeatureSource
from brixel.evaluate.probes.training import Maps, ProbeSettings, fit_readouts


class Counting(Maps):
    """Maps that note how many are asked for at once."""

    def __init__(self, features):
        super().__init__(features)
        self.asked = []

    def inputs(self, items):
        self.asked.append(list(items))
        return super().inputs(items)


@pytest.mark.parametrize("mean", [0, 1e4])
def test_channels_are_standardised_a_batch_at_a_time(mean):
    generator = torch.Generator().manual_seed(0)
    maps = [mean + torch.randn(5, 6, 7, generator=generator) * torch.arange(5)[:, None, None] for _ in range(11)]
    examples = Counting(Features(FeatureSource("planted", nn.Identity(), 8), maps))
    images, settings = [0, 1, 2, 4, 5, 7, 8, 9, 10], ProbeSettings(steps=1, batch_size=2)
    readout = fit_readouts(
        lambda width: nn.Conv2d(width, 1, 1), examples, images, lambda out, _: out.mean(), [0.1], settings
    )
    scale = readout[0][0]
    cells = torch.stack([maps[number] for number in images]).double().transpose(0, 1).flatten(1)
    assert torch.allclose(scale.mean.flatten(), cells.mean(1).float(), rtol=1e-6)
    expected = cells.std(1, correction=0).clamp(min=1e-6).float()  # the first channel is constant
    assert torch.allclose(scale.deviation.flatten(), expected, rtol=1e-6, atol=0)
    assert max(map(len, examples.asked)) == 2
    before_the_step = [number for batch in examples.asked[:-1] for number in batch]
    assert before_the_step == images
