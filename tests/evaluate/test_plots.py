"""Plots: what is drawn, read from the figures, and what happens without matplotlib."""

import logging
import math
import sys

import matplotlib
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from brixel.evaluate import plots
from brixel.evaluate.plots import BLUE, GREY, OTHERS, RED, cost_figure, report_figure, save_plot, training_figure
from brixel.evaluate.report import Report


def lines_of(axes):
    """The labelled lines: label -> (colour, x, y)."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): (line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def bars_of(axes):
    """The error bars: colour -> ((x, low, high), ...)."""
    found = {}
    for container in axes.containers:
        (collection,) = container.lines[2]
        ends = [(float(path[0][0]), float(path[0][1]), float(path[1][1])) for path in collection.get_segments()]
        found[to_hex(collection.get_color()[0])] = ends
    return found


def test_a_report_has_a_point_with_an_error_bar_for_every_row():
    """In the colour of its source; the teacher at the size of its student."""
    rows = [
        {"model": "m", "image_px": px, "source": source, "rmse": rmse, "interval": [rmse - 0.1, rmse + 0.2]}
        for px, source, rmse in (
            (224, "bilinear", 0.5),
            (112, "bilinear", 1.0),
            (112, "student", 2.0),
            (448, "teacher", 3.0),
            (112, "mine", 2.5),
        )
    ]
    del rows[-1]["interval"]
    figure = report_figure(Report("depth", "Depth", {}, rows, "recipe"))
    (axes,) = figure.axes
    assert axes.get_title() == "m: RMSE in m, lower is better"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["112 px", "224 px"]
    lines = lines_of(axes)
    offsets = [-0.18, -0.06, 0.06, 0.18]
    expected = {
        "bilinear": (GREY, [offsets[0], 1 + offsets[0]], [1.0, 0.5]),
        "student": (RED, [offsets[1]], [2.0]),
        "teacher, on the image x 4": (BLUE, [offsets[2]], [3.0]),
        "mine": (OTHERS[0], [offsets[3]], [2.5]),
    }
    assert list(lines) == list(expected)
    for name, (colour, x, y) in expected.items():
        assert lines[name] == (colour, pytest.approx(x), y)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(expected)
    bars = bars_of(axes)
    assert bars.keys() == {GREY, RED, BLUE}  # "mine" has no interval
    assert bars[GREY][0] == pytest.approx((offsets[0], 0.9, 1.2))
    assert bars[GREY][1] == pytest.approx((1 + offsets[0], 0.4, 0.7))
    assert bars[BLUE][0] == pytest.approx((offsets[2], 2.9, 3.2))


def test_a_report_has_a_diagram_for_every_metric_and_model():
    rows = [
        {"model": model, "image_px": 28, "source": "student", "cosine": 0.5, "cosine_edges": 0.25}
        for model in ("one", "other")
    ]
    figure = report_figure(Report("fidelity", "Fidelity", {}, rows, "recipe"))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["one: cosine", "other: cosine", "one: cosine at edges", "other: cosine at edges"]
    assert lines_of(figure.axes[3])["student"][2] == [0.25]
    assert len({(axes.get_subplotspec().rowspan.start) for axes in figure.axes}) == 2  # two diagrams per row


def test_rows_without_a_metric_are_left_out_of_its_diagram():
    """Reports of version 0.1 have no centred cosine."""
    rows = [
        {"model": "old", "image_px": 28, "source": "student", "cosine": 0.5},
        {"model": "new", "image_px": 28, "source": "student", "cosine": 0.6, "centred_cosine": 0.25},
    ]
    figure = report_figure(Report("fidelity", "Fidelity", {}, rows, "recipe"))
    assert [axes.get_title() for axes in figure.axes] == ["old: cosine", "new: cosine", "new: centred cosine"]


def test_costs_have_a_diagram_for_every_architecture_and_quantity():
    rows = [
        {"architecture": name, "variant": variant, "output_cells": f"{cells} x {cells}", "gflop": cells**power, **more}
        for name, more in (("one", {"peak_mib": 100.0}), ("other", {}))
        for variant, power in (("backbone", 1), ("student", 2))
        for cells in (16, 64)
        for _ in range(2)  # of two batch sizes
    ]
    figure = cost_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["one: GFLOP", "other: GFLOP", "one: peak memory, MiB"]
    for axes in figure.axes[:2]:
        expected = {"backbone": (GREY, [16, 64], [16, 64]), "student": (RED, [16, 64], [256, 4096])}
        assert lines_of(axes) == expected
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "64"]
    assert lines_of(figure.axes[2])["student"][2] == [100, 100]


def test_a_run_has_its_loss_and_its_validation_over_the_steps():
    losses = [{"step": step, "loss": 4.0 - step / 5} for step in range(1, 11)]
    checks = [{"step": step, "cosine": 0.5, "bilinear_cosine": 0.125} for step in (5, 10)]
    above, below = training_figure([*losses, *checks]).axes
    assert lines_of(above) == {"loss": (BLUE, list(range(1, 11)), [record["loss"] for record in losses])}
    assert lines_of(below) == {
        "1 - cosine, validation": (RED, [5, 10], [0.5, 0.5]),
        "1 - cosine, bilinear": (GREY, [5, 10], [0.875, 0.875]),
    }
    assert above.get_xlim() == below.get_xlim() == (0, 10)  # both start and end at the same step
    checks[1] |= {"centred_cosine": 0.25, "bilinear_centred_cosine": 0.125}  # a run that was begun by version 0.1
    assert lines_of(training_figure([*losses, *checks]).axes[2]) == {
        "1 - centred cosine, validation": (RED, [10], [0.75]),
        "1 - centred cosine, bilinear": (GREY, [10], [0.875]),
    }


def test_without_records_nothing_is_drawn(tmp_path):
    assert training_figure([]) is None
    assert training_figure([{"step": 3, "lr": 0.1}]) is None
    assert training_figure([{"step": 1, "loss": math.nan}]) is None
    assert not save_plot(lambda: training_figure([]), tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 0, "loss": 2.0}],
        [{"step": 7, "cosine": 0.5, "bilinear_cosine": 0.4}],
        [{"step": step, "loss": 0.0, "cosine": 1.0, "bilinear_cosine": 1.0} for step in (1, 2)],
    ],
)
def test_one_record_or_zeros_are_enough(tmp_path, records):
    assert save_plot(lambda: training_figure(records), tmp_path / "curve.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 400


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_values_that_are_not_finite_are_left_out(odd, position):
    records = [{"step": step, "loss": 5.0 / step} for step in range(1, 5)]
    records += [{"step": 4, "cosine": 0.5, "bilinear_cosine": 0.2}]
    odd_record = {"step": 3, "loss": odd, "cosine": odd, "bilinear_cosine": odd}
    mixed = [*records[:position], odd_record, *records[position:]]
    expected, found = ([lines_of(axes) for axes in training_figure(each).axes] for each in (records, mixed))
    assert found == expected


def test_a_plot_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = training_figure([{"step": 1, "loss": 2.0}])

    def dies(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", dies)
    with pytest.raises(KeyboardInterrupt):
        save_plot(lambda: figure, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_global_changes(monkeypatch, tmp_path):
    """No settings, and pyplot, which keeps figures, is not even imported."""
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert save_plot(lambda: training_figure([{"step": 1, "loss": 2.0}]), tmp_path / "curve.png")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def no_matplotlib(monkeypatch, caplog):
    """As if matplotlib were not installed; the warnings."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots._warn_once.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    plots._warn_once.cache_clear()


def test_without_matplotlib_one_line_names_the_extra_once(tmp_path, no_matplotlib):
    for _ in range(3):
        assert not save_plot(lambda: training_figure([{"step": 1, "loss": 2.0}]), tmp_path / "curve.png")
    assert no_matplotlib() == ["plots need 'matplotlib': pip install 'brixel[plots]'; going on without plots"]
    assert list(tmp_path.iterdir()) == []


def test_a_broken_matplotlib_is_as_none(tmp_path, no_matplotlib, monkeypatch):
    def fail(*_, **__):
        raise ImportError("numpy is too old")

    monkeypatch.setattr(plots, "import_extra", fail)
    assert not save_plot(lambda: None, tmp_path / "curve.png")
    assert no_matplotlib() == ["numpy is too old; going on without plots"]
