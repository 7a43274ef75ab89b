"""`brixel probe`: fitted, used and scored from folders, and what a hurried user gives."""

import json

import numpy as np
import pytest
from PIL import Image
from probe_images import blocks

FLAGS = ("--model", "brixel-tiny", "--device", "cpu")


@pytest.fixture
def folders(tmp_path):
    """Images with masks and values, one image without, in folders with subfolders."""
    for number in range(3):
        image, labels = blocks(number, 48, 48)
        below = "sub" if number else "."
        for kind in ("photos", "masks", "values"):
            (tmp_path / kind / below).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / below / f"{number}.png")
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "masks" / below / f"{number}.png")
        np.save(tmp_path / "values" / below / f"{number}.npy", labels + 1.0)
    Image.fromarray(image).save(tmp_path / "photos" / "extra.jpg")
    (tmp_path / "classes.json").write_text(json.dumps(["sea", "brick", "leaf"]))
    return tmp_path


@pytest.fixture
def fit(run, folders):
    def command(*arguments):
        flags = ("--images", folders / "photos", *FLAGS, "--short-side-px", 48, "-o", folders / "probe")
        return run("probe", "fit", *flags, *arguments)

    return command


@pytest.mark.slow
def test_fit_predict_and_score(run, fit, folders, capsys, caplog):
    assert fit("--masks", folders / "masks", "--classes", folders / "classes.json") == 0
    assert capsys.readouterr().out == f"{folders / 'probe'}: fitted to 3 images, 3 classes\n"
    assert f"1 of 4 images have no file in {folders / 'masks'}, and are left out" in caplog.text
    pairs = ("--images", folders / "photos", "--masks", folders / "masks")
    assert run("probe", "score", folders / "probe", *pairs) == 0
    printed = capsys.readouterr().out
    assert "mean iou" in printed
    assert "IoU of brick" in printed
    assert run("probe", "score", folders / "probe", *pairs, "--json") == 0
    assert 0.3 < json.loads(capsys.readouterr().out)["mean_iou"] <= 1

    (folders / "photos" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ("probe", "predict", folders / "probe", folders / "photos", "-o", folders / "out")
    assert run(*arguments) == 1
    told = capsys.readouterr()
    assert "4 written into" in told.out
    assert "cut.png" in told.err
    with Image.open(folders / "out" / "masks" / "sub" / "1.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (48, 48)
        assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
    with Image.open(folders / "out" / "overlays" / "extra.jpg") as overlay:
        assert overlay.size == (48, 48)
    assert not (folders / "out" / "masks" / "cut.png").exists()
    assert run(*arguments) == 1  # over its own
    capsys.readouterr()
    Image.new("L", (48, 48)).save(folders / "out" / "masks" / "0.png")
    assert run(*arguments) == 2
    assert "0.png exists, and brixel has not drawn it; give another name, or --overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--no-overlays", "--json") == 1
    assert json.loads(capsys.readouterr().out)["written"] == 4


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_fit_to_clicks(run, fit, folders, capsys, ending):
    clicks = {f"sub/{number}.png": [[4, 8 * label + 4, label] for label in range(3)] for number in (1, 2)}
    path = folders / f"clicks.{ending}"
    if ending == "json":
        path.write_text(json.dumps(clicks))
    else:
        rows = [f"{name},{y},{x},{label}" for name, own in clicks.items() for y, x, label in own]
        path.write_text("\n".join(["image,y,x,class", *rows]))
    assert fit("--clicks", path) == 0
    assert "fitted to 2 images, 3 classes" in capsys.readouterr().out
    assert fit("--clicks", path) == 2
    assert "holds a probe: give another folder, or --overwrite" in capsys.readouterr().err
    path.write_text("image,y\na.png,3" if ending == "csv" else '{"a.png": [[1, 2]]}')
    assert fit("--clicks", path, "--overwrite") == 2
    assert f"clicks.{ending} is damaged or not a file of clicks" in capsys.readouterr().err
    path.write_text("image,y,x,class\na.png,3,3,1" if ending == "csv" else '{"a.png": [[1, 2, 3]]}')
    assert fit("--clicks", path, "--overwrite") == 2
    assert "names a.png, which is not in" in capsys.readouterr().err


@pytest.mark.slow
def test_values(run, fit, folders, capsys):
    assert fit("--masks", folders / "values", "--kind", "regression", "--log") == 0
    arguments = ("probe", "predict", folders / "probe", folders / "photos" / "0.png", "-o", folders / "out", *FLAGS)
    assert run(*arguments) == 0
    found = np.load(folders / "out" / "values" / "0.npy")
    assert found.shape == (48, 48)
    assert found.dtype == np.float32
    assert (folders / "out" / "overlays" / "0.jpg").exists()
    assert run(*arguments) == 2
    assert "0.npy exists; give another folder, or --overwrite" in capsys.readouterr().err
    pairs = ("--images", folders / "photos", "--masks", folders / "values")
    assert run("probe", "score", folders / "probe", *pairs) == 0
    assert capsys.readouterr().out.startswith("r2 ")


def test_what_a_hurried_user_gives(run, fit, folders, capsys):
    for arguments, message in [
        ((), "expected --masks, or --clicks in their place"),
        (("--masks", folders / "nowhere"), "nowhere is no folder; expected a folder of images, and one of masks"),
        (("--masks", folders / "values"), "none of 4 images in"),
        (
            ("--masks", folders / "masks", "--kind", "regression", "--classes", folders / "classes.json"),
            "go with --kind",
        ),
        (("--masks", folders / "masks", "--classes", folders / "masks" / "0.png"), "0.png is not JSON"),
        (("--masks", folders / "masks", "--ignore-label", "0", "--regularisation", "-1"), "--regularisation is -1.0"),
    ]:
        assert fit(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (folders / "probe").exists()
    Image.new("L", (9, 9)).save(folders / "masks" / "lonely.png")
    assert fit("--masks", folders / "masks") == 2
    assert "1 files have no image in" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(folders / "photos" / "extra.png")
    assert fit("--masks", folders / "masks") == 2
    assert "have one name, so a mask could belong to either" in capsys.readouterr().err
    assert run("probe", "predict", folders / "probe", folders / "photos", "-o", folders / "out") == 2
    assert "probe holds no probe.json: expected a folder that a probe was saved in" in capsys.readouterr().err
