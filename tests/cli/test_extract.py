import json

import numpy as np
import pytest
import torch
from PIL import Image
from videos import grey_levels, write

from brixel import FeatureMap, MapFolder, Reduce


def test_extract_reports_unreadable_files_and_exits_with_one(run, model_folder, image_path, tmp_path, capsys, caplog):
    (tmp_path / "in").mkdir()
    Image.open(image_path).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_text("no image")
    arguments = ("extract", tmp_path / "in", "--model", model_folder, "-o", tmp_path / "out")
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "1 written, 0 already there, 1 failed" in captured.out
    (skipped,) = [record.message for record in caplog.records if record.message.startswith("skipped: ")]
    assert "bad.png" in skipped
    assert FeatureMap.load(tmp_path / "out" / "good.png.safetensors").image_hw == (60, 90)
    (tmp_path / "in" / "bad.png").unlink()
    assert run(*arguments) == 0
    assert "0 written, 1 already there, 0 failed" in capsys.readouterr().out
    assert run(*arguments, "--overwrite") == 0
    assert "1 written" in capsys.readouterr().out


def test_extract_into_shards_continues_and_is_verified(run, model_folder, image_path, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(image_path).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    arguments = ("extract", tmp_path / "in", "--model", model_folder, "-o", out, "--shard-size", "1MiB")
    assert run(*arguments, "--save-dtype", "float16", "--batch-size", 2, "--workers", 0) == 0
    assert run(*arguments, "--save-dtype", "float16") == 0
    assert "0 written, 2 already there" in capsys.readouterr().out
    assert MapFolder(out)["b.png"].features.dtype == torch.float16
    assert run("extract", "--verify", "-o", out) == 0
    assert capsys.readouterr().out == "every file matches the manifest\n"
    (shard,) = out.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("extract", "--verify", "-o", out) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("1 files differ from the manifest: delete them")
    assert "maps-0-00000.safetensors: changed or damaged" in captured.err
    assert run("extract", "-o", out) == 2
    assert "no PATH: give images, or folders of images" in capsys.readouterr().err


def test_extract_into_a_sink(run, model_folder, image_path, tmp_path, capsys):
    arguments = ("extract", image_path, "--model", model_folder, "-o", tmp_path / "out", "--sink", "parquet")
    assert run(*arguments) == 0
    assert "1 written" in capsys.readouterr().out
    (part,) = (tmp_path / "out" / "parquet").iterdir()
    assert FeatureMap.load(part).image_hw == (60, 90)
    assert run("extract", "--verify", image_path, "-o", tmp_path / "out") == 0
    assert run(*arguments, "--save-dtype", "bfloat16") == 2
    assert "does not support bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sink", "files", "--shard-size", "1GiB"), "the sink 'files', which has a file for each image"),
        (("--sink", "zarr", "--format", "npy"), "npy in the sink 'zarr', of another format"),
        (("--actors", "2", "--ray-address", "auto"), "--ray-address, --actors without --engine ray"),
        (("--engine", "ray", "--compile"), "--compile does not go with --engine ray"),
        (("--engine", "ray", "-o", "map.npy"), "map.npy looks like the name of one map"),
        (("--engine", "ray", "-o", "s3://bucket/maps"), "is no folder: maps are written into a folder"),
    ],
)
def test_flags_of_sinks_and_engines_that_contradict_each_other(run, image_path, tmp_path, capsys, flags, message):
    assert run("extract", image_path, "-o", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_uri_is_for_ray(run, tmp_path, capsys):
    assert run("extract", "s3://bucket/photos", "-o", tmp_path / "out") == 2
    assert "s3://bucket/photos is on another machine: --engine ray reads object stores" in capsys.readouterr().err


def test_extract_takes_the_old_size_of_shards_in_gib(run, model_folder, image_path, tmp_path):
    arguments = ("extract", image_path, "--model", model_folder)
    with pytest.warns(DeprecationWarning, match="--shard-gib is deprecated; use --shard-size"):
        assert run(*arguments, "-o", tmp_path / "old", "--shard-gib", "0.001") == 0
    assert run(*arguments, "-o", tmp_path / "new", "--shard-size", 1073742) == 0
    old, new = (list((tmp_path / name).glob("*.safetensors")) for name in ("old", "new"))
    assert [path.name for path in old] == [path.name for path in new]
    assert old[0].read_bytes() == new[0].read_bytes()


@pytest.mark.parametrize(("option", "value"), [("--shard-size", "0"), ("--shard-size", "much"), ("--workers", "-1")])
def test_extract_refuses_numbers_that_are_none(run, image_path, tmp_path, option, value, capsys):
    assert run("extract", image_path, "-o", tmp_path, option, value) == 2
    assert f"brixel: error: {option}: '{value}'; expected" in capsys.readouterr().err


def test_extract_as_npy_in_another_dtype_and_size(run, model_folder, image_path, tmp_path):
    options = ("--format", "npy", "--dtype", "bfloat16", "--short-side-px", "native", "--batch-size", 2)
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "out", *options) == 0
    assert np.load(tmp_path / "out" / "waves.png.npy").shape == (64, 18, 26)


@pytest.mark.parametrize("name", ["one.safetensors", "one.npy"])
def test_extract_of_one_image_into_a_named_file(run, model_folder, image_path, tmp_path, capsys, name):
    arguments = ("extract", image_path, "--model", model_folder, "-o", tmp_path / name)
    assert run(*arguments, "--save-dtype", "float16") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    assert FeatureMap.load(tmp_path / name).image_hw == (60, 90)
    assert FeatureMap.load(tmp_path / name).features.dtype == torch.float16
    assert {path.name for path in tmp_path.glob("one*")} == {name, *(["one.npy.json"] if name == "one.npy" else [])}
    assert run(*arguments) == 2
    assert "one." in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"written": 1, "file": str(tmp_path / name)}
    assert FeatureMap.load(tmp_path / name).features.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("IMAGE", "IMAGE", "-o", "one.npy"), "one.npy is the name of one map; for several images give a folder"),
        (("FOLDER", "-o", "one.npy"), "one.npy is the name of one map; for several images give a folder, such as one"),
        (("IMAGE", "-o", "one.npy", "--format", "safetensors"), "--format and --shard-size go with a folder"),
        (("IMAGE", "-o", "one.npy", "--shard-size", "1GiB"), "--format and --shard-size go with a folder"),
        (("IMAGE", "-o", "no/one.npy"), "its folder does not exist"),
        (("IMAGE", "-o", "IMAGE/maps"), "waves.png is a file; expected a folder to write into"),
        (
            ("IMAGE", "-o", "maps", "--shard-size", "1"),
            "--shard-size: '1'; expected a size with its unit, such as 1GiB",
        ),
        (("IMAGE", "-o", "maps", "--shard-size", "4k"), "expected a size with its unit"),
    ],
)
def test_extract_refuses_outputs_that_do_not_fit(run, image_path, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("brixel.cli.extract.load", None)  # before a model is loaded
    paths = {"IMAGE": str(image_path), "FOLDER": str(image_path.parent)}
    for name, path in paths.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert run("extract", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_extract_into_an_existing_folder_with_the_ending_of_a_map(run, model_folder, image_path, tmp_path):
    (tmp_path / "maps.npy").mkdir()
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "maps.npy") == 0
    assert (tmp_path / "maps.npy" / "waves.png.safetensors").exists()


def test_extract_counts_what_is_left_out(run, model_folder, image_path, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("good.png", "notes.txt", "a.PDF", "b.pdf"):
        (folder / name).write_bytes(image_path.read_bytes())
    (folder / "bad.png").write_text("no image")
    arguments = ("extract", folder, "--model", model_folder, "-o", tmp_path / "out")
    assert run(*arguments) == 1
    expected = "1 written, 0 already there, 1 failed; 3 files left out: 2 .pdf, 1 .txt\n"
    assert capsys.readouterr().out == expected
    assert run(*arguments, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["left_out"] == {".pdf": 2, ".txt": 1}
    assert (facts["written"], facts["already_there"], facts["processes"]) == (0, 1, 1)
    ((failed),) = facts["failed"]
    assert failed["image"] == str(folder / "bad.png")
    assert "is not an image" in failed["error"]


def test_verify_compares_images_with_their_maps(run, model_folder, image_path, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(image_path.read_bytes())
    out = tmp_path / "out"
    assert run("extract", folder, "--model", model_folder, "-o", out) == 0
    capsys.readouterr()
    assert run("extract", folder, "--verify", "-o", out) == 0
    assert capsys.readouterr().out == "every file matches the manifest\nevery one of 2 images has a map\n"
    (folder / "c.png").write_bytes(image_path.read_bytes())
    Image.new("RGB", (40, 40)).save(folder / "b.png")
    assert run("extract", folder, "--verify", "-o", out) == 1
    printed = capsys.readouterr()
    assert "b.png: has changed since its map was made" in printed.err
    assert "c.png: has no map" in printed.err
    assert "2 of 3 images have no map as they are now" in printed.out
    assert run("extract", folder, "--verify", "-o", out, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == []
    assert (len(facts["images"]), facts["images_checked"]) == (2, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set; expected a rank of 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "WORLD_SIZE=2, but RANK is 5"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "WORLD_SIZE=1, but RANK is 1; expected a rank of 0 to 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two; expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0; expected a whole number from 1 up"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1; expected a whole number from 0 up"),
    ],
)
def test_what_a_launcher_left_behind_is_refused(
    run, model_folder, image_path, tmp_path, monkeypatch, capsys, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "", "RANK": ""}, {"RANK": "3"}, {"SLURM_NTASKS": "4"}])
def test_one_process_takes_all_images(run, model_folder, image_path, tmp_path, monkeypatch, capsys, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().out == "1 written, 0 already there, 0 failed\n"


def test_a_process_of_several_says_what_it_leaves_to_the_others(
    run, model_folder, image_path, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(image_path.read_bytes())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run("extract", folder, "--model", model_folder, "-o", tmp_path / "out") == 0
    written = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 0 < written < 6
    expected = f"process 0 of 2: {written} written, 0 already there, 0 failed; {6 - written} images belong to the other"
    assert capsys.readouterr().out.startswith(expected)


def test_a_file_of_another_ending_is_not_made_a_folder(run, model_folder, image_path, tmp_path, capsys):
    assert run("extract", image_path, "--model", model_folder, "-o", tmp_path / "one.txt") == 2
    assert (
        "looks like the name of a file, and a map is a file that ends in .safetensors or .npy"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "one.txt").exists()


def test_extract_reduces_and_keeps_the_basis(run, model_folder, image_path, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.open(image_path).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    arguments = ("extract", tmp_path / "in", "--model", model_folder, "-o", out, "--reduce", "pca:4,int8")
    assert run(*arguments, "--fit-only") == 0
    kept = Reduce.load(out / "reduce.safetensors")
    assert capsys.readouterr().out.startswith(f"pca:4 (basis {kept.basis.digest}),int8: ")
    assert run(*arguments, "--fit-only", "--json") == 0
    assert json.loads(capsys.readouterr().out)["basis"] == kept.basis.digest
    assert run(*arguments, "--reduce-sample", 1) == 0
    assert "2 written" in capsys.readouterr().out
    assert MapFolder(out)["a.png"].restored().embed_dim == 64
    one = tmp_path / "one.safetensors"
    photo = ("extract", tmp_path / "in/a.png", "--model", model_folder, "-o", one, "--reduce")
    assert run(*photo, out / "reduce.safetensors") == 0
    assert torch.equal(FeatureMap.load(one).features, MapFolder(out)["a.png"].features)
    assert run(*photo, out / "reduce.safetensors", "--overwrite", "--save-dtype", "float16") == 2
    assert "leave out --save-dtype, or the dtype of the reduction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "one.safetensors", "--reduce", "pca:4"), "pca:4 needs a basis, which is fitted to many images"),
        (("-o", "one.npy", "--reduce", "int8"), "npy does not support scales of int8"),
        (("-o", "out", "--fit-only"), "--fit-only goes with --reduce, such as --reduce pca:32,int8"),
        (("-o", "out", "--reduce", "pca:4", "--fit-only", "--overwrite"), "and without --overwrite"),
        (("-o", "out", "--reduce", "int8", "--fit-only"), "int8 needs no basis; --fit-only is for pca"),
        (("-o", "out", "--reduce", "pca32"), "the reduction has a step 'pca32'; expected one of pca:K"),
        (("-o", "out", "--reduce", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_reductions_that_cannot_be_done_are_one_line(
    run, model_folder, image_path, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    assert run("extract", image_path, "--model", model_folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_frames_of_a_video_are_reduced_with_a_basis_of_their_own(run, model_folder, tmp_path, capsys):
    clip = write(tmp_path / "clip.mp4", grey_levels(6))
    arguments = (
        "extract",
        clip,
        "--model",
        model_folder,
        "-o",
        tmp_path / "out",
        "--every",
        2,
        "--reduce",
        "pca:4,int8",
    )
    assert run(*arguments) == 0
    assert "3 written" in capsys.readouterr().out
    maps = MapFolder(tmp_path / "out")
    assert [maps[name].embed_dim for name in maps] == [4, 4, 4]
    assert maps[next(iter(maps))].restored().embed_dim == 64


@pytest.mark.slow
def test_extract_takes_videos(run, model_folder, tmp_path, capsys, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    clip = write(folder / "clip.mp4", grey_levels(6))
    assert run("extract", clip, "--model", model_folder, "-o", tmp_path / "out", "--every", 2) == 0
    assert capsys.readouterr().out == "3 written, 0 already there, 0 failed\n"
    assert list(MapFolder(tmp_path / "out")) == [f"clip.mp4/{i:06d}_{0.04 * i:.3f}s" for i in (0, 2, 4)]
    assert run("extract", "--verify", clip, "-o", tmp_path / "out") == 0
    assert run("extract", folder, "--model", model_folder, "-o", tmp_path / "two", "--fps", 10) == 0
    assert capsys.readouterr().out.endswith("3 written, 0 already there, 0 failed\n")
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    assert run("extract", folder, "--model", model_folder, "-o", tmp_path / "three") == 0
    assert "1 written, 0 already there, 0 failed; 1 file left out: 1 .mp4" in capsys.readouterr().out
    assert "videos in folders are extracted with --fps or --every" in caplog.text
    for arguments, message in (
        ((clip, "-o", tmp_path / "a.npy"), "is the name of one map; for a video, which has many, give a folder"),
        ((folder / "a.png", "-o", tmp_path / "x", "--fps", 2), "--fps and --every choose frames of videos, and none"),
        ((clip, "-o", tmp_path / "x", "--fps", 2, "--every", 2), "fps is 2 and every is 2; give one of them"),
        ((clip, "-o", tmp_path / "x", "--fps", 0), "--fps: '0'; expected a number above zero"),
    ):
        assert run("extract", *arguments, "--model", model_folder) == 2
        assert message in capsys.readouterr().err
