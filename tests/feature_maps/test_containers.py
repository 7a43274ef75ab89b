"""Files of many maps, each read by the library of its format and by ours."""

import math
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr

from brixel import BrixelError, FeatureMap
from brixel.errors import DamagedFileError, MissingFileError
from brixel.feature_maps.containers.base import StoredMap
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.containers.parquet import FailedImage, maps_table

# webdataset leaves it to the garbage collector to close its files
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
DTYPES = (torch.float16, torch.float32, torch.float64)
NAMES = ("a.jpg", "sub.d/b.c%2E.png", "sub.d/ü x.png", "c.jpg")


def stored_maps(dtype: torch.dtype = torch.float32) -> list[StoredMap]:
    """Maps of two shapes, with -0, NaN and infinities among the values, and zeros alone in the last."""
    torch.manual_seed(0)
    maps = []
    for number, name in enumerate(NAMES):
        features = torch.randn(5, 2 + number % 2, 3).to(dtype)
        features[0, 0] = torch.tensor([-0.0, math.nan, math.inf])
        if name == NAMES[-1]:
            features.zero_()
        geometry = {"image_hw": (12, 12), "stride": (12 / (2 + number % 2), 4.0), "meta": {"picture": name}}
        maps.append(StoredMap(name, features, geometry))
    return maps


def bits(array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_come_back_bit_for_bit(container, dtype, tmp_path):
    path, maps = tmp_path / f"maps{container.suffix}", stored_maps(dtype)
    container.write(path, maps)
    assert sorted(container.images(path)) == sorted(NAMES)
    for stored in maps:
        found = FeatureMap.load(path, image=stored.image)
        assert found.features.dtype == dtype
        assert bits(found.features.numpy()) == bits(stored.features.numpy())
        assert (found.image_hw, found.stride, dict(found.meta)) == tuple(stored.geometry.values())


def test_a_container_of_one_map_needs_no_name(tmp_path):
    for name in ("parquet", "zarr", "webdataset"):
        path = tmp_path / f"maps{CONTAINERS[name].suffix}"
        CONTAINERS[name].write(path, stored_maps()[:1])
        assert torch.equal(FeatureMap.load(path).features.nan_to_num(), stored_maps()[0].features.nan_to_num())
        with pytest.raises(BrixelError, match=r"holds no map of 'A\.jpg'; did you mean 'a\.jpg'"):
            FeatureMap.load(path, image="A.jpg")


def test_a_file_of_one_map_has_no_images_to_name(tmp_path):
    FeatureMap(torch.ones(4, 2, 2), (8, 8), (4.0, 4.0)).save(tmp_path / "map.npy")
    with pytest.raises(BrixelError, match=r"map\.npy holds no maps by image, and image='a\.jpg' was given"):
        FeatureMap.load(tmp_path / "map.npy", image="a.jpg")


def test_a_container_of_several_maps_asks_for_a_name(tmp_path):
    CONTAINERS["parquet"].write(tmp_path / "maps.parquet", stored_maps())
    with pytest.raises(BrixelError, match="holds the maps of 4 images; name one of them with image="):
        FeatureMap.load(tmp_path / "maps.parquet")


def test_containers_that_are_gone_or_damaged_say_so(container, tmp_path):
    path = tmp_path / f"maps{container.suffix}"
    with pytest.raises(MissingFileError, match="does not exist"):
        FeatureMap.load(path, image="a.jpg")
    container.write(path, stored_maps())
    file = path / "zarr.json" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DamagedFileError, match=r"maps\.\w+ is damaged or not a"):
        FeatureMap.load(path, image="a.jpg")


def test_bfloat16_is_refused_where_a_format_lacks_it():
    CONTAINERS["shards"].check_dtype(torch.bfloat16)
    for name in ("parquet", "zarr", "webdataset"):
        with pytest.raises(BrixelError, match="does not support bfloat16: write shards, or save as float16 or float32"):
            CONTAINERS[name].check_dtype(torch.bfloat16)


def test_names_that_are_no_utf8_are_refused(container):
    with pytest.raises(BrixelError, match="is no UTF-8"):
        container.check_image("\udcff.jpg")


@pytest.mark.parametrize(
    ("dtype", "arrow"), [(DTYPES[0], pa.float16()), (DTYPES[1], pa.float32()), (DTYPES[2], pa.float64())]
)
def test_pyarrow_reads_a_row_for_each_image(tmp_path, dtype, arrow):
    maps = stored_maps(dtype)
    CONTAINERS["parquet"].write(tmp_path / "maps.parquet", maps)
    table = pq.read_table(tmp_path / "maps.parquet")
    assert table.schema.field("features").type.value_type == arrow
    for stored, row in zip(maps, table.to_pylist(), strict=True):
        features = np.array(row["features"], stored.features.numpy().dtype).reshape(row["shape"])
        np.testing.assert_array_equal(features, stored.features.numpy())
        assert (row["image"], row["error"]) == (stored.image, None)
        assert (row["image_hw"], row["stride"]) == ([12, 12], list(stored.geometry["stride"]))
        assert dict(row["meta"]) == {"picture": stored.image}


def test_an_image_without_a_map_is_a_row_with_an_error():
    maps = stored_maps()
    rows = [maps[0], FailedImage("bad.jpg", "cut short"), maps[1]]
    found = maps_table(rows, torch.float32).to_pylist()
    assert [row["image"] for row in found] == ["a.jpg", "bad.jpg", NAMES[1]]
    assert found[1] == {**dict.fromkeys(found[1]), "image": "bad.jpg", "error": "cut short"}
    assert len(found[2]["features"]) == maps[1].features.numel()
    empty = maps_table([rows[1]], torch.float16)
    assert empty.schema.equals(maps_table(stored_maps(torch.float16), torch.float16).schema)


def test_row_groups_are_small_enough_to_read_one_map(tmp_path, monkeypatch):
    monkeypatch.setattr("brixel.feature_maps.containers.parquet._ROW_GROUP_BYTES", 2 * 5 * 3 * 3 * 4)
    CONTAINERS["parquet"].write(tmp_path / "maps.parquet", stored_maps())
    metadata = pq.read_metadata(tmp_path / "maps.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2, 2]
    assert FeatureMap.load(tmp_path / "maps.parquet", image=NAMES[2]).meta["picture"] == NAMES[2]


def test_more_numbers_than_a_column_of_lists_holds_are_refused(monkeypatch):
    monkeypatch.setattr("brixel.feature_maps.containers.parquet.MAX_LIST_VALUES", 100)
    with pytest.raises(BrixelError, match="4 maps have 150 numbers, and a Parquet column of lists at most 100"):
        maps_table(stored_maps(), torch.float32)


def test_zarr_reads_one_sharded_array_for_each_shape(tmp_path):
    maps = stored_maps()
    CONTAINERS["zarr"].write(tmp_path / "maps.zarr", maps)
    group = zarr.open_group(tmp_path / "maps.zarr", mode="r")
    assert sorted(name for name, _ in group.arrays()) == ["5x2x3", "5x3x3"]
    array = group["5x3x3"]
    assert (array.metadata.zarr_format, array.shape, array.chunks, array.shards) == (
        *(3, (2, 5, 3, 3)),
        *((1, 5, 3, 3), (2, 5, 3, 3)),
    )
    assert array.metadata.dimension_names == ("image", "channel", "y", "x")
    assert [entry["image"] for entry in array.attrs["images"]] == [NAMES[1], NAMES[3]]
    assert array.attrs["images"][0]["stride"] == [4.0, 4.0]
    assert bits(array[0]) == bits(maps[1].features.numpy())
    assert len([path for path in (tmp_path / "maps.zarr" / "5x3x3" / "c").rglob("*") if path.is_file()]) == 1


def test_a_lost_shard_of_zarr_is_no_map_of_zeros(tmp_path):
    """Zarr itself takes what is missing for the fill value."""
    CONTAINERS["zarr"].write(tmp_path / "maps.zarr", stored_maps())
    [shard] = [path for path in (tmp_path / "maps.zarr" / "5x2x3" / "c").rglob("*") if path.is_file()]
    shard.unlink()
    with pytest.raises(MissingFileError, match=r"maps\.zarr/5x2x3/c/0/0/0/0 does not exist"):
        FeatureMap.load(tmp_path / "maps.zarr", image="a.jpg")


def test_webdataset_reads_a_sample_for_each_image(tmp_path):
    maps = stored_maps()
    CONTAINERS["webdataset"].write(tmp_path / "maps.tar", maps)
    samples = list(webdataset.WebDataset(str(tmp_path / "maps.tar"), shardshuffle=False).decode())
    assert [sample["json"]["image"] for sample in samples] == list(NAMES)
    assert samples[1]["__key__"] == "sub.d/b%2Ec%252E%2Epng"
    for stored, sample in zip(maps, samples, strict=True):
        assert bits(sample["features.npy"]) == bits(stored.features.numpy())
        assert sample["json"]["stride"] == list(stored.geometry["stride"])


def test_a_tar_is_the_same_bytes_for_the_same_maps(tmp_path):
    for name in ("a.tar", "b.tar"):
        CONTAINERS["webdataset"].write(tmp_path / name, stored_maps())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[:2] == ["a%2Ejpg.features.npy", "a%2Ejpg.json"]
