"""Maps that are written to a file while they are computed."""

import pytest
import torch

from brixel import BrixelError, BrixelFeatures, FeatureMap
from brixel.inference.memory import budget as budget_module
from brixel.inference.memory import planner as planner_module
from brixel.inference.memory.limited_forward import MemoryLimitedForward

MIB = 2**20


@pytest.mark.parametrize("limit", [None, pytest.param(int(22.2 * MIB), marks=pytest.mark.slow)])
def test_a_map_goes_to_a_file_as_it_is_made(tiny, waves, tmp_path, limit):
    whole = tiny.extract(waves, short_side_px="native")
    path = tmp_path / "map.npy"
    made = tiny.extract(waves, short_side_px="native", out=path, memory_limit=limit, tiles="never")
    torch.testing.assert_close(made.features, whole.features, rtol=1e-4, atol=1e-4)
    loaded = FeatureMap.load(path)
    assert torch.equal(loaded.features, made.features)
    assert (loaded.meta, loaded.image_hw, loaded.stride) == (whole.meta, whole.image_hw, whole.stride)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.npy", "map.npy.json"]


def test_a_file_says_that_its_map_was_made_of_tiles(tiny, waves, tmp_path, monkeypatch):
    monkeypatch.setattr(planner_module, "needed_bytes", lambda *_: 1)
    monkeypatch.setattr(budget_module, "needed_bytes", lambda *_: 1)
    made = tiny.extract(waves, short_side_px="native", out=tmp_path / "map.npy", tiles="always")
    assert made.meta["tiles"].endswith(" of 144x256 px, overlapping by 64 px or more")
    assert FeatureMap.load(tmp_path / "map.npy").meta == made.meta


def test_a_map_in_half_precision_goes_to_a_file_as_float32(waves, tmp_path):
    half = BrixelFeatures.from_pretrained("brixel-tiny", device="cpu", dtype="bfloat16")
    made = half.extract(waves, short_side_px=64, out=tmp_path / "map.npy")
    assert made.features.dtype == torch.float32
    assert torch.equal(made.features, half.extract(waves, short_side_px=64).features.float())


@pytest.mark.parametrize(("name", "message"), [("map.safetensors", "only as .npy"), ("no/map.npy", "not exist")])
def test_where_a_map_cannot_be_made(tiny, waves, tmp_path, name, message):
    with pytest.raises(BrixelError, match=message):
        tiny.extract(waves, out=tmp_path / name)


def test_a_map_that_fails_leaves_the_file_before_it(tiny, waves, tmp_path, monkeypatch):
    path = tmp_path / "map.npy"
    before = tiny.extract(waves[:64, :64], short_side_px="native", out=path)
    monkeypatch.setattr(MemoryLimitedForward, "fill", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.extract(waves, out=path)
    assert FeatureMap.load(path).image_hw == before.image_hw
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("generation", [1, 2])
def test_an_adapter_that_is_not_trained_says_so_once(random_model, waves, caplog, generation):
    second = {"generation": 2, "grids": (2,)} if generation == 2 else {}
    model = random_model("dinov2-vits14", **second)
    model.extract(waves)
    assert not caplog.records
    fresh = random_model("dinov2-vits14", **second)
    torch.nn.init.zeros_(fresh.head.out.weight)
    list(fresh.stream([waves, waves]))
    fresh.extract(waves)
    base = "bilinear interpolation" if generation == 1 else "the universal upsampler"
    assert [record.getMessage() for record in caplog.records] == [
        f"the adapter is not trained yet: its maps are those of {base} alone; train it, or load one"
    ]
