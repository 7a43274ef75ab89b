"""Suites: what is read, what is refused, and that a killed one goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli import main
from brixel.evaluate.report import Report, shown
from brixel.evaluate.suite import merged, read_suite, run_suite
from brixel.evaluate.tasks import Task


@pytest.fixture
def suite(tmp_path, backbone_folder):
    """Two runs of one model, three parts."""
    colours = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(colours).save(tmp_path / "pictures" / "a.png")
    path = tmp_path / "suite.toml"
    path.write_text(
        f"""
        cache = "{tmp_path / "cache"}"
        [models.tiny]
        backbone = "{backbone_folder}"
        [[run]]
        task = "fidelity"
        images = ["{tmp_path / "pictures"}"]
        teacher_px = [56, 112]
        [[run]]
        task = "matching"
        models = ["tiny"]
        images = ["{tmp_path / "pictures"}"]
        teacher_px = [112]
        sources = ["bilinear", "student"]
        """
    )
    return path


def test_a_suite_that_was_killed_goes_on(suite, tmp_path):
    parts, begun = read_suite(suite), []
    assert [(part.task.kind, part.task.teacher_px) for part in parts] == [
        ("fidelity", (56,)),
        ("fidelity", (112,)),
        ("matching", (112,)),
    ]

    def load(table):
        return BrixelFeatures.from_backbone(table["backbone"], device="cpu")

    def dies(text):
        begun.append(text)
        if text.startswith("3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(parts, tmp_path / "out", "command", load, dies)
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2
    assert not (tmp_path / "out" / "report.md").exists()
    begun.clear()
    text = run_suite(parts, tmp_path / "out", "command", load, begun.append)
    assert begun == ["3 of 3: matching, tiny, 112 px"]
    assert text + "\n" == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert run_suite(parts, tmp_path / "out", "command", load, begun.append) == text
    assert len(begun) == 1


def test_the_command_writes_one_report_whose_numbers_are_those_of_its_json(suite, tmp_path, capsys):
    assert main(["evaluate", "suite", str(suite), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    contents = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [content["task"] for content in contents] == ["fidelity", "matching"]
    for content in contents:
        assert Report.from_content(content).markdown(content["command"], level=2) in text
        for row in content["rows"]:
            cells = [shown(row.get(key), form) for key, (_, form) in content["columns"].items()]
            assert f"| {' | '.join(cells)} |" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('task = "matching"', 'task = "matchin"', "unknown task 'matchin'; did you mean 'matching'"),
        ('models = ["tiny"]', 'models = ["tin"]', "names the model 'tin'; did you mean 'tiny'"),
        ("teacher_px = [112]", "teacher = [112]", "unknown key 'teacher'; did you mean 'teacher_px'"),
        ("teacher_px = [112]", "", "task 'matching' needs 'teacher_px'"),
        ("backbone =", "bakbone =", "unknown key 'bakbone'; did you mean 'backbone'"),
        ("[models.tiny]", "[models.tiny", "is no TOML"),
        ("[[run]]", "[[runs]]", "unknown key 'runs'; did you mean 'run'"),
    ],
)
def test_mistakes_in_a_suite_are_named(suite, old, new, message):
    suite.write_text(suite.read_text().replace(old, new))
    with pytest.raises(BrixelError, match=message):
        read_suite(suite)


def test_a_missing_suite_and_missing_settings(tmp_path):
    with pytest.raises(BrixelError, match="no suite at"):
        read_suite(tmp_path / "none.toml")
    with pytest.raises(BrixelError, match="task 'segmentation' needs 'data', and none is given"):
        Task("segmentation", (448,))
    with pytest.raises(BrixelError, match="task 'fidelity' needs 'images'"):
        Task("fidelity", (448,))


def test_parts_of_several_days_share_a_table():
    def part(size, recipe):
        return Report("depth", "Depth", {"size": ("px", "d")}, [{"size": size}], recipe, details={"of": size})

    recipes = [
        "a set; torch 2.13; 2026-11-23.",
        "a set; torch 2.13; 2026-11-22.",
        "another set; torch 2.13; 2026-11-22.",
    ]
    both, other = merged([part(size, recipe) for size, recipe in enumerate(recipes)])
    assert [row["size"] for row in both.rows] == [0, 1]
    assert both.recipe == "a set; torch 2.13; 2026-11-22 to 2026-11-23."
    assert other.recipe == recipes[2]
    assert both.details == {"parts": [{"of": 0}, {"of": 1}]}


def test_days_in_names_of_data_are_left_as_they_are():
    recipes = ["photos-2024-05-01: 3 pictures; 2026-11-23.", "photos-2024-05-02: 3 pictures; 2026-11-22."]
    found = [each.recipe for each in merged([Report("depth", "Depth", {}, [], recipe) for recipe in recipes])]
    assert found == recipes
