import json
import re


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_view_writes_a_page_of_all_images(run, model_folder, image_path, tmp_path, capsys):
    output = tmp_path / "view.html"
    flags = ("--model", model_folder, "--device", "cpu")
    assert run("view", image_path, image_path, *flags, "--teacher", "-o", output) == 0
    assert capsys.readouterr().out.strip() == str(output)
    data = data_of(output)
    assert [kind["name"] for kind in data["kinds"]] == ["backbone", "brixel", "teacher"]
    assert [(each["name"], each["height"], each["width"]) for each in data["images"]] == [("waves.png", 60, 90)] * 2
    assert [each["grid"] for each in data["images"][0]["maps"]] == [[2, 3], [8, 12], [8, 12]]
    assert run("view", image_path, *flags, "-o", output) == 0  # over its own
    assert [kind["name"] for kind in data_of(output)["kinds"]] == ["backbone", "brixel"]


def test_view_replaces_its_own_pages_alone(run, model_folder, image_path, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    arguments = ("view", image_path, "--model", model_folder, "-o", mine)
    assert run(*arguments) == 2
    assert f"{mine} exists, and brixel has not written it; give another name, or --overwrite" in capsys.readouterr().err
    assert mine.read_text() == "<p>mine</p>"
    assert run(*arguments, "--overwrite") == 0
    assert run("view", image_path, "--model", "nowhere", "-o", tmp_path / "view.png") == 2
    assert "view.png: expected a name that ends in .html or .htm" in capsys.readouterr().err
    assert run("view", tmp_path / "missing.jpg", "--model", model_folder, "-o", tmp_path / "view.html") == 2
    assert "missing.jpg: no such file, check the path" in capsys.readouterr().err
    assert not (tmp_path / "view.html").exists()
