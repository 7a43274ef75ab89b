import dataclasses
import math
import typing
from pathlib import Path

import pytest

from brixel import BrixelError
from brixel.errors import MissingFileError
from brixel.train import LossWeights, TrainConfig
from brixel.train.config import INCIDENTAL, PRESETS, differences, fields, make_config, read_settings, write_settings

NEEDED = {"backbone": "b", "images": ("i",), "out": "o"}
# another valid value for every setting
OTHER = {
    **{"backbone": "bb", "images": ("j", "k"), "out": "oo", "val": ("v",), "architecture": "dinov2-vits14"},
    **{"steps": 7, "batch_size": 3, "accumulate": 2, "teacher_px": 112, "max_zoom": 2.0, "flip": False},
    **{"small": "skip", "cache": 9, "cache_dir": "c", "optimizer": "adam", "lr": 1e-5, "weight_decay": 0.5},
    **{"warmup": 3, "schedule": "release", "clip_norm": 0.0, "ema": 0.5, "drop_path": 0.0, "l1": 0.5, "edge": 0.5},
    **{
        "spectral": 1e-7,
        "cosine": 0.5,
        "true_rings": False,
        "val_images": 0,
        "val_every": 5,
        "save_every": 6,
        "log_every": 7,
    },
    **{"cosine": 0.5, "workers": 0, "seed": 2**40, "device": "cpu", "fit": 5, "about": "a few"},
    **{"generation": 1, "sizes": (28, 42), "train_universal": True, "cutouts": ("c", "d"), "composites": 0.5},
}
KINDS = {field.name: kind for field, kind in fields()}
WHOLE = [name for name, kind in KINDS.items() if kind is int or kind == int | None]
REAL = [name for name, kind in KINDS.items() if kind is float]
CHOICES = [name for name, kind in KINDS.items() if typing.get_origin(kind) is typing.Literal]
TEXTS = [name for name, kind in KINDS.items() if kind is str or kind == str | None]
FOLDERS = ["images", "val", "cutouts"]


def new(**settings: object) -> TrainConfig:
    return TrainConfig(**{**NEEDED, **settings})


def test_the_lists_above_name_every_setting():
    assert set(OTHER) == set(KINDS)
    assert sorted(
        [*WHOLE, *REAL, *CHOICES, *TEXTS, *FOLDERS, "flip", "true_rings", "sizes", "train_universal"]
    ) == sorted(KINDS)
    default = new()
    for name, value in OTHER.items():
        assert getattr(default, name) != value, name


def test_every_setting_has_a_line_of_help_which_is_also_in_the_docstring():
    for field, _ in fields():
        line = field.metadata["help"]
        assert line
        assert not set(line) & set("\n%")  # argparse formats %
        assert f"    {field.name}: {line}.\n" in TrainConfig.__doc__


def test_names_of_version_0_1_are_still_read():
    assert make_config({**NEEDED, "val_pictures": 3}).val_images == 3


@pytest.mark.parametrize("name", sorted(OTHER))
def test_other_valid_values_are_stored_unchanged(name):
    config = new(**{name: OTHER[name]})
    assert getattr(config, name) == OTHER[name]
    assert type(getattr(config, name)) is type(OTHER[name])


WRONG_TYPES = {
    **{key: ["3", 3.0, True, [3]] for key in WHOLE},
    **{key: ["0.5", True, None, [0.5]] for key in REAL},
    **{key: ["other", None, 1, ["adam"]] for key in CHOICES},
    **{key: [1, True, ["a"], b"a"] for key in TEXTS},
    **{key: [1, None, ["a", 1], {"a": "b"}, b"a"] for key in FOLDERS},
    **{key: [1, 0, "true", None] for key in ["flip", "true_rings"]},
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_a_wrong_type_names_the_setting_and_the_value(name, value):
    with pytest.raises(BrixelError, match=f"^{name} is ") as caught:
        new(**{name: value})
    assert repr(value) in str(caught.value)
    assert "expected" in str(caught.value)


WRONG_VALUES = {
    **{key: [0, -1] for key in ["steps", "batch_size", "accumulate", "val_every", "save_every", "log_every"]},
    **{key: [-1] for key in ["cache", "warmup", "workers", "val_images"]},
    **{key: [-1e-09, math.nan, math.inf] for key in ["lr", "weight_decay", "clip_norm", "l1", "edge", "spectral"]},
    **{key: [-0.1, 1.0, 2, math.nan] for key in ["ema", "drop_path"]},
    **{"seed": [-1, 2**63], "teacher_px": [0, -56], "max_zoom": [0.99, 0, math.nan, math.inf]},
    **{"images": [(), [], "", ("a", "")], "backbone": [""], "out": [""], "val": [("",)]},
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_a_wrong_value_names_the_setting_when_the_configuration_is_made(name, value):
    with pytest.raises(BrixelError, match=f"^{name} is "):
        new(**{name: value})


def test_losses_that_are_all_off_are_refused():
    with pytest.raises(BrixelError, match="l1, cosine, edge and spectral"):
        new(l1=0, cosine=0, edge=0, spectral=0)


@pytest.mark.parametrize("name", ["backbone", "images", "out"])
def test_settings_without_a_default_must_be_given(name):
    settings = {key: value for key, value in NEEDED.items() if key != name}
    for given in (settings, {**settings, name: None}):
        with pytest.raises(BrixelError, match=f"missing: {name}$"):
            make_config(given)


def test_all_missing_settings_are_named_in_one_message():
    with pytest.raises(BrixelError, match="missing: backbone, images, out"):
        make_config({})


def test_paths_single_folders_and_whole_numbers_are_converted_to_the_type_of_the_setting():
    config = new(images=Path("a"), val="b", out=Path("c"), backbone=Path("d"), cache_dir=Path("e"), lr=1, ema=0)
    assert (config.images, config.val, config.out, config.backbone) == (("a",), ("b",), "c", "d")
    assert (config.cache_dir, config.lr, config.ema) == ("e", 1.0, 0.0)
    assert type(config.lr) is type(config.ema) is float
    assert new(images=["a", Path("b")]).images == ("a", "b")


def test_the_configuration_is_frozen_hashable_and_equal_by_value():
    config = new()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert config == new()
    assert hash(config) == hash(new())


def test_the_weights_of_the_losses():
    config = new(l1=0.5, edge=2, spectral=0, true_rings=False, cosine=3)
    assert config.loss_weights == LossWeights(0.5, 2.0, 0.0, False, 3.0)
    assert new().loss_weights == LossWeights(1.0, 0.0, 0.0, True, 1.0)


def test_larger_sizes_have_fewer_crops():
    config = new(sizes=(112, 168, 224), batch_size=9)
    assert config.batch_sizes == [9, 4, 2]
    assert [config.scaled(1000, index) for index in range(3)] == [1000, 444, 250]
    assert config.crops_per_step(2) == 10
    assert new(sizes=(112, 1120), batch_size=1).batch_sizes == [1, 1]
    assert new(batch_size=9, accumulate=2).crops_per_step(3) == 54
    assert new(sizes=(112,), batch_size=9).batch_sizes == [9]


@pytest.mark.parametrize("sizes", [(224, 112), (112, 112)])
def test_sizes_that_do_not_ascend_are_refused(sizes):
    with pytest.raises(BrixelError, match="sizes are .*; expected ascending ones, each once"):
        new(sizes=sizes)


def test_sizes_and_the_teacher_s_side_are_not_given_together():
    with pytest.raises(BrixelError, match="sizes and teacher_px are both given"):
        new(sizes=(112,), teacher_px=448)


def test_a_complete_file_of_version_0_2_is_of_the_first_generation():
    """All settings of that time are in the files that runs write."""
    old = {"fit": 2048, "ema": 0.99, "seed": 0, **NEEDED}
    assert (make_config(old).generation, make_config(old).cosine) == (1, 0.0)
    assert make_config({**old, "generation": 2}).generation == 2
    assert make_config(NEEDED).generation == 2


@pytest.mark.parametrize(("name", "meant"), [("learning_rte", None), ("step", "steps"), ("warm_up", "warmup")])
def test_an_unknown_setting_is_refused_with_the_nearest_one(name, meant):
    with pytest.raises(BrixelError, match=f"unknown setting '{name}'; ") as caught:
        make_config({**NEEDED, name: 1})
    assert (f"did you mean '{meant}'?" if meant else "known: about, accumulate, ") in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_nearest_one():
    with pytest.raises(BrixelError, match="unknown preset 'relase'; did you mean 'release'"):
        make_config(NEEDED, preset="relase")


def test_presets():
    assert make_config(NEEDED) == make_config(NEEDED, preset="default") == new()
    release = make_config(NEEDED, preset="release")
    assert (release.optimizer, release.lr, release.schedule) == ("adam", 1e-3, "release")
    assert (release.weight_decay, release.clip_norm, release.ema, release.true_rings) == (0.0, 0.0, 0.0, False)
    assert differences(release, dataclasses.replace(new(), **PRESETS["release"])) == []
    assert make_config({**NEEDED, "lr": 0.5}, preset="release").lr == 0.5
    for preset in PRESETS:
        assert set(PRESETS[preset]) <= set(KINDS) - set(NEEDED)
    with pytest.raises(TypeError):
        PRESETS["release"]["lr"] = 1.0


# ---------------------------------------------------------------- as TOML

PATHS = [
    "plain",
    "a b#c = 'd'",
    'quo"te"s',
    "back\\slash\\n",
    "Bücher/写真/📷",
    "tab\there\nline",
    "bell\x07\x7f",
    "[x]",
]


@pytest.mark.parametrize("path", PATHS)
def test_unusual_paths_survive_the_file(tmp_path, path):
    config = new(backbone=path, images=(path, "other"), out=path, val=(path,), cache_dir=path)
    write_settings(tmp_path / "train.toml", config)
    assert make_config(read_settings(tmp_path / "train.toml")) == config


@pytest.mark.parametrize(
    "settings", [{}, {**OTHER, "teacher_px": None}, {"lr": 1e-300, "l1": 1e22, "weight_decay": 0.1 + 0.2}, {"val": ()}]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_survives_the_file_whatever_the_preset(tmp_path, settings, preset):
    config = make_config({**NEEDED, **settings}, preset=preset)
    write_settings(tmp_path / "train.toml", config)
    written = read_settings(tmp_path / "train.toml")
    expected = {name for name in KINDS if getattr(config, name) is not None}
    assert set(written) == expected
    for other in PRESETS:
        assert make_config(written, preset=other) == config
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]


def test_a_file_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "bad.toml"
    for content in (b"steps = \n", b"steps = 3\nsteps = 4\n", b"out = '\xff'\n", b"{"):
        path.write_bytes(content)
        with pytest.raises(BrixelError, match=r"bad\.toml is no TOML in UTF-8 \("):
            read_settings(path)


def test_settings_that_are_no_file_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no settings at .*absent\.toml: there is no such file"):
        read_settings(tmp_path / "absent.toml")
    with pytest.raises(BrixelError, match="is a folder; expected a file"):
        read_settings(tmp_path)


def test_a_table_in_the_file_is_an_unknown_setting(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text('backbone = "b"\nimages = "i"\nout = "o"\n[data]\nsteps = 3\n')
    with pytest.raises(BrixelError, match="unknown setting 'data'"):
        make_config(read_settings(path))


# ---------------------------------------------------------------- what matters to the result


@pytest.mark.parametrize("name", sorted(OTHER))
def test_differences_name_what_matters_with_both_values(name):
    here, there = new(**{name: OTHER[name]}), new()
    expected = [] if name in INCIDENTAL else [f"{name}: {OTHER[name]!r}, not {getattr(there, name)!r}"]
    assert differences(here, there) == expected
    assert differences(here, here) == []


def test_incidental_settings_are_settings():
    assert set(KINDS) > INCIDENTAL
    assert not {"steps", "seed", "batch_size", "lr", "cache", "val_every"} & INCIDENTAL
