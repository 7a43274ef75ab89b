"""The table of known models, as people see it."""

import math

import pytest
import torch

import brixel
from brixel.backbones.vit import ViT
from brixel.cli.app import main

PUBLISHED = {"brixel-tiny": 5.49, "dinov3-vits16": 21.6, "dinov2-vitl14": 304.4, "siglip2-so400m-p14-384": 412.4}


def test_names_are_those_of_the_rows_and_each_occurs_once():
    names = [row.name for row in brixel.list_models()]
    assert len(set(names)) == len(names) > 40
    assert names[0] == "brixel-tiny"


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name):
    row = next(each for each in brixel.list_models() if each.name == name)
    with torch.device("meta"):
        count = sum(math.prod(each.shape) for each in ViT(row.vit).parameters())
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


def test_the_command_prints_a_line_for_each(capsys):
    assert main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "alias", "numbers", "patch", "width", "licence", "gated", "adapter", "sources"]
    assert [line.split()[0] for line in lines] == [row.name for row in brixel.list_models()]
    assert "5.49 M" in lines[0]
    assert lines[0].endswith("in the package")
