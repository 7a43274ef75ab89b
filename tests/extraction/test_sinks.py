"""Every sink: the same maps, continued where a run stopped, with nothing twice for readers that know no manifest."""

import json

import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr

from brixel import BrixelError, MapFolder, Reduce
from brixel.extraction import extract_files
from brixel.extraction.manifest import SourceImage
from brixel.extraction.map_folder import verify
from brixel.extraction.parts import part_of
from brixel.extraction.sinks import SINKS, Sink
from brixel.extraction.writers import PartWriter
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.feature_map import FeatureMap
from brixel.images.find_images import find_images

# webdataset leaves it to the garbage collector to close its files
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
MANY = tuple(CONTAINERS)


def names_in(folder, sink) -> list[str]:
    """The images in a folder by the library of the format, without the manifest."""
    if sink == "parquet":
        table = pq.read_table(folder / "parquet")
        return sorted(table["image"].to_pylist())
    if sink == "zarr":
        groups = [zarr.open_group(path, mode="r") for path in (folder / "zarr").iterdir()]
        arrays = [array for group in groups for _, array in group.arrays()]
        return sorted(entry["image"] for array in arrays for entry in array.attrs["images"])
    if sink == "webdataset":
        tars = sorted(str(path) for path in (folder / "webdataset").iterdir())
        return sorted(sample["json"]["image"] for sample in webdataset.WebDataset(tars, shardshuffle=False).decode())
    return sorted(name for path in folder.glob("maps-*") for name in CONTAINERS["shards"].images(path))


@pytest.mark.parametrize("sink", SINKS)
def test_every_sink_holds_the_same_maps(model, album, tmp_path, sink):
    out = tmp_path / "out"
    summary = extract_files(model, find_images([album]), out, sink=sink)
    assert (summary.written, summary.failures) == (3, [])
    maps = MapFolder(out)
    assert sorted(maps) == ["a.png", "b.JPG", "sub/a.png"]
    for name, found in maps.items():
        expected = model.extract(album / name)
        assert torch.equal(found.features, expected.features)
        assert (found.image_hw, found.stride) == (expected.image_hw, expected.stride)
        assert found.meta["picture"] == name.rpartition("/")[2]
    assert verify(out) == []
    again = extract_files(model, find_images([album]), out, sink=sink)
    assert (again.written, again.skipped) == (0, 3)


@pytest.mark.parametrize("sink", MANY)
def test_a_shard_size_bounds_the_files(model, album, tmp_path, sink):
    extract_files(model, find_images([album]), tmp_path / "out", sink=sink, shard_bytes=1)
    parts = sorted((tmp_path / "out" / CONTAINERS[sink].folder).glob("maps-*"))
    assert [part_of(path.relative_to(tmp_path / "out").as_posix()).number for path in parts] == [0, 1, 2]
    assert names_in(tmp_path / "out", sink) == sorted(MapFolder(tmp_path / "out"))


@pytest.mark.parametrize("sink", MANY)
def test_what_a_killed_run_left_is_not_read_twice(model, album, tmp_path, sink):
    """A file that was written and not listed yet, and half of one."""
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, sink=sink, shard_bytes=1)
    manifest = out / "manifest-0.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:2]))
    unfinished = out / CONTAINERS[sink].folder / f".{'0' * 32}.part{CONTAINERS[sink].suffix}"
    unfinished.mkdir() if CONTAINERS[sink].is_folder else unfinished.touch()
    summary = extract_files(model, find_images([album]), out, sink=sink)  # one larger file in place of two
    assert (summary.written, summary.skipped) == (2, 1)
    assert names_in(out, sink) == ["a.png", "b.JPG", "sub/a.png"]
    assert not unfinished.exists()
    assert verify(out) == []


@pytest.mark.parametrize("sink", MANY)
def test_a_part_whose_images_have_changed_is_removed(model, album, tmp_path, sink):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, sink=sink)
    for path in album.rglob("*.*"):
        path.touch()
    assert extract_files(model, find_images([album]), out, sink=sink).written == 3
    extract_files(model, find_images([album]), out, sink=sink)
    assert names_in(out, sink) == ["a.png", "b.JPG", "sub/a.png"]


def test_images_that_fail_are_rows_of_parquet_until_they_succeed(model, album, tmp_path):
    out = tmp_path / "out"
    whole = (album / "a.png").read_bytes()
    for name in ("a.png", "sub/a.png"):
        (album / name).write_bytes(whole[:200])
    for _ in range(2):  # no second row for the same failure
        summary = extract_files(model, find_images([album]), out, sink="parquet")
        table = pq.read_table(out / "parquet").to_pylist()
        rows = {row["image"]: row for row in table}
        assert (len(summary.failures), len(table), len(rows)) == (2, 3, 3)
        assert "cannot be decoded" in rows["a.png"]["error"]
        assert rows["a.png"]["features"] is None
        assert rows["b.JPG"]["error"] is None
    (album / "a.png").write_bytes(whole)
    extract_files(model, find_images([album / "a.png"]), out, sink="parquet")
    rows = {row["image"]: row["error"] for row in pq.read_table(out / "parquet").to_pylist()}
    assert rows["a.png"] is None
    assert "cannot be decoded" in rows["sub/a.png"]  # not tried again
    (album / "sub" / "a.png").write_bytes(whole)
    assert extract_files(model, find_images([album]), out, sink="parquet").failures == []
    assert sorted(path.name for path in (out / "parquet").iterdir()) == [f"maps-0-0000{i}.parquet" for i in range(3)]


@pytest.mark.parametrize("sink", MANY)
def test_overwrite_leaves_nothing_of_the_run_before(model, album, tmp_path, sink):
    out = tmp_path / "out"
    whole = (album / "b.JPG").read_bytes()
    (album / "b.JPG").write_bytes(whole[:200])
    extract_files(model, find_images([album]), out, sink=sink, shard_bytes=1)
    extract_files(model, find_images([album / "a.png"]), out, sink=sink, overwrite=True)
    assert names_in(out, sink) == ["a.png"]


def test_another_sink_in_the_same_folder_is_refused(model, album, tmp_path):
    extract_files(model, find_images([album]), tmp_path / "out", sink="parquet")
    with pytest.raises(BrixelError, match=r"saved as: zarr, float32, not parquet, float32"):
        extract_files(model, find_images([album]), tmp_path / "out", sink="zarr")


@pytest.mark.parametrize("sink", ["zarr", "webdataset"])
def test_damage_is_found(model, album, tmp_path, sink):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out, sink=sink)
    file = next(path for path in (out / sink).rglob("*") if path.is_file() and path.stat().st_size > 10**4)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    [message] = verify(out)
    assert message.endswith("changed or damaged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("csv", ".safetensors", None), "sink is 'csv'; expected one of 'files', 'shards', 'parquet', 'zarr'"),
        (("files", ".safetensors", 10**6), "sink 'files', which has a file for each image"),
        (("zarr", ".npy", None), "npy in the sink 'zarr', of another format"),
        (("zarr", ".safetensors", 0), "expected a positive size"),
    ],
)
def test_settings_that_contradict_each_other(arguments, message):
    with pytest.raises(BrixelError, match=message):
        Sink.choose(*arguments)


def test_a_file_ends_before_it_holds_more_numbers_than_its_format_can(tmp_path, monkeypatch):
    monkeypatch.setattr(type(CONTAINERS["parquet"]), "max_values", 40)
    writer = PartWriter(tmp_path, CONTAINERS["parquet"], 10**6, "0")
    feature_map = FeatureMap(torch.ones(4, 2, 2), (8, 8), (4.0, 4.0))
    written = [writer.add(SourceImage(f"{number}.png", 1, 1), feature_map) for number in range(5)]
    files = [file for file in (*written, writer.finish()) if file is not None]
    assert [len(file.images) for file in files] == [2, 2, 1]


def test_names_of_parts():
    assert part_of("parquet/maps-3-00012.parquet") == ("3", 12, ".parquet")
    assert part_of("maps-b0f-00000.safetensors").rank == 0
    for name in ("maps-3-00012.parquet", "zarr/maps-3-00012.tar", "maps-x.safetensors", "sub/maps-0-00000.safetensors"):
        assert part_of(name) is None


def test_a_folder_of_the_first_version_is_read(model, album, tmp_path):
    """Shards keep their names and their entries in the manifest."""
    extract_files(model, find_images([album]), tmp_path / "out", shard_bytes=10**6)
    header, line = map(json.loads, (tmp_path / "out" / "manifest-0.jsonl").read_text().splitlines())
    assert header["settings"]["saved as"] == "shards, float32"
    assert line["file"] == "maps-0-00000.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("sink", SINKS)
def test_every_sink_holds_reduced_maps(model, album, tmp_path, sink):
    out = tmp_path / "out"
    summary = extract_files(model, find_images([album]), out, sink=sink, reduce="pca:4,int8")
    assert (summary.written, summary.failures) == (3, [])
    reduce, maps = Reduce.load(out / "reduce.safetensors"), MapFolder(out)
    for name, found in maps.items():
        expected = reduce(model.extract(album / name))
        assert torch.equal(found.features, expected.features)
        assert found.meta["reduce"] == "pca:4,int8"
        assert found.restored().embed_dim == model.embed_dim
        if sink in ("files", "shards"):  # the others hold the values of the codes
            assert torch.equal(found.scales, expected.scales)
    assert verify(out) == []
    again = extract_files(model, find_images([album]), out, sink=sink, reduce="pca:4,int8")
    assert (again.written, again.skipped) == (0, 3)


def test_features_of_points_go_into_files_and_shards_alone(model, album, tmp_path):
    reduce = Reduce.points([(3.0, 4.0), (5.0, 6.0)])
    extract_files(model, find_images([album]), tmp_path / "out", sink="shards", reduce=reduce)
    table = MapFolder(tmp_path / "out").table("a.png")
    torch.testing.assert_close(table.features, model.extract(album / "a.png").at([(3.0, 4.0), (5.0, 6.0)]))
    for sink in ("parquet", "zarr", "webdataset"):
        with pytest.raises(BrixelError, match=f"the sink '{sink}' does not hold: give 'files' or 'shards'"):
            extract_files(model, find_images([album]), tmp_path / sink, sink=sink, reduce=reduce)


@pytest.mark.parametrize("sink", ["parquet", "zarr", "webdataset"])
def test_a_reduction_to_bfloat16_is_refused_where_it_cannot_be_held(model, album, tmp_path, sink):
    with pytest.raises(BrixelError, match="does not support bfloat16"):
        extract_files(model, find_images([album]), tmp_path / "out", sink=sink, reduce="bfloat16")
