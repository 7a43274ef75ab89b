"""The table of known models, as people see it."""

import math

import pytest
import torch

import brixel
from brixel import BrixelError
from brixel.backbones.registry import find_backbone, known_backbone
from brixel.backbones.vit import ViT
from brixel.cli.app import main

PUBLISHED = {"brixel-tiny": 5.49, "dinov3-vits16": 21.6, "dinov2-vitl14": 304.4, "siglip2-so400m-p14-384": 412.4}


def test_names_aliases_and_repositories_occur_once():
    rows = brixel.list_models()
    assert len(rows) > 40
    assert [row.name for row in rows[:2]] == ["brixel-small", "brixel-tiny"]
    names = [name for row in rows for name in (row.name, *row.aliases, *row.sources)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *((f"dinov2-{size}", f"dinov2-vit{size[0]}14") for size in ("small", "base", "large", "giant")),
        *(
            (f"dinov2-with-registers-{size}", f"dinov2-vit{size[0]}14-reg4")
            for size in ("small", "base", "large", "giant")
        ),
        ("dinov3-small", "dinov3-vits16"),
        ("dinov3-small-plus", "dinov3-vits16plus"),
        ("dinov3-base", "dinov3-vitb16"),
        ("dinov3-large", "dinov3-vitl16"),
        ("dinov3-huge-plus", "dinov3-vith16plus"),
        ("dinov3-7b", "dinov3-vit7b16"),
        ("dinov3-large-sat493m", "dinov3-vitl16-sat493m"),
        ("dinov3-7b-sat493m", "dinov3-vit7b16-sat493m"),
        ("dinov3-vits16-pretrain-lvd1689m", "dinov3-vits16"),
        ("vit_large_patch16_dinov3.sat493m", "dinov3-vitl16-sat493m"),
        ("siglip2-base-patch16-224", "siglip2-base-p16-224"),
        ("siglip-so400m-patch14-384", "siglip-so400m-p14-384"),
        ("vit_so400m_patch14_siglip_378.v2_webli", "siglip2-so400m-p14-384"),
        ("facebook/dinov2-small", "dinov2-vits14"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3-vitb16"),
        ("google/siglip2-so400m-patch16-naflex", "siglip2-so400m-p16-naflex"),
        ("timm/vit_base_patch14_reg4_dinov2.lvd142m", "dinov2-vitb14-reg4"),
        ("brixel-tiny", "brixel-tiny"),
    ],
)
def test_other_names_of_a_row(alias, name):
    assert known_backbone(alias).name == find_backbone(alias).name == name


@pytest.mark.parametrize(
    ("wrong", "close"),
    [("dinov2-smal", "dinov2-small"), ("dinov3_7b", "dinov3-7b"), ("brixel-tiney", "brixel-tiny")],
)
def test_an_unknown_name_names_the_closest(wrong, close):
    with pytest.raises(BrixelError, match=f"unknown backbone architecture '{wrong}'; did you mean '{close}'"):
        known_backbone(wrong)


def test_where_no_name_is_close_the_names_are_listed_without_aliases():
    with pytest.raises(BrixelError, match="'nothing'; known: brixel-small, brixel-tiny, dinov2-vitb14, ") as caught:
        known_backbone("nothing")
    assert "dinov2-small" not in str(caught.value)
    assert find_backbone("nothing") is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    with torch.device("meta"):
        count = sum(math.prod(parameter.shape) for parameter in ViT(known_backbone(name).vit).parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=2e-3)


def test_gates_and_sources():
    rows = {row.name: row for row in brixel.list_models()}
    assert rows["dinov3-vits16"].gated
    assert not rows["dinov2-vits14"].gated
    assert rows["dinov2-vits14"].sources == ("facebook/dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m")
    assert (rows["brixel-tiny"].sources, rows["brixel-tiny"].adapter) == ((), "brixel-tiny")
    for row in rows.values():
        assert row.gated == row.name.startswith("dinov3-")
        assert len(row.sources) == (0 if row.adapter else 2)


@pytest.mark.slow
def test_the_command_prints_a_line_for_each(capsys):
    assert main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "also", "parameters", "patch", "width", "licence", "gated", "adapter", "sources"]
    assert [line.split()[0] for line in lines] == [row.name for row in brixel.list_models()]
    assert "22.06 M" in lines[0]
    assert "5.49 M" in lines[1]
    assert lines[0].endswith("in the package")
