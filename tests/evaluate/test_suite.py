"""Suites: what is read, what is refused, and that a killed one goes on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from brixel import BrixelError, BrixelFeatures
from brixel.cli.app import main
from brixel.errors import DamagedFileError
from brixel.evaluate import plots
from brixel.evaluate.report import SOURCE_COLUMNS, Report, shown
from brixel.evaluate.suite import merged, run_suite
from brixel.evaluate.suite_file import Part, read_suite
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


@pytest.mark.slow
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
    kept = f"2 of 3 parts are done and kept in {tmp_path / 'out' / 'parts'}; delete those to be run again"
    assert begun == [kept, "3 of 3: matching, tiny, 112 px"]
    assert text + "\n" == (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert run_suite(parts, tmp_path / "out", "command", load, begun.append) == text
    assert len(begun) == 3


def test_all_mistakes_are_listed_before_anything_is_run(suite, tmp_path):
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


@pytest.mark.slow
def test_where_a_part_fails_the_report_is_of_the_others(suite, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise BrixelError("no matching today")

    monkeypatch.setattr("brixel.evaluate.tasks.matching", fails)
    lines = []
    with pytest.raises(BrixelError, match="no matching today"):
        run_suite(
            read_suite(suite),
            tmp_path / "out",
            "command",
            lambda table: BrixelFeatures.from_backbone(table["backbone"], device="cpu"),
            lines.append,
        )
    assert lines[-1] == f"the report in {tmp_path / 'out'} contains the 2 parts that are done"
    assert len(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))) == 1


@pytest.mark.slow
def test_parts_of_a_model_that_changed_are_run_again(suite, backbone_folder, tmp_path):
    model = BrixelFeatures.from_backbone(backbone_folder, device="cpu")
    model.save_pretrained(tmp_path / "model", include_backbone=True)
    suite.write_text(suite.read_text().replace(f'backbone = "{backbone_folder}"', f'model = "{tmp_path / "model"}"'))
    parts, lines = read_suite(suite), []

    def run():
        lines.clear()
        run_suite(parts, tmp_path / "out", "command", lambda table: model, lines.append)
        return [text for text in lines if "px" in text]

    assert len(run()) == 3
    assert run() == []
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    assert len(run()) == 3
    assert lines[0] == "3 parts are run again, because their model has changed: tiny"


@pytest.mark.slow
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


@pytest.mark.slow
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
            assert all(f" {cell} " in text for cell in cells)


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
        (
            "teacher_px = [112]",
            "teacher_px = [0]",
            r"teacher_px in run 2 of .* is \[0\]; expected whole numbers from 1",
        ),
        (
            "teacher_px = [112]",
            "teacher_px = [112]\nlimit = 3",
            r"run 2 of .* \(matching\) has the unknown key 'limit'",
        ),
        (
            "teacher_px = [112]",
            "teacher_px = [100000]",
            "teacher_px in run 2 .* expected whole numbers from 1 to below",
        ),
        ("teacher_px = [112]", 'images = "\\u0000"\nteacher_px = [112]', "is no TOML"),
        ('cache = "', 'cache = "\\u0000', "cache is .*; expected a text"),
        ("backbone = ", "backbone = 3 #", "backbone in .*models.tiny. of .* is 3; expected a text"),
        ("[models.tiny]\n        backbone", "[models]\n        tiny", "models.tiny. of .* expected a table with model"),
    ],
)
def test_mistakes_in_a_suite_are_named(suite, old, new, message):
    suite.write_text(suite.read_text().replace(old, new))
    with pytest.raises(BrixelError, match=message):
        read_suite(suite)


def test_a_run_is_a_table(tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text('run = [5]\n[models.a]\nmodel = "brixel-tiny"\n')
    with pytest.raises(BrixelError, match=r"run 1 of .* is 5; expected a table, \[\[run\]\]"):
        read_suite(path)


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


def test_parts_of_version_0_1_have_the_same_file_names():
    part = Part("m", {"model": "run"}, Task("segmentation", (448,), data=Path("data"), limit=3, cache=Path("c")))
    assert part.key == "segmentation-m-448-468bf98c5e6d"
    part = Part("m", {"backbone": "b"}, Task("matching", (112,), images=(Path("images"),), sources=("bilinear",)))
    assert part.key == "matching-m-112-8c73c6dbecf3"


def test_reports_of_version_0_1_are_read_and_merged_with_new_ones():
    content = {
        **{"task": "depth", "title": "Depth", "command": "brixel evaluate suite", "notes": ["over the pictures"]},
        "recipe": "my 3 pictures: 12 pictures to fit, 5 to report; chosen on 20% of the pictures to fit; 2026-11-22.",
        "columns": {"model": ["model", ""], "picture_px": ["picture, px", "d"], "rmse": ["RMSE, m", ".4f"]},
        "rows": [{"model": "m", "picture_px": 112, "source": "student", "rmse": 1.5}],
        "details": None,
    }
    columns = {"model": ("model", ""), "image_px": ("image, px", "d"), "rmse": ("RMSE, m", ".4f")}
    recipe = "my 3 pictures: 12 images to fit, 5 to report; chosen on 20% of the images to fit; 2026-11-22."
    old = Report.from_content(content)
    assert old.columns == columns
    assert old.rows == [{"model": "m", "image_px": 112, "source": "student", "rmse": 1.5}]
    assert (old.recipe, list(old.notes)) == (recipe, ["over the images"])
    new = Report("depth", "Depth", columns, [{"image_px": 224}], recipe.replace("22.", "23."))
    (both,) = merged([old, new])
    assert [row["image_px"] for row in both.rows] == [112, 224]
    assert "| m | 112 | 1.5000 |" in both.markdown("command")


@pytest.mark.slow
def test_parts_of_version_0_1_without_centred_metrics_are_merged_and_drawn(suite, tmp_path):
    arguments = ["evaluate", "suite", str(suite), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    (path,) = (tmp_path / "out" / "parts").glob("fidelity-tiny-56-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    added = ("centred", "r2", "better", "edges_removed")
    content["columns"] = {key: column for key, column in content["columns"].items() if not key.startswith(added)}
    content["rows"] = [
        {key: value for key, value in row.items() if not key.startswith(added)} for row in content["rows"]
    ]
    assert list(content["columns"])[4:7] == ["l1", "cosine", "removed"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))[0]
    assert [row["teacher_px"] for row in report["rows"]] == [56] * 4 + [112] * 4
    assert {"centred_cosine", "r2", "better"} <= set(report["columns"])
    old, new = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").split("teacher 112 px")
    assert old.count(" - |") > new.count(" - |")
    assert (tmp_path / "out" / "fidelity.png").exists()


def test_sides_of_costs_of_version_0_1_keep_their_meaning():
    row = {"architecture": "a", "image_px": 256, "variant": "backbone alone, picture x 4", "picture_px": 1024}
    content = {
        **{"task": "cost", "title": "What it costs", "recipe": "", "notes": [], "details": None, "rows": [row]},
        "columns": {"picture_px": ["picture, px", "d"], "per_second": ["pictures/s", ".2f"]},
    }
    report = Report.from_content(content)
    assert report.columns == {"image_px": ("image, px", "d"), "per_second": ("images/s", ".2f")}
    assert (report.rows[0]["student_px"], report.rows[0]["image_px"]) == (256, 1024)


def test_without_matplotlib_a_suite_goes_on_without_plots(suite, tmp_path, monkeypatch, caplog):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    plots._warn_once.cache_clear()
    assert main(["evaluate", "suite", str(suite), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["parts", "report.json", "report.md"]
    assert "![" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    (record,) = caplog.records
    assert "pip install 'brixel[plots]'" in record.getMessage()


# ---------------------------------------------------------------- names of models, and parts read back

COLUMNS = {**SOURCE_COLUMNS, "cosine": ("cosine", ".4f")}


def fake_run(task, model, name):
    row = {"model": name, "image_px": 14, "source": "student", "cosine": 0.5, "cosine_interval": [0.4, 0.6]}
    return Report(task.kind, "Title", COLUMNS, [row], "1 image; 2026-01-01.")


@pytest.fixture
def run_named(tmp_path, suite, monkeypatch):
    """A function that runs one part of a model of some name, and gives the lines that were said."""
    monkeypatch.setattr(Task, "run", fake_run)
    monkeypatch.setattr("brixel.evaluate.suite.save_plot", lambda *_: False)

    def run(*names):
        task = Task("fidelity", (56,), images=(tmp_path / "images",))
        said = []
        parts = [Part(name, {"backbone": "b"}, task) for name in names]
        run_suite(parts, tmp_path / "out", "command", lambda table: SimpleNamespace(patch_px=14), said.append)
        return said

    return run


@pytest.mark.parametrize("name", ["org/name", "../../up", "a\\b", "C:name", "ü" * 200, "a" * 300, " ", "two\nlines"])
def test_a_model_of_any_name_keeps_its_results(tmp_path, run_named, name):
    assert run_named(name) == [f"1 of 1: fidelity, {name}, 56 px"]
    assert "1 of 1 parts are done" in run_named(name)[0]
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "suite.toml"]


def test_names_that_differ_in_what_no_file_name_has_are_different_parts(tmp_path, run_named):
    assert len(run_named("org/name", "org:name", "org_name")) == 3
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("rows"), "the report lacks rows"),
        (lambda c: c.update(task="cost"), "task is 'cost'; expected one of 'fidelity'"),
        (lambda c: c.update(task=["x"]), "task in the report is"),
        (lambda c: c.update(rows=[5]), "rows in the report is .5."),
        (lambda c: c.update(notes="no"), "notes in the report is 'no'"),
        (lambda c: c.update(details=[1]), "details in the report is .1."),
        (lambda c: c["columns"].update(cosine=["cosine", ".999999999f"]), "columns in the report is"),
        (lambda c: c["columns"].update(cosine="ab"), "columns in the report is"),
        (lambda c: c["rows"][0].pop("model"), "model in row 1 is None"),
        (lambda c: c["rows"][0].update(image_px="56"), "image_px in row 1 is '56'"),
        (lambda c: c["rows"][0].update(cosine={}), "'cosine' in row 1 is"),
        (lambda c: c["rows"][0].update(cosine_interval=0.5), "'cosine_interval' in row 1 is 0.5"),
        (lambda c: c["rows"][0].update(cosine_interval=[1, 2, 3]), "'cosine_interval' in row 1 is .1, 2, 3."),
    ],
)
def test_a_part_that_was_changed_is_named(tmp_path, run_named, edit, message):
    run_named("tiny")
    [path] = (tmp_path / "out" / "parts").iterdir()
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=rf"fidelity-tiny-56.*json is damaged or not the report .*{message}"):
        run_named("tiny")


def test_a_figure_that_is_a_text_or_not_finite_is_shown_as_it_is(tmp_path, run_named, monkeypatch):
    run_named("tiny")
    monkeypatch.setattr("brixel.evaluate.suite.save_plot", plots.save_plot)
    [path] = (tmp_path / "out" / "parts").iterdir()
    content = json.loads(path.read_text())
    for value, cell in ((float("nan"), "nan"), ("lost", "lost")):
        content["rows"][0].update(cosine=value)
        path.write_text(json.dumps(content))
        run_named("tiny")
        assert f"| {cell} |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
