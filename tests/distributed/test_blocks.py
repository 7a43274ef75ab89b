"""What needs no cluster: the actor that writes a block, records of blocks, and the names of sources."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from brixel import BrixelError
from brixel.distributed import blocks
from brixel.distributed.actors import BlockActor, FeatureActor, load_model
from brixel.distributed.blocks import FinishedBlock, block_name, find_block, list_recorded_blocks, record_block
from brixel.distributed.cluster import _check_reachable
from brixel.distributed.ray import _find, extract_dataset
from brixel.distributed.sources import StreamedSource, list_objects, read_object
from brixel.errors import DamagedFileError, MissingFileError
from brixel.extraction.distributed import ProcessShare
from brixel.extraction.manifest import Manifest, SourceImage, WrittenFile
from brixel.extraction.sinks import Sink
from brixel.images.find_images import FoundImages

SETTINGS = {"weights": "ab"}
SOURCES = [SourceImage("a.png", 3, 1), SourceImage("b.png", 4, 1)]


@pytest.fixture
def finished(tmp_path) -> FinishedBlock:
    file = WrittenFile("parquet/maps-b0-00000.parquet", 7, "00", tuple(SOURCES))
    return FinishedBlock(block_name(SETTINGS, SOURCES), (file,), {"c.png": "cut short"})


def test_a_block_is_found_again_by_its_images(finished, tmp_path):
    assert find_block(tmp_path, finished.name) is None
    record_block(tmp_path, finished)
    assert find_block(tmp_path, finished.name) == finished


def test_other_images_or_settings_are_another_block():
    names = [
        block_name(SETTINGS, SOURCES),
        block_name({"weights": "cd"}, SOURCES),
        block_name(SETTINGS, SOURCES[:1]),
        block_name(SETTINGS, [SourceImage("a.png", 3, 2), SOURCES[1]]),
    ]
    assert len(set(names)) == 4
    assert block_name(SETTINGS, SOURCES) == names[0]
    assert len(names[0]) == 32
    assert not names[0].isdecimal()


def test_recorded_blocks_are_listed_once(finished, tmp_path):
    record_block(tmp_path, finished)
    damaged = tmp_path / ".blocks" / "b1.json"
    damaged.write_text("{")
    with Manifest(tmp_path, SETTINGS, ProcessShare()) as manifest:
        manifest.begin()
        assert list_recorded_blocks(tmp_path, manifest) == 2
        record_block(tmp_path, finished)  # by a worker that outlived its driver
        assert list_recorded_blocks(tmp_path, manifest) == 0
    with Manifest(tmp_path, SETTINGS, ProcessShare()) as manifest:
        assert [file.file for file in manifest.written] == ["parquet/maps-b0-00000.parquet"]
    assert list((tmp_path / ".blocks").iterdir()) == []


def test_a_record_does_not_lead_out_of_its_folder(finished, tmp_path):
    outside = FinishedBlock("b1", (WrittenFile("../x.parquet", 7, "00", ()),), {})
    record_block(tmp_path, outside)
    with pytest.raises(DamagedFileError, match=r"b1\.json is damaged or not the record of a block"):
        find_block(tmp_path, "b1")


# ---------------------------------------------------------------- actors


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 40), (number * 40, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def batch():
    """Four images with their bytes: the second is cut short, the third has a name that leads out of the folder."""
    contents = [encoded(0), encoded(1)[:60], encoded(2), encoded(3)]
    names = ["d/0.png", "1.png", "../2.png", "3.png"]
    return {"image": np.array(names, object), "bytes": np.array(contents, object)}


def options(**changes):
    usual = {"short_side_px": 28, "memory_limit": None, "threads": 1}
    return {**usual, **changes}


def test_an_actor_gives_a_row_for_each_image(model, batch):
    rows = FeatureActor(lambda: model, short_side_px=28, save_dtype="float16")(batch).to_pylist()
    assert [row["image"] for row in rows] == ["d/0.png", "1.png", "../2.png", "3.png"]
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    expected = model.extract(Image.open(io.BytesIO(encoded(3))), short_side_px=28).features.half()
    features = np.array(rows[3]["features"], np.float16).reshape(rows[3]["shape"])
    np.testing.assert_array_equal(features, expected.numpy())


def test_a_block_is_written_once(model, batch, tmp_path, monkeypatch):
    actor = BlockActor(lambda: model, tmp_path, Sink("shards"), SETTINGS, None, **options())
    row = actor(batch)
    block = FinishedBlock.from_json(row["name"][0], row["block"][0], tmp_path)
    assert [image.relative_path for image in block.files[0].images] == ["d/0.png", "3.png"]
    assert sorted(block.failures) == ["../2.png", "1.png"]
    assert "outside of its folder" in block.failures["../2.png"]
    monkeypatch.setattr(type(model), "stream_all", None)  # the second attempt computes nothing
    assert actor(batch) == row


def test_an_attempt_that_died_is_written_over(model, batch, tmp_path):
    first = BlockActor(lambda: model, tmp_path, Sink("zarr"), SETTINGS, None, **options())
    row = first(batch)
    blocks.forget_block(tmp_path, row["name"][0])
    assert first(batch) == row
    assert len(list((tmp_path / "zarr").iterdir())) == 1


def test_two_images_of_one_name_are_not_silently_one(model, batch, tmp_path):
    batch["image"][3] = "d/0.png"
    row = BlockActor(lambda: model, tmp_path, Sink("files"), SETTINGS, None, **options())(batch)
    block = FinishedBlock.from_json(row["name"][0], row["block"][0], tmp_path)
    assert block.failures["d/0.png"] == "d/0.png: another image has that name"
    assert len(block.files) == 1


def test_what_is_reduced_is_what_is_stored(model, batch, tmp_path):
    def first_channels(feature_map):
        return type(feature_map)(feature_map.features[:3], feature_map.image_hw, feature_map.stride, feature_map.meta)

    rows = FeatureActor(lambda: model, short_side_px=28, reduce=first_channels)(batch).to_pylist()
    assert rows[0]["shape"][0] == 3


def test_models_that_cannot_be_sent_are_refused(model):
    with pytest.raises(BrixelError, match=r"model is a BrixelFeatures, .*: give the folder that save_pretrained wrote"):
        load_model(model)


# ---------------------------------------------------------------- sources


def test_sources_by_their_names(tmp_path, album):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.tar").touch()
    assert isinstance(_find(album, None, None), FoundImages)
    assert _find([tmp_path / "a.tar"], None, None) == StreamedSource((str(tmp_path / "a.tar"),))
    for source, message in (
        ([], "no images: give files"),
        ([tmp_path / "a.tar", album], "is given with paths of other kinds"),
        ([tmp_path / "absent.parquet"], "no file at"),
        (tmp_path / "absent", "no image or folder at"),
        ([f"file://{album}", album], "beside local paths"),
        ([f"file://{album}", f"file://{album}"], "two objects would be written as"),
        (f"file://{tmp_path}/absent", "no images at file://"),
        ("nowhere://x", "names no file system that pyarrow reads"),
    ):
        with pytest.raises(BrixelError, match=message):
            _find(source, None, None)


def test_objects_are_those_of_the_folder(album):
    listed = list_objects(f"file://{album}")
    assert [image.relative_path for _, image in listed] == ["a.png", "b.JPG", "sub/a.png"]
    for uri, image in listed:
        path = album / image.relative_path
        stat = path.stat()
        assert read_object(uri) == path.read_bytes()
        assert (image.size_bytes, image.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_columns_that_are_not_there(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"number": [1], "jpg": [b"x"], "text": ["x"]}), path)
    for source, message in (
        (StreamedSource((path,)), "has the columns number, jpg, text: name one as name_column="),
        (StreamedSource((path,), "jpeg"), "bytes_column is 'jpeg', which .* lacks; did you mean 'jpg'"),
        (StreamedSource((path,), "number"), "holds int64; expected the bytes of image files"),
    ):
        with pytest.raises(BrixelError, match=message):
            source._columns()
    assert StreamedSource((path,), name_column="text")._columns() == ("jpg", None, "text")


@pytest.mark.parametrize("folder", ["s3://bucket/maps", "s3:/bucket/maps"])
def test_object_stores_are_no_output(folder, album):
    with pytest.raises(BrixelError, match="is no folder: maps are written into a folder that all machines share"):
        extract_dataset(album, folder, model="brixel-tiny")


def test_a_cluster_that_does_not_answer():
    for address in (None, "auto", "local", "ray://127.0.0.1:9"):  # left to Ray
        _check_reachable(address)
    with pytest.raises(ConnectionRefusedError):
        _check_reachable("127.0.0.1:9")


def test_the_bytes_of_a_file_give_its_map(model, album):
    """A JPEG is decoded at the same reduction as from its path."""
    from brixel.images.decode import ImageFile

    large = album / "large.jpg"
    y, x = np.mgrid[:600, :800]
    Image.fromarray((np.stack([x, y, x + y], -1) % 256).astype(np.uint8)).save(large)
    from_bytes = model.extract(ImageFile("large.jpg", large.read_bytes))
    assert torch.equal(from_bytes.features, model.extract(large).features)
    with pytest.raises(MissingFileError, match=r"^gone\.jpg: no such file, check the path$"):
        model.extract(ImageFile("gone.jpg", (album / "gone.jpg").read_bytes))
