from PIL import Image


def test_show_with_a_model(run, model_folder, image_path, tmp_path, capsys):
    output = tmp_path / "panel.png"
    assert run("show", image_path, image_path, "--model", model_folder, "--device", "cpu", "-o", output) == 0
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as panel:
        assert panel.height > 2 * 384


def test_show_with_a_backbone_alone_says_that_the_adapter_is_fresh(run, backbone_folder, image_path, tmp_path, capsys):
    output = tmp_path / "panel.png"
    assert run("show", image_path, "--backbone", backbone_folder, "--short-side-px", 28, "-o", output) == 0
    assert "a fresh adapter" in capsys.readouterr().err
    assert output.exists()


def test_show_never_writes_over_its_image(run, model_folder, image_path, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_bytes(image_path.read_bytes())
    assert run("show", mine, "--model", model_folder, "-o", tmp_path / "x" / ".." / "mine.png") == 2
    assert run("show", mine, "--model", model_folder, "-o", mine) == 2
    assert "is itself an image to be shown" in capsys.readouterr().err
    assert mine.read_bytes() == image_path.read_bytes()
