import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from brixel import BrixelError, FeatureMap, MapFolder
from brixel.errors import DamagedFileError, MissingFileError
from brixel.extraction import extract_files
from brixel.extraction.manifest import SourceImage, WrittenFile
from brixel.extraction.map_folder import verify
from brixel.extraction.writers import PartWriter
from brixel.feature_maps.containers.formats import CONTAINERS
from brixel.feature_maps.containers.shards import SHARD_KEY
from brixel.images.find_images import find_images


def test_verify_finds_files_that_changed_or_are_missing(model, album, tmp_path):
    out = tmp_path / "out"
    extract_files(model, find_images([album]), out)
    assert verify(out) == []
    path = out / "sub" / "a.png.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (out / "b.JPG.safetensors").unlink()
    assert sorted(verify(out)) == [f"{out / 'b.JPG.safetensors'} does not exist", f"{path}: changed or damaged"]
    with pytest.raises(BrixelError, match="holds no manifest: expected a folder that `brixel extract` wrote"):
        verify(album)


# ---------------------------------------------------------------- folders of others


def write_manifest(folder, line, header=None):
    folder.mkdir(exist_ok=True)
    header = {"format_version": 1, "settings": {}} if header is None else header
    lines = [header, {"file": "a.npy", "bytes": 1, "sha256": "0", "pictures": [], "at": 1.0, **line}]
    (folder / "manifest-0.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))


@pytest.mark.parametrize(
    "outside", ["../private/p.safetensors", "a/../../private/p.safetensors", "{tmp_path}/private/p.safetensors"]
)
@pytest.mark.parametrize("read", [MapFolder, verify])
def test_a_manifest_is_not_followed_out_of_its_folder(tmp_path, outside, read):
    (tmp_path / "private").mkdir()
    FeatureMap(torch.ones(4, 2, 2), (8, 8), (4.0, 4.0)).save(tmp_path / "private" / "p.safetensors")
    file = outside.format(tmp_path=tmp_path)
    image = {"picture": file.removesuffix(".safetensors"), "bytes": 1, "mtime_ns": 1}
    write_manifest(tmp_path / "maps", {"file": file, "pictures": [image]})
    with pytest.raises(DamagedFileError, match=r"manifest-0\.jsonl .* names a file outside of its folder: .*private"):
        read(tmp_path / "maps")


IMAGE = {"picture": "a.png", "bytes": 1, "mtime_ns": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file": ""}, "file in line 2 is ''"),
        ({"file": "a\0b"}, "file in line 2 is 'a"),
        ({"file": "."}, "names a file outside"),
        ({"file": ["a"]}, r"file in line 2 is \['a'\]"),
        ({"file": "a" * 5000}, "expected a relative path"),
        ({"bytes": -1}, "bytes in line 2 is -1"),
        ({"bytes": 10**400}, "bytes in line 2 is 1000"),
        ({"bytes": 1.5}, "bytes in line 2 is 1.5"),
        ({"sha256": None}, "sha256 in line 2 is None"),
        ({"at": "now"}, "at in line 2 is 'now'"),
        ({"pictures": {}}, "pictures in line 2 is {}"),
        ({"pictures": "a"}, "pictures in line 2 is 'a'"),
        ({"pictures": ["a"]}, "an image of line 2 is 'a'; expected a table of picture, bytes, mtime_ns"),
        ({"pictures": [{**IMAGE, "picture": 5}]}, "picture in an image of line 2 is 5"),
        ({"pictures": [{**IMAGE, "mtime_ns": 2**70}]}, "mtime_ns in an image of line 2 is"),
        ({"pictures": [{"picture": "a"}]}, "an image of line 2 lacks bytes, mtime_ns"),
        ({"pictures": [{**IMAGE, "more": 1}]}, "an image of line 2 has the unknown field 'more'"),
        ({"more": 1}, "line 2 has the unknown field 'more'"),
    ],
)
def test_odd_values_in_a_manifest(tmp_path, line, message):
    write_manifest(tmp_path, line)
    with pytest.raises(DamagedFileError, match=rf"manifest-0\.jsonl is damaged or not a manifest of .*{message}"):
        MapFolder(tmp_path)


@pytest.mark.parametrize("header", [{}, {"format_version": 1}, {"format_version": True, "settings": {}}])
def test_odd_first_lines_of_a_manifest(tmp_path, header):
    write_manifest(tmp_path, {}, header)
    with pytest.raises(DamagedFileError, match=r"manifest-0\.jsonl is damaged or not a manifest of brixel \(.*line 1"):
        MapFolder(tmp_path)


def test_a_shard_after_files_of_other_names_has_the_next_number(tmp_path):
    names = ("a.npy", "maps-x.safetensors", "maps-0-00004.safetensors", "maps-1-00009.safetensors")
    written = [WrittenFile(name, 1, "0", ()) for name in names]
    writer = PartWriter(tmp_path, CONTAINERS["shards"], 10**6, "0", written)
    writer.add(SourceImage("a.png", 1, 1), FeatureMap(torch.ones(4, 2, 2), (8, 8), (4.0, 4.0)))
    assert writer.finish().file == "maps-0-00005.safetensors"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "does not describe the map of a.png"),
        ({SHARD_KEY: "[" * 100000}, "nested deeper"),
        ({SHARD_KEY: "[]"}, "does not describe the map of a.png"),
        ({SHARD_KEY: '{"b.png": {}}'}, "does not describe the map of a.png"),
        ({SHARD_KEY: '{"a.png": 5}'}, "the map of a.png is 5"),
        ({SHARD_KEY: '{"a.png": {"image_hw": [8, 8], "stride": [4, NaN], "meta": {}}}'}, "not finite"),
        ({SHARD_KEY: '{"a.png": {"image_hw": [8, 8], "stride": [4, 1], "meta": {}}}'}, "along x, 2 cells"),
        ({SHARD_KEY: '{"a.png": {"image_hw": [8, 8], "stride": [4, 4], "meta": {}}}'}, "does not contain tensor"),
    ],
)
def test_a_shard_that_is_something_else(tmp_path, metadata, message):
    write_manifest(tmp_path, {"file": "maps-0-00000.safetensors", "pictures": [IMAGE]})
    name = "b.png" if metadata and "4, 4]" in metadata[SHARD_KEY] else "a.png"
    save_file({name: torch.ones(4, 2, 2)}, tmp_path / "maps-0-00000.safetensors", metadata)
    with pytest.raises(DamagedFileError, match=rf"maps-0-00000\.safetensors is damaged or not a shard of .*{message}"):
        MapFolder(tmp_path)["a.png"]
    (tmp_path / "maps-0-00000.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"maps-0-00000\.safetensors does not exist"):
        MapFolder(tmp_path)["a.png"]


def test_the_map_of_another_image_is_refused(model, tmp_path):
    """As after files were renamed by hand."""
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    extract_files(model, find_images([tmp_path]), tmp_path / "maps")
    files = [tmp_path / "maps" / f"{number}.png.safetensors" for number in range(2)]
    files[0].rename(tmp_path / "kept")
    files[1].rename(files[0])
    with pytest.raises(DamagedFileError, match="is the map of '1.png', not of '0.png'"):
        MapFolder(tmp_path / "maps")["0.png"]


def test_manifests_of_other_settings_are_not_mixed(model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    extract_files(model, find_images([tmp_path]), tmp_path / "maps")
    first = tmp_path / "maps" / "manifest-0.jsonl"
    header, *lines = first.read_text().splitlines()
    changed = json.loads(header)
    changed["settings"]["backbone"] = "another"
    (tmp_path / "maps" / "manifest-1.jsonl").write_text("\n".join([json.dumps(changed), *lines]) + "\n")
    with pytest.raises(BrixelError, match="maps made with other settings"):
        MapFolder(tmp_path / "maps")
