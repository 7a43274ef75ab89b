import numpy as np
import pytest
import torch
from PIL import Image

from brixel import FeatureMap, MapFolder


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
