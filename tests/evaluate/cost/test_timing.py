import re

import pytest
import torch

from brixel.errors import BrixelError
from brixel.evaluate.cost import timing as module
from brixel.evaluate.cost.timing import BACKBONE, LARGE, STUDENT, benchmark, random_student, report, variants

ROUNDS = 6


@pytest.fixture(scope="module")
def run():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "peak_bytes_of", lambda *_: 3 * 2**20)  # its own test below: it starts processes
        made = benchmark(["dinov3-vits16"], image_px=32, rounds=ROUNDS, threads=1, device="cpu")
    assert torch.get_num_threads() == threads
    return made


def test_every_variant_is_timed_and_the_large_image_less_often(run):
    (result,) = run.results
    assert {name: len(seconds) for name, seconds in result.seconds.items()} == {
        BACKBONE: ROUNDS,
        STUDENT: ROUNDS,
        LARGE: 2,
    }
    assert all(second > 0 for seconds in result.seconds.values() for second in seconds)


def test_operations_and_parameters_are_counted(run):
    (result,) = run.results
    assert result.flops[BACKBONE] < result.flops[STUDENT] < result.flops[LARGE]
    assert result.parameters["backbone"] == 21_601_152 - 384  # as published, less the mask token


def test_the_report_holds_figures_and_recipe(run):
    text = report(run, "brixel benchmark --rounds 6")
    assert text.endswith("    brixel benchmark --rounds 6")
    rows = re.findall(r"\| dinov3-vits16 \| ([^|]+) \| [\d.]+ \([\d.]+ to [\d.]+\) \| ([\d.]+) \| [\d.]+ \| 3 \|", text)
    assert [name for name, _ in rows] == [BACKBONE, STUDENT, LARGE]
    assert rows[0][1] == "1.00"
    assert f"torch {torch.__version__}" in text
    assert "32 x 32 px, float32" in text


def test_the_student_is_of_released_shape_and_nothing_multiplies_zeros():
    student = random_student("dinov3-vits16")
    assert student.blocks == (3, 6, 9, 11)
    assert student.head.residual_detour
    assert student.head.out.weight.std() > 0.01
    calls = variants(student, 32, student.backbone.cls_token)
    with torch.no_grad():
        assert [tuple(calls[name]().shape) for name in (BACKBONE, STUDENT, LARGE)] == [
            (1, 384, 2, 2),
            (1, 384, 8, 8),
            (1, 384, 8, 8),
        ]


def test_an_unknown_architecture_is_refused_at_once():
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        benchmark(["dinov3-vitb16", "dinov3-vits1"], device="cpu")


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    peak = module.peak_bytes_of("dinov3-vits16", STUDENT, 32, torch.device("cpu"), torch.float32)
    assert 4 * (21.6e6 + 2.1e6) < peak < 8 * 2**30


def test_attention_is_counted_on_the_cpu():
    query = torch.randn(1, 2, 8, 4)
    counted = module.flops_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert counted == 2 * (2 * 2 * 8 * 8 * 4)  # two products of 8 x 4 with 4 x 8, two heads, two a multiply-add
