"""Folders of reduced maps: the basis is fitted once and kept, restarts are bit-identical, other steps are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import maps_in
from safetensors.torch import load_file

from brixel import BrixelError, MapFolder, Reduce
from brixel.extraction import extract_files
from brixel.extraction.fitted_reduction import fit_reduction
from brixel.extraction.map_folder import verify
from brixel.images.find_images import find_images


@pytest.fixture
def images(album):
    return find_images([album])


def test_a_folder_keeps_its_basis_and_its_maps_are_restored(model, images, album, tmp_path):
    summary = extract_files(model, images, tmp_path / "out", reduce="pca:8,int8")
    assert (summary.written, summary.failures) == (3, [])
    assert verify(tmp_path / "out") == []
    maps = MapFolder(tmp_path / "out")
    kept = Reduce.load(tmp_path / "out/reduce.safetensors")
    assert kept.spec == "pca:8,int8"
    for name in ("a.png", "b.JPG", "sub/a.png"):
        whole, found = model.extract(album / name), maps[name]
        assert found.embed_dim == 8
        assert (found.meta["reduce"], found.meta["basis"]) == ("pca:8,int8", kept.basis.digest)
        assert load_file(tmp_path / "out" / f"{name}.safetensors")["features"].dtype == torch.int8
        projected = kept.basis.project(whole.features)
        assert ((found.features - projected).abs() <= found.scales[:, None, None] * 0.51).all()
        assert found.restored().features.shape == whole.features.shape
    assert maps.basis.digest == kept.basis.digest


@pytest.mark.slow
def test_restarts_use_the_kept_basis_and_are_bit_identical(model, images, album, tmp_path):
    for name, count in (("whole", 3), ("stopped", 1)):
        extract_files(model, images, tmp_path / "fit", reduce="pca:8,int8")
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "fit/reduce.safetensors", tmp_path / name)
        extract_files(model, images[:count], tmp_path / name, reduce="pca:8,int8")
    extra = images[:1]  # a sample of these alone would give another basis
    assert extract_files(model, images, tmp_path / "stopped", reduce="pca:8,int8", reduce_sample=1).written == 2
    assert extract_files(model, extra, tmp_path / "stopped", reduce="pca:8,int8").skipped == 1
    assert maps_in(tmp_path / "stopped") == maps_in(tmp_path / "whole")


@pytest.mark.slow
def test_other_reductions_in_a_folder_are_refused_unless_overwritten(model, images, tmp_path):
    out = tmp_path / "out"
    extract_files(model, images, out, reduce="pca:8")
    before = maps_in(out)
    with pytest.raises(BrixelError, match=r"reduce\.safetensors is of pca:8 for .*, and asked for is pca:4 for "):
        extract_files(model, images, out, reduce="pca:4")
    with pytest.raises(BrixelError, match=r"reduce: stride:20, not pca:8 \(basis "):
        extract_files(model, images, out, reduce="stride:20")
    with pytest.raises(BrixelError, match=r"reduce: None, not pca:8 \(basis "):
        extract_files(model, images, out)
    other = Reduce("pca:8").fit(
        [model.extract(np.zeros((28, 28, 3), np.uint8) + np.arange(28, dtype=np.uint8)[:, None])]
    )
    with pytest.raises(BrixelError, match=f"holds basis .*, and given is {other.basis.digest}"):
        extract_files(model, images, out, reduce=other)
    assert maps_in(out) == before
    extract_files(model, images, out, reduce="pca:4", overwrite=True)
    assert MapFolder(out)["a.png"].restored().embed_dim == 64
    assert Reduce.load(out / "reduce.safetensors").spec == "pca:4"


def test_a_folder_without_reduction_is_not_continued_with_one(model, images, tmp_path):
    extract_files(model, images, tmp_path / "out")
    with pytest.raises(BrixelError, match=r"reduce: int8, not None"):
        extract_files(model, images, tmp_path / "out", reduce="int8")


def test_several_processes_need_a_basis_that_is_there(model, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BrixelError, match="needs a basis, which one process fits"):
        extract_files(model, images, out, reduce="pca:8")
    assert not out.exists()
    monkeypatch.delenv("WORLD_SIZE")
    fitted = fit_reduction(model, images, out, "pca:8")
    assert [path.name for path in out.iterdir()] == ["reduce.safetensors"]
    assert fit_reduction(model, images[:1], out, "pca:8").identity == fitted.identity
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        extract_files(model, images, out, reduce="pca:8")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    extract_files(model, images, tmp_path / "alone", reduce=fitted)
    assert {maps_in(folder)[key] for folder in (out, tmp_path / "alone") for key in maps_in(out)} == set(
        maps_in(out).values()
    )


def test_a_basis_of_another_model_is_refused_before_any_map(model, images, tmp_path):
    wide = model.extract(images[0][0])
    basis = Reduce("pca:3").fit([wide]).basis
    foreign = Reduce.pca(type(basis)(basis.components, backbone="another"))
    narrow = Reduce.pca(type(basis)(basis.components[:, :5].contiguous()))
    for reduce in (foreign, narrow):
        with pytest.raises(BrixelError, match="fit one to maps of the same model"):
            extract_files(model, images, tmp_path / "out", reduce=reduce)
        with pytest.raises(BrixelError, match="fit one to maps of the same model"):
            next(model.stream([images[0][0]], reduce=reduce))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["int8", "pca:8,int8", "regions:2x3,float16", "stride:30"])
def test_shards_hold_what_files_hold(model, images, tmp_path, reduce):
    extract_files(model, images, tmp_path / "files", reduce=reduce)
    extract_files(model, images, tmp_path / "shards", reduce=reduce, shard_bytes=20_000)
    files, shards = MapFolder(tmp_path / "files"), MapFolder(tmp_path / "shards")
    assert set(files) == set(shards)
    for name, ours in files.items():
        theirs = shards[name]
        assert torch.equal(ours.features, theirs.features)
        assert ours.features.dtype == theirs.features.dtype
        assert (ours.image_hw, ours.stride, dict(ours.meta)) == (theirs.image_hw, theirs.stride, dict(theirs.meta))
        assert (ours.scales is None) == (theirs.scales is None) == ("int8" not in reduce)
        assert torch.equal(ours.restored().features, theirs.restored().features)


def test_a_shard_of_int8_maps_counts_the_bytes_that_it_holds(model, images, tmp_path):
    whole = sum(model.extract(image).features.numel() for image, _ in images)
    extract_files(model, images, tmp_path / "out", reduce="int8", shard_bytes=whole + 3 * 64 * 4)
    assert [path.name for path in tmp_path.glob("out/maps-*")] == ["maps-0-00000.safetensors"]
    extract_files(model, images, tmp_path / "two", reduce="int8", shard_bytes=whole + 3 * 64 * 4 - 1)
    assert len(list(tmp_path.glob("two/maps-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_tables_of_points_by_name(model, images, album, tmp_path, shard_bytes):
    by_name = {"a.png": [[3, 4], [20, 30.5]], "b.JPG": [], "sub/a.png": [[59, 89]]}
    (tmp_path / "points.json").write_text(json.dumps(by_name))
    spec, out = f"points:{tmp_path / 'points.json'},pca:4,int8", tmp_path / "out"
    with pytest.raises(BrixelError, match="4 components of 3 cells"):
        extract_files(model, images, out, reduce=spec)
    spec = f"points:{tmp_path / 'points.json'},pca:2,int8"
    assert extract_files(model, images, out, reduce=spec, shard_bytes=shard_bytes).failures == []
    maps = MapFolder(out)
    assert [len(maps.table(name)) for name in ("a.png", "b.JPG", "sub/a.png")] == [2, 0, 1]
    table = maps.table("a.png")
    assert table.points_yx.tolist() == by_name["a.png"]
    assert table.restored().embed_dim == 64
    with pytest.raises(BrixelError, match=r"no maps; get them with table\('a.png'\)"):
        maps["a.png"]
    (tmp_path / "points.json").write_text(json.dumps({**by_name, "b.JPG": [[1, 1]]}))
    with pytest.raises(BrixelError, match="other settings"):
        extract_files(model, images, out, reduce=spec, shard_bytes=shard_bytes)


def test_points_of_one_image_that_are_wrong_cost_no_other_map(model, images, tmp_path):
    points = {"a.png": [[3, 4]], "sub/a.png": [[300, 4]]}
    summary = extract_files(model, images, tmp_path / "out", reduce=Reduce.points(points))
    assert (summary.written, [path.name for path, _ in summary.failures]) == (1, ["b.JPG", "a.png"])
    assert "none for b.JPG" in str(summary.failures[0][1])
    assert "outside the image" in str(summary.failures[1][1])
    with pytest.raises(BrixelError, match="holds features of points"):
        MapFolder(tmp_path / "out")["a.png"]
    extract_files(model, images, tmp_path / "maps")
    with pytest.raises(BrixelError, match=r"holds maps; get them with maps\['a.png'\]"):
        MapFolder(tmp_path / "maps").table("a.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "int8", "ending": ".npy"}, "npy does not support scales of int8"),
        ({"reduce": "bfloat16", "ending": ".npy"}, "npy does not support bfloat16"),
        ({"reduce": Reduce.points([(1, 1)]), "ending": ".npy"}, "npy does not support features of points or regions"),
        ({"reduce": "float16", "save_dtype": torch.float16}, "float16 says the dtype already"),
        ({"reduce": "nothing"}, "has a step 'nothing'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(model, images, tmp_path, options, message):
    with pytest.raises(BrixelError, match=message):
        extract_files(model, images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_npy_holds_reduced_maps_too(model, images, tmp_path):
    extract_files(model, images, tmp_path / "out", reduce="pca:4", ending=".npy", save_dtype=torch.float16)
    found = MapFolder(tmp_path / "out")["a.png"]
    assert (found.embed_dim, found.features.dtype, found.restored().embed_dim) == (4, torch.float16, 64)


def test_images_that_cannot_be_read_are_left_out_of_the_sample(model, album, tmp_path):
    (album / "aa.png").write_bytes(b"no image")
    summary = extract_files(model, find_images([album]), tmp_path / "out", reduce="pca:4")
    assert (summary.written, len(summary.failures)) == (3, 1)
    for path in album.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(BrixelError, match="no maps to fit a basis to"):
        extract_files(model, find_images([album]), tmp_path / "none", reduce="pca:4")


def test_a_map_whose_basis_is_gone_is_read_and_not_restored(model, images, tmp_path):
    extract_files(model, images, tmp_path / "out", reduce="pca:4")
    (tmp_path / "out/reduce.safetensors").unlink()
    found = MapFolder(tmp_path / "out")["a.png"]
    assert found.embed_dim == 4
    with pytest.raises(BrixelError, match="it is not at hand"):
        found.restored()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("reduce", ["stride:20,int8", "regions:2x3", "stride:1"])
def test_streams_reduce_every_map(model, images, batch_size, reduce):
    paths = [image for image, _ in images]
    for path, found in zip(paths, model.stream(paths, batch_size=batch_size, reduce=reduce), strict=True):
        expected = Reduce(reduce)(model.extract(path))
        atol = 1e-5 if found.scales is None else float(found.scales.max()) * 1.01  # a value may round the other way
        torch.testing.assert_close(found.features, expected.features, rtol=1e-5, atol=atol)
        assert (found.stride, dict(found.meta)) == (expected.stride, dict(expected.meta))
        assert found.features.untyped_storage().nbytes() == found.features.nbytes  # nothing of the batch is held
    assert torch.equal(
        model.extract(paths[0], reduce="regions:2x3").features, Reduce("regions:2x3")(model.extract(paths[0])).features
    )


def test_streams_take_points_by_path_and_go_on_after_an_error(model, images):
    paths = [str(image) for image, _ in images]
    reduce = Reduce.points({paths[0]: [(3, 4)], paths[2]: [(5, 6), (7, 8)]})
    results = list(model.stream_all(paths, batch_size=3, reduce=reduce))
    assert [len(results[0]), len(results[2])] == [1, 2]
    assert "points by name" in str(results[1])
    table = model.extract(paths[0], reduce=Reduce.points([(3, 4)]))
    torch.testing.assert_close(table.features, model.extract(paths[0]).at([(3, 4)]), rtol=0, atol=1e-6)


def test_a_map_written_while_it_is_computed_is_not_reduced(model, images, tmp_path):
    with pytest.raises(BrixelError, match=r"never there as a whole to be reduced"):
        model.extract(images[0][0], out=tmp_path / "map.npy", reduce="int8")
    with pytest.raises(BrixelError, match=r"pca:3 has no basis yet"):
        model.extract(images[0][0], reduce="pca:3")
