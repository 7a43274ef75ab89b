"""Arguments of the wrong kind on public names: an error of ours that says what was expected, never a raw one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import brixel
from brixel import BrixelError, BrixelFeatures, FeatureMap, FeatureTable, MapFolder, PcaBasis, Reduce
from brixel.images.find_images import SCENE
from brixel.probe import RegressionProbe, SegmentationProbe, load_probe
from brixel.train import TrainConfig, distill
from brixel.video import frames, propagate, write_video

WRONG = {
    "None": None,
    "a number": 5,
    "a fraction": 5.5,
    "bytes": b"x",
    "a list": ["nowhere"],
    "a table": {"a": 1},
    "an object": object(),
    "True": True,
    "an empty text": "",
    "a tensor": torch.zeros(2),
    "three numbers": (1, 2, 3),
}
IMAGE = np.zeros((48, 48, 3), np.uint8)
MASK = np.eye(48, dtype=int)
FEATURES = torch.zeros(1, 4, 3, 3)


@pytest.fixture(scope="module")
def tiny():
    return BrixelFeatures.from_pretrained("brixel-tiny", device="cpu")


@pytest.fixture(scope="module")
def feature_map(tiny):
    return tiny.extract(IMAGE, short_side_px=48)


CALLS = {
    "extract": lambda tiny, _, value: tiny.extract(value),
    "extract, out": lambda tiny, _, value: tiny.extract(IMAGE, out=value) if value is not None else fail(),
    "extract, tiles": lambda tiny, _, value: tiny.extract(IMAGE, tiles=value),
    "stream": lambda tiny, _, value: list(tiny.stream(value)) or fail(),
    "extract_raster": lambda tiny, _, value: tiny.extract_raster(value, "f.tif"),
    "extract_raster, out": lambda tiny, _, value: tiny.extract_raster(SCENE, value),
    "prepare": lambda tiny, _, value: tiny.prepare(value),
    "plan": lambda tiny, _, value: tiny.plan(value),
    "extract_backbone": lambda tiny, _, value: tiny.extract_backbone(value),
    "save_pretrained": lambda tiny, _, value: tiny.save_pretrained(value),
    "from_pretrained": lambda tiny, _, value: BrixelFeatures.from_pretrained(value, device="cpu"),
    "from_backbone": lambda tiny, _, value: BrixelFeatures.from_backbone(value, device="cpu"),
    "cache_dir": lambda tiny, _, value: (
        BrixelFeatures.from_pretrained("brixel-tiny", device="cpu", cache_dir=value) if value is not None else fail()
    ),
    "architecture": lambda tiny, _, value: (
        BrixelFeatures.from_backbone("brixel-tiny", device="cpu", architecture=value) if value is not None else fail()
    ),
    "from_release": lambda tiny, _, value: BrixelFeatures.from_release(value, device="cpu"),
    "similarity": lambda _, found, value: found.similarity(value),
    "at": lambda _, found, value: found.at(value),
    "resize": lambda _, found, value: found.resize(value),
    "pca": lambda _, found, value: found.pca(value) if value is not None else fail(),
    "save": lambda _, found, value: found.save(value),
    "load": lambda tiny, _, value: FeatureMap.load(value),
    "FeatureMap": lambda tiny, _, value: FeatureMap(value, (8, 8), (4.0, 4.0)),
    "MapFolder": lambda tiny, _, value: MapFolder(value),
    "PcaBasis.fit": lambda tiny, _, value: PcaBasis.fit(value),
    "extract, reduce": lambda tiny, _, value: tiny.extract(IMAGE, reduce=value) if value is not None else fail(),
    "Reduce": lambda tiny, _, value: Reduce(value),
    "Reduce.load": lambda tiny, _, value: Reduce.load(value),
    "Reduce.fit": lambda tiny, _, value: Reduce("pca:2").fit(value),
    "Reduce.pca": lambda tiny, _, value: Reduce.pca(value),
    "Reduce.points": lambda _, found, value: Reduce.points(value)(found),
    "Reduce.regions": lambda _, found, value: Reduce.regions(value)(found),
    "reduce": lambda _, found, value: Reduce("int8")(value),
    "restored": lambda _, found, value: found.restored(value) if value is not None else fail(),
    "FeatureTable": lambda _, found, value: FeatureTable(value, value, value, (8, 8)),
    "FeatureTable.load": lambda _, found, value: FeatureTable.load(value),
    "upsample": lambda tiny, _, value: brixel.upsample(value, IMAGE),
    "upsample, image": lambda tiny, _, value: brixel.upsample(FEATURES, value),
    "upsample, size": lambda tiny, _, value: (
        brixel.upsample(FEATURES, IMAGE, size=value) if value is not None else fail()
    ),
    "to_html": lambda _, found, value: found.to_html(value),
    "to_html, image": lambda _, found, value: found.to_html("view.html", value) if value is not None else fail(),
    "view": lambda tiny, _, value: brixel.view(value),
    "view, path": lambda _, found, value: brixel.view(found, value) if value is not None else fail(),
    "view, images": lambda _, found, value: brixel.view(found, images=value) if value is not None else fail(),
    "view, names": lambda _, found, value: brixel.view(found, names=value) if value is not None else fail(),
    "frames": lambda tiny, _, value: frames(value),
    "write_video": lambda tiny, _, value: write_video(value, [IMAGE]),
    "write_video, images": lambda tiny, _, value: write_video("video.mp4", value) if value is not None else fail(),
    "propagate": lambda tiny, found, value: list(propagate(value, [found])),
    "propagate, frames": lambda tiny, _, value: list(propagate(np.zeros((48, 48), int), value, tiny)),
    "distill": lambda tiny, _, value: distill(value),
    "TrainConfig": lambda tiny, _, value: TrainConfig(backbone=value, images=value, out=value),
    "probe": lambda tiny, _, value: SegmentationProbe(tiny).fit(value, [MASK]),
    "probe, masks": lambda tiny, _, value: SegmentationProbe(tiny).fit([IMAGE], value),
    "probe, clicks": lambda tiny, _, value: SegmentationProbe(tiny).fit([IMAGE], clicks=value),
    "probe, model": lambda tiny, _, value: (
        SegmentationProbe(value).fit([IMAGE], [MASK]) if value is not None else fail()
    ),
    "probe, values": lambda tiny, _, value: RegressionProbe(tiny).fit([IMAGE], value),
    "probe, regularisation": lambda tiny, _, value: (
        SegmentationProbe(tiny, regularisation=value).fit([IMAGE], [MASK])
        if not isinstance(value, int | float)
        else fail()
    ),
    "load_probe": lambda tiny, _, value: load_probe(value),
    "the model": lambda tiny, _, value: tiny(value),
}
ALLOWED = {  # what these values mean there
    ("similarity", "a tensor"),
    ("stream", "an empty text"),
    ("view, names", "a list"),
}


def fail():
    raise BrixelError("a call that means something else, or nothing")


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_kind_of_argument_is_an_error_of_ours(tiny, feature_map, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for kind, value in WRONG.items():
        if (call, kind) in ALLOWED:
            continue
        with pytest.raises(BrixelError):
            CALLS[call](tiny, feature_map, value)
            pytest.fail(f"{call} took {kind}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "one",
    ["photo.jpg", Path("photo.jpg"), IMAGE, torch.zeros(3, 48, 48), Image.new("RGB", (48, 48)), IMAGE[..., 0]],
)
def test_one_image_is_no_stream(tiny, one):
    """Its letters or rows would be taken for images."""
    with pytest.raises(BrixelError, match=r"expected several, such as a list: give \[image\], or call extract"):
        tiny.stream(one)


def test_a_batch_of_images_is_a_stream(tiny):
    assert len(list(tiny.stream(np.stack([IMAGE, IMAGE]), short_side_px=48))) == 2
    assert len(list(tiny.stream(torch.zeros(2, 3, 48, 48), short_side_px=48))) == 2


@pytest.mark.parametrize("target", ["nonsense", 5.5, "", ["a"], torch.int64])
def test_a_map_is_converted_to_devices_and_dtypes_only(feature_map, target):
    with pytest.raises(BrixelError):
        feature_map.to(target)


def test_a_map_is_an_array(feature_map):
    array = np.asarray(feature_map)
    assert array.shape == tuple(feature_map.features.shape)
    assert np.array_equal(array, feature_map.numpy())
    assert np.asarray(feature_map, dtype=np.float64).dtype == np.float64
    assert np.array(feature_map).ctypes.data != feature_map.features.data_ptr()
    assert np.asarray(feature_map).ctypes.data == feature_map.features.data_ptr()


def test_missing_files_are_errors_of_ours_and_of_python(tiny, tmp_path):
    for call in (tiny.extract, FeatureMap.load, lambda path: list(tiny.stream([path]))):
        with pytest.raises(BrixelError) as raised:
            call(tmp_path / "nowhere.npy")
        assert isinstance(raised.value, FileNotFoundError)
