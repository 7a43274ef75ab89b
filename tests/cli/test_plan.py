import dataclasses
import json

from brixel import BrixelFeatures

LIMIT = ("--memory-limit", "60MiB", "--device", "cpu", "--tiles", "never")


def test_plan_prints_the_strategy(run, capsys):
    assert run("plan", "512x512", *LIMIT) == 0
    printed = capsys.readouterr().out
    assert "512 x 512 px" in printed
    assert "60 MiB" in printed
    assert run("plan", "512x512", "--memory-limit", "4GiB", "--tiles", "always", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "tiles" in printed
    assert "an approximation" in printed
    assert run("plan", "64x64", "--memory-limit", "4MiB", "--device", "cpu") == 2
    assert "the limit is 4 MiB" in capsys.readouterr().err
    assert run("plan") == 2
    assert "a size HEIGHTxWIDTH" in capsys.readouterr().err


def test_plan_as_json_is_that_of_python(run, capsys):
    assert run("plan", "512x512", *LIMIT, "--json") == 0
    captured = capsys.readouterr()
    plan = BrixelFeatures.from_pretrained(device="cpu").plan((512, 512), memory_limit="60MiB", tiles="never")
    assert json.loads(captured.out) == json.loads(json.dumps(dataclasses.asdict(plan)))
    assert captured.err == ""


def test_plan_takes_the_short_side(run, capsys):
    limit = ("--memory-limit", "4GiB", "--device", "cpu")
    assert run("plan", "3000x4000", "--short-side-px", 256, *limit, "--json") == 0
    assert json.loads(capsys.readouterr().out)["padded_hw"] == [256, 352]
    assert run("plan", "64x96", *limit, "--json") == 0
    assert json.loads(capsys.readouterr().out)["padded_hw"] == [64, 96]
