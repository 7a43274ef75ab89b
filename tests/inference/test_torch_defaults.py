"""Programs around us that changed PyTorch's defaults: the maps are the same, or the call is refused."""

import contextlib

import numpy as np
import pytest
import torch

import brixel
from brixel import BrixelError, BrixelFeatures
from brixel.utils.torch_defaults import plain_defaults

KINDS = ["released", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bundled", "universal"))]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def surroundings():
    return {
        "default dtype bfloat16": default_dtype(torch.bfloat16),
        "default dtype float16": default_dtype(torch.float16),
        "default dtype float64": default_dtype(torch.float64),
        "another default device": torch.device("meta"),  # as "cuda" would be
        "autocast bfloat16": torch.autocast("cpu", torch.bfloat16),
        "autocast float16": torch.autocast("cpu", torch.float16),
    }


@pytest.fixture(scope="module")
def models(random_model):
    bundled = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")
    return {
        "released": random_model("dinov2-vits14", detour=True).eval(),
        "blended": random_model("dinov2-vits14", blend=True).eval(),
        "mixed": random_model("dinov2-vits14", blend=True, own_share=0.5).eval(),
        "bundled": bundled,
        "universal": BrixelFeatures.from_backbone("brixel-tiny", device="cpu"),
    }


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (75, 90, 3), dtype=np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("name", surroundings())
@pytest.mark.parametrize("kind", KINDS)
def test_maps_do_not_depend_on_the_surroundings(models, noise, kind, name):
    model, side = models[kind], 70
    want, backbone = model.extract(noise, short_side_px=side), model.extract_backbone(noise, short_side_px=side)
    pixels, plan = model.prepare(noise, short_side_px=side)[0], model.plan((300, 400), memory_limit="4GiB")
    upsampled = brixel.upsample(backbone.features[None], noise, 2)
    with surroundings()[name]:
        assert torch.equal(model.prepare(noise, short_side_px=side)[0], pixels)
        torch.testing.assert_close(model.extract(noise, short_side_px=side).features, want.features)
        (streamed,) = model.stream([noise], short_side_px=side, workers=1)
        torch.testing.assert_close(streamed.features, want.features)
        torch.testing.assert_close(model.extract_backbone(noise, short_side_px=side).features, backbone.features)
        torch.testing.assert_close(brixel.upsample(backbone.features[None], noise, 2), upsampled)
        assert model.plan((300, 400), memory_limit="4GiB") == plan
        likeness = want.similarity((30, 40))
        colours = want.pca()
    assert np.array_equal(colours, want.pca())
    assert torch.equal(likeness, want.similarity((30, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*KINDS, "blended", "mixed"])
def test_a_model_under_autocast_is_near_and_has_gradients(models, kind, dtype):
    model = models[kind]
    pixels = torch.randn(1, 3, 4 * model.patch_px, 5 * model.patch_px)
    with torch.no_grad():
        want = model(pixels)
    pixels.requires_grad_()
    with torch.autocast("cpu", dtype):
        made = model(pixels)
        if dtype == torch.bfloat16:  # on the CPU some gradients do not exist in float16
            made.float().mean().backward()
            assert pixels.grad.isfinite().all()
    assert (made.detach().float() - want).abs().mean() < 0.05 * want.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_load_the_same_under_another_default_dtype(dtype):
    want = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu").state_dict()
    with default_dtype(dtype):
        loaded = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 9, 9).to_sparse(), "is sparse_coo; give tensor.to_dense"),
        (torch.empty(3, 9, 9, device="meta"), "on the meta device, without data"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(models, tensor, message):
    with pytest.raises(BrixelError, match=message):
        models["bundled"].extract(tensor)
    with pytest.raises(BrixelError, match=message):
        brixel.upsample(tensor, tensor)


def test_whole_jobs_may_set_the_default_dtype_and_restore_it():
    with default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16):
        with plain_defaults(dtype=True):
            assert torch.get_default_dtype() == torch.float32
            assert not torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
