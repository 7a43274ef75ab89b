"""Models with random weights, and the measurements that reports of cost are made of."""

import pytest
import torch

from brixel.errors import BrixelError
from brixel.evaluate.cost import timing
from brixel.evaluate.cost.timing import (
    BACKBONE,
    LARGE,
    STUDENT,
    check_side,
    random_model,
    random_student,
    seconds_in_turn,
    torch_threads,
    variants,
)

CPU = torch.device("cpu")


def test_the_student_is_of_released_shape_and_nothing_multiplies_zeros():
    student = random_student("dinov3-vits16")
    assert student.blocks == (3, 6, 9, 11)
    assert student.head.residual_detour
    assert student.head.out.weight.std() > 0.01
    calls = variants(student, 32)
    with torch.no_grad():
        assert [tuple(calls[name]().shape) for name in (BACKBONE, STUDENT, LARGE)] == [
            (1, 384, 2, 2),
            (1, 384, 8, 8),
            (1, 384, 8, 8),
        ]


def test_the_model_is_of_the_shape_that_training_gives():
    model = random_model("dinov3-vits16")
    assert model.config.backbone.title == "dinov3-vits16"
    assert (model.config.adapter.blend, model.config.adapter.residual_detour) == (True, False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 384, 8, 8)


def test_calls_are_timed_in_turn_and_slow_ones_less_often():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in ("one", "other", "slow")}
    seconds = seconds_in_turn(calls, 6, CPU, slow=["slow"])
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"one": 6, "other": 6, "slow": 2}
    assert all(second > 0 for rounds in seconds.values() for second in rounds)
    warm_up, timed = called[:7], called[7:]
    assert warm_up == ["one", "other"] * 3 + ["slow"]
    assert timed == ["one", "other", "slow"] + ["one", "other"] * 4 + ["one", "other", "slow"]


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    with torch_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_sides_and_architectures_are_checked():
    check_side("dinov3-vits16", 256)
    with pytest.raises(BrixelError, match="multiples of 14 px, and a side is 256 px; such as 252"):
        check_side("dinov2-vits14", 256)
    with pytest.raises(BrixelError, match="did you mean 'dinov3-vits16'"):
        check_side("dinov3-vits1", 256)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    peak = timing.peak_bytes_of("dinov3-vits16", STUDENT, 32, CPU, torch.float32)
    assert 4 * (21.6e6 + 2.1e6) < peak < 8 * 2**30
