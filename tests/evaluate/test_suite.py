"""Suites: what is read, what is refused, and that a killed one goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main
from brixel.evaluate.diagram import COLOURS, steps
from brixel.evaluate.report import Report, shown
from brixel.evaluate.report_plot import report_plot
from brixel.evaluate.suite import merged, run_suite
from brixel.evaluate.suite_file import read_suite
from brixel.evaluate.tasks import Task


@pytest.fixture
def suite(tmp_path, backbone_folder):
    """Two runs of one model, three parts."""
    colours = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(colours).save(tmp_path / "images" / "a.png")
    path = tmp_path / "suite.toml"
    path.write_text(
        f"""
        cache = "{tmp_path / "cache"}"
        [models.tiny]
        backbone = "{backbone_folder}"
        [[run]]
        task = "fidelity"
        images = ["{tmp_path / "images"}"]
        teacher_px = [56, 112]
        [[run]]
        task = "matching"
        models = ["tiny"]
        images = ["{tmp_path / "images"}"]
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
    kept = f"2 of 3 parts are in {tmp_path / 'out' / 'parts'} and kept; delete those to be run again"
    assert begun == [kept, "3 of 3: matching, tiny, 112 px"]
    assert text + "\n" == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert run_suite(parts, tmp_path / "out", "command", load, begun.append) == text
    assert len(begun) == 3


def test_all_mistakes_are_told_before_anything_is_run(suite, tmp_path):
    text = suite.read_text().replace(
        f'images = ["{tmp_path / "images"}"]\n        teacher_px = [56', 'images = ["gone"]\n        teacher_px = [57'
    )
    suite.write_text(text.replace('"student"]', '"studnt"]'))
    with pytest.raises(
        BrixelError,
        match="(?s)nothing was run.*no image or folder at gone.*source 'studnt'.*model 'tiny': teacher_px is 57",
    ):
        run_suite(
            read_suite(suite),
            tmp_path / "out",
            "command",
            lambda table: BrixelFeatures.from_backbone(table["backbone"], device="cpu"),
            print,
        )
    assert list((tmp_path / "out" / "parts").iterdir()) == []


def test_where_a_part_fails_the_report_is_of_the_others(suite, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise BrixelError("no matching today")

    monkeypatch.setattr("brixel.evaluate.tasks.matching", fails)
    told = []
    with pytest.raises(BrixelError, match="no matching today"):
        run_suite(
            read_suite(suite),
            tmp_path / "out",
            "command",
            lambda table: BrixelFeatures.from_backbone(table["backbone"], device="cpu"),
            told.append,
        )
    assert told[-1] == f"the report in {tmp_path / 'out'} is of the 2 parts that are there"
    assert len(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))) == 1


def test_parts_of_a_model_that_changed_are_run_again(suite, backbone_folder, tmp_path):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    model.save_pretrained(tmp_path / "model", include_backbone=True)
    suite.write_text(suite.read_text().replace(f'backbone = "{backbone_folder}"', f'model = "{tmp_path / "model"}"'))
    parts, told = read_suite(suite), []

    def run():
        told.clear()
        run_suite(parts, tmp_path / "out", "command", lambda table: model, told.append)
        return [text for text in told if "px" in text]

    assert len(run()) == 3
    assert run() == []
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    assert len(run()) == 3
    assert told[0] == "3 parts are run again, since the model is another now: tiny"


def test_other_data_is_another_table(suite, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (70, 60), "red").save(tmp_path / "others" / "a.png")
    text = suite.read_text().replace('task = "matching"', 'task = "fidelity"')
    last = text.rindex(str(tmp_path / "images"))
    suite.write_text(text[:last] + str(tmp_path / "others") + text[last + len(str(tmp_path / "images")) :])
    assert main(["evaluate", "suite", str(suite), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    first, second = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert first["recipe"].startswith(f"{tmp_path / 'images'}: 1 images")
    assert second["recipe"].startswith(f"{tmp_path / 'others'}: 1 images")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for name in ("fidelity.png", "fidelity-2.png"):
        assert f"]({name})" in text
        with Image.open(tmp_path / "out" / name) as plot:
            assert plot.width > 400


def test_the_plot_has_a_spot_for_every_row():
    """In the colour of its source, higher for more, with whiskers; the teacher at the size of its student."""
    rows = [
        {"model": "m", "image_px": px, "source": source, "rmse": rmse, "interval": [rmse - 0.1, rmse + 0.1]}
        for px, source, rmse in (
            (112, "bilinear", 1.0),
            (112, "student", 2.0),
            (448, "teacher", 3.0),
            (112, "mine", 2.5),
        )
    ]
    plot = np.asarray(report_plot(Report("depth", "Depth", {}, rows, "recipe")))[100:]  # below the names
    spots = []
    for colour in (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3]):
        value = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
        found_rows, columns = np.nonzero((plot == value).all(-1))
        spots.append((np.mean(found_rows), np.mean(columns)))
        assert np.ptp(found_rows) > 10  # the whisker
    heights, places = zip(*spots, strict=True)
    assert heights[0] > heights[1] > heights[3] > heights[2]
    assert places[0] < places[1] < places[2] < places[3]
    assert places[3] - places[0] < 200  # all at one size


def test_axes_hold_all_values():
    for values in ([0.175, 0.211], [1.0], [0.0], [-3.0, 40.0], [0.1, 0.30000000000000004]):
        axis = steps(values)
        assert 0 <= min(map(axis.share, values)) <= max(map(axis.share, values)) <= 1 + 1e-9
        assert 2 <= len(axis.ticks) == len(set(axis.labels)) <= 9


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
        (
            "teacher_px = [112]",
            "teacher_px = ['112']",
            r"teacher_px in run 2 of .* is \['112'\]; expected whole numbers",
        ),
        ("teacher_px = [112]", "teacher_px = [0]", r"teacher_px in run 2 of .* is \[0\]; expected whole numbers above"),
        (
            "teacher_px = [112]",
            "teacher_px = [112]\nlimit = 3",
            r"run 2 of .* \(matching\) has the unknown key 'limit'",
        ),
        ("backbone = ", "backbone = 3 #", "backbone in .*models.tiny. of .* is 3; expected a text"),
        ("[models.tiny]\n        backbone", "[models]\n        tiny", "models.tiny. of .* expected a table with model"),
    ],
)
def test_mistakes_in_a_suite_are_named(suite, old, new, message):
    suite.write_text(suite.read_text().replace(old, new))
    with pytest.raises(BrixelError, match=message):
        read_suite(suite)


def test_one_value_stands_for_a_list_of_one(suite):
    before = read_suite(suite)
    text = suite.read_text().replace("[112]", "112").replace('["tiny"]', '"tiny"').replace('images = ["', 'images = "')
    suite.write_text(text.replace('images"]', 'images"'))
    assert read_suite(suite) == before


def test_tables_of_runs_need_two_brackets(suite):
    text = suite.read_text()
    first = text.index("[[run]]")
    suite.write_text(text[: text.index("[[run]]", first + 1)].replace("[[run]]", "[run]"))
    with pytest.raises(BrixelError, match=r"expected tables \[models.NAME\] and \[\[run\]\] \(two brackets\)"):
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
    recipes = ["photos-2024-05-01: 3 images; 2026-11-23.", "photos-2024-05-02: 3 images; 2026-11-22."]
    found = [each.recipe for each in merged([Report("depth", "Depth", {}, [], recipe) for recipe in recipes])]
    assert found == recipes
