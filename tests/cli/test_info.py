import json
import subprocess
import sys

import pytest

import brixel
from brixel.cli.info import model_facts


def test_info_prints_the_facts_of_a_model(run, model_folder, capsys):
    assert run("info", model_folder) == 0
    printed = capsys.readouterr().out
    for fact in ("ViT of width 64, depth 4, patch 14", "0, 1, 2, 3", "28 px", "3.5 px", "0.485, 0.456, 0.406"):
        assert fact in printed


def test_info_needs_no_weights(run, model_folder, capsys):
    content = json.loads((model_folder / "config.json").read_text())
    content["backbone"]["sources"] = ["/nowhere/backbone"]
    (model_folder / "config.json").write_text(json.dumps(content))
    (model_folder / "adapter.safetensors").unlink()
    assert run("info", model_folder) == 0
    printed = {tuple(line.split("  ", 1)) for line in capsys.readouterr().out.splitlines()}
    printed = {name: value.strip() for name, value in printed}
    assert printed["backbone weights"] == printed["adapter weights"] == "missing"
    assert printed["backbone sources"] == "/nowhere/backbone"
    assert printed["upsampler parameters"].startswith("0.5")


def test_info_as_json_has_plain_values(run, model_folder, backbone_folder, capsys):
    assert run("info", model_folder, "--json") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert facts == model_facts(model_folder)
    assert (facts["width"], facts["patch_px"], facts["cell_px"], facts["short_side_px"]) == (64, 14, 3.5, 28)
    assert (facts["blocks"], facts["mean"]) == ([0, 1, 2, 3], [0.485, 0.456, 0.406])
    assert facts["backbone_weights"] == facts["backbone_sources"] == [str(backbone_folder.resolve())]
    assert facts["adapter_weights"] == str(model_folder / "adapter.safetensors")
    assert (facts["licence"], facts["blend_of_blocks"]) == (None, True)
    assert all(name == name.lower() and " " not in name for name in facts)


@pytest.mark.slow
def test_models_as_json_has_plain_values(run, capsys):
    assert run("models", "--json") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert captured.err == ""
    assert [row["name"] for row in rows] == [row.name for row in brixel.list_models()]
    row = next(row for row in rows if row["name"] == "dinov3-vitb16")
    assert (row["width"], row["patch_px"], row["gated"], row["adapter"]) == (768, 16, True, None)
    assert row["released_adapters"] == ["vitb16-256", "vitb16-480"]
    assert round(row["parameters"] / 1e6, 1) == 85.7


@pytest.mark.slow
def test_models_as_text_has_the_short_names(run, capsys):
    assert run("models") == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert (lines["name"], lines["dinov2-vits14"], lines["brixel-tiny"]) == ("also", "dinov2-small", "-")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brixel-tny", "unknown model 'brixel-tny'; did you mean 'brixel-tiny'?"),
        ("dinov2-smal", "unknown model 'dinov2-smal'; did you mean 'dinov2-small'?"),
        ("dinov2-vits14", "'dinov2-vits14' is a backbone, not a model with an adapter: "),
        ("dinov2-small", "call `brixel show IMAGE --backbone dinov2-vits14`"),
        ("facebook/dinov2-small", "'facebook/dinov2-small' is a backbone"),
        ("./dinov2-small", "no model at './dinov2-small': expected a path on disk"),
        ("nowhere", "no model at 'nowhere': expected a path on disk"),
    ],
)
def test_info_of_another_name_says_what_to_call(run, capsys, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    assert run("info", name) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_closes_early_is_no_error(model_folder):
    command = f"{sys.executable} -m brixel info {model_folder}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=120
    )
    assert done.returncode in (0, 141)
    assert done.stderr == b""
