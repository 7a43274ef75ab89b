"""The fit of the blend, against ridge regression in numpy."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from brixel import BrixelError, BrixelFeatures
from brixel.model.adapter import Adapter
from brixel.train import TrainConfig, distill
from brixel.train.distributed import DistributedContext
from brixel.train.fit_blend import RIDGE, BlendFit, TargetScale, is_fresh, micro_batches_to_fit
from brixel.train.loader import TrainingData

ALONE = DistributedContext(0, 1, torch.device("cpu"))
WIDTH = 32


def fresh_blend():
    return Adapter(WIDTH, blend=True).blend


def fit_blend(blend, block_maps, micro_batches, context):
    fit = BlendFit(blend)
    for pixels, teacher in micro_batches:
        fit.add(block_maps(pixels), teacher)
    fit.solve(context)


def backbone_maps(pixels, seed=0):
    """Four maps that are linear in the pixels, plus noise; every block has its own matrix."""
    cells = F.adaptive_avg_pool2d(pixels, (4, 5))  # B 3 4 5
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(4, WIDTH, 3, generator=generator)
    noise = torch.Generator().manual_seed(int(pixels.abs().sum() * 1000) % 2**31)
    return [
        torch.einsum("dc,bchw->bdhw", matrix, cells) + torch.randn(len(pixels), WIDTH, 4, 5, generator=noise)
        for matrix in matrices
    ]


def random_micro_batches(count=3, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 3, 8, 10, generator=generator), torch.randn(batch, WIDTH, 16, 20, generator=generator))
        for _ in range(count)
    ]


def reference_fit(micro_batches):
    """Ridge regression towards the last map, cell by cell, in numpy."""
    inputs, targets = [], []
    for pixels, teacher in micro_batches:
        maps = [block_map.numpy().astype(np.float64) for block_map in backbone_maps(pixels)]
        for item in range(len(pixels)):
            for row in range(4):
                for column in range(5):
                    inputs.append(np.concatenate([*(block_map[item, :, row, column] for block_map in maps), [1.0]]))
                    below = teacher[item, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
                    targets.append(below.astype(np.float64).mean((1, 2)))
    inputs, targets = np.array(inputs), np.array(targets)
    start = np.zeros((4 * WIDTH + 1, WIDTH))
    start[3 * WIDTH : 4 * WIDTH] = np.eye(WIDTH)
    pull = np.sqrt(RIDGE * (inputs**2).sum(0).mean())
    rows = np.concatenate([inputs, pull * np.eye(len(start))])
    return np.linalg.lstsq(rows, np.concatenate([targets, pull * start]), rcond=None)[0].T


@pytest.mark.slow
def test_the_fit_is_ridge_regression_towards_the_last_map():
    blend, micro_batches = fresh_blend(), random_micro_batches()
    fit_blend(blend, backbone_maps, micro_batches, ALONE)
    expected = torch.from_numpy(reference_fit(micro_batches))
    torch.testing.assert_close(blend.weight.double(), expected[:, :-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(blend.bias.double(), expected[:, -1], rtol=0, atol=1e-6)


def test_the_fit_does_not_depend_on_how_crops_are_batched():
    whole, parts = fresh_blend(), fresh_blend()
    [(pixels, teacher)] = random_micro_batches(1, batch=6)

    def maps_of(pixels):  # image by image, so that they do not depend on the batch
        per_image = [backbone_maps(image[None]) for image in pixels]
        return [torch.cat(maps) for maps in zip(*per_image, strict=True)]

    fit_blend(whole, maps_of, [(pixels, teacher)], ALONE)
    fit_blend(parts, maps_of, [(pixels[:1], teacher[:1]), (pixels[1:], teacher[1:])], ALONE)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=0, atol=1e-6)


def test_a_linear_teacher_is_recovered():
    """A teacher that is itself a blend of the maps is recovered, up to the ridge of one per cent."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(WIDTH, 4 * WIDTH, generator=generator) / (4 * WIDTH) ** 0.5
    micro_batches = []
    for pixels, _ in random_micro_batches(20, batch=8):
        low = torch.einsum("ed,bdhw->behw", truth, torch.cat(backbone_maps(pixels), 1)) + 0.5
        micro_batches.append((pixels, low.repeat_interleave(4, 2).repeat_interleave(4, 3)))
    blend = fresh_blend()

    def error():
        maps = torch.cat(backbone_maps(micro_batches[0][0]), 1).permute(0, 2, 3, 1)
        return float((blend(maps).permute(0, 3, 1, 2) - micro_batches[0][1][..., ::4, ::4]).detach().abs().mean())

    before = error()
    fit_blend(blend, backbone_maps, micro_batches, ALONE)
    assert error() < 0.05 * before


def test_fresh_is_the_last_map_alone():
    blend = fresh_blend()
    assert is_fresh(blend)
    maps = [torch.randn(2, WIDTH, 3, 4) for _ in range(4)]
    assert torch.equal(Adapter(WIDTH, blend=True).base(maps), maps[-1])
    assert Adapter(WIDTH).base(maps) is maps[-1]
    for name, index in (("weight", (0, 0)), ("weight", (0, -1)), ("bias", 0)):
        other = fresh_blend()
        with torch.no_grad():
            getattr(other, name)[index] += 0.5
        assert not is_fresh(other)


def test_values_that_are_not_finite_leave_the_blend_unchanged():
    blend, micro_batches = fresh_blend(), random_micro_batches()
    micro_batches[1][1][0, 0, 0, 0] = torch.inf
    fit_blend(blend, backbone_maps, micro_batches, ALONE)
    assert is_fresh(blend)


def test_maps_that_do_not_fit_are_refused():
    pixels = torch.randn(2, 3, 8, 10)
    with pytest.raises(
        BrixelError, match=r"the teacher's maps have shape \(2, 32, 16, 16\); expected \(2, 32, 16, 20\)"
    ):
        fit_blend(fresh_blend(), backbone_maps, [(pixels, torch.randn(2, WIDTH, 16, 16))], ALONE)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"fit": 100, "steps": 50}, 13),
        ({"fit": 100, "steps": 5}, 5),
        ({"fit": 100, "steps": 3, "accumulate": 2}, 6),
        ({"fit": 100, "steps": 50, "cache": 24}, 3),
        ({"fit": 0, "steps": 50, "generation": 1}, 0),
        ({"fit": 0, "steps": 50}, 8),  # for the teacher's scale
        ({"fit": 100, "steps": 50, "sizes": (56, 112)}, 20),
    ],
)
def test_the_fit_uses_no_more_crops_than_the_run_reads(settings, count):
    config = TrainConfig(backbone="b", images=("i",), out="o", batch_size=4, **settings)
    assert micro_batches_to_fit(config, 2) == count


# ---------------------------------------------------------------- in a run


@pytest.fixture
def config(backbone_folder, image_path, tmp_path):
    return TrainConfig(
        **{"backbone": str(backbone_folder), "images": str(image_path.parent), "out": str(tmp_path / "out")},
        **{"teacher_px": 112, "steps": 2, "batch_size": 2, "warmup": 1, "workers": 0, "device": "cpu"},
    )


def blend_of(folder):
    tensors = load_file(folder / "adapter.safetensors")
    return tensors["adapter.blend.weight"], tensors["adapter.blend.bias"]


@pytest.mark.slow
def test_a_run_fits_its_blend_and_keeps_it(config, tmp_path):
    fitted = BrixelFeatures.from_backbone(config.backbone, adapter="fresh", device="cpu")
    data = TrainingData(config, fitted.config.backbone, fitted.backbone_features, "the backbone", ALONE)
    micro_batches = list(data.micro_batches(0))
    fit_blend(fitted.adapter.blend, partial(fitted.backbone.block_maps, blocks=fitted.blocks), micro_batches, ALONE)
    distill(config)
    weight, bias = blend_of(tmp_path / "out")
    assert not is_fresh(fitted.adapter.blend)
    assert torch.equal(weight, fitted.adapter.blend.weight)
    assert torch.equal(bias, fitted.adapter.blend.bias)


@pytest.mark.slow
def test_a_run_measures_the_teacher_s_scale(config, tmp_path):
    distill(config)
    model = BrixelFeatures.from_pretrained(tmp_path / "out", device="cpu")
    data = TrainingData(config, model.config.backbone, model.backbone_features, "the backbone", ALONE)
    cells = torch.cat([teacher.transpose(0, 1).flatten(1) for _, teacher in data.micro_batches(0)], 1)
    torch.testing.assert_close(model.upsampler.feature_mean, cells.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.upsampler.feature_std, cells.std(1, correction=0), rtol=1e-4, atol=1e-5)


def test_a_channel_that_never_changes_keeps_a_scale_above_zero(config):
    upsampler = BrixelFeatures.from_backbone(config.backbone, adapter="fresh", device="cpu").upsampler
    scale, teacher = TargetScale(upsampler), torch.randn(2, 64, 4, 4)
    teacher[:, 5] = 3
    scale.add(teacher)
    scale.store(ALONE)
    assert upsampler.feature_mean[5] == 3
    assert 0.01 < upsampler.feature_std[5] < 0.1


@pytest.mark.slow
def test_without_a_fit_the_blend_stays_the_last_map(config, tmp_path):
    distill(dataclasses.replace(config, fit=0))
    model = BrixelFeatures.from_pretrained(tmp_path / "out", device="cpu")
    assert is_fresh(model.adapter.blend)


@pytest.mark.slow
def test_a_blend_that_was_trained_before_is_left_alone(config, tmp_path):
    first = distill(config)
    weight = first.adapter.blend.weight.detach().clone()
    distill(dataclasses.replace(config, out=str(tmp_path / "second"), seed=5), model=first)
    assert torch.equal(blend_of(tmp_path / "second")[0], weight)
