"""The losses of training against slow twins in numpy, float64, after section 3 of `docs/method.md`."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from brixel.errors import BrixelError
from brixel.model.losses import (
    LossWeights,
    edge_loss,
    l1_loss,
    principal_directions,
    spectral_loss,
    total_loss,
)

Array = np.ndarray
SHAPES = [(2, 10, 16, 16), (1, 9, 7, 12), (3, 4, 3, 5), (1, 8, 3, 3)]
SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])


def random_maps(shape: tuple[int, ...] = SHAPES[0], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher, float64; the teacher's channels are correlated, with means far from zero."""
    made = torch.Generator().manual_seed(seed)
    batch, width, height, across = shape
    mixing = torch.randn(width, width, generator=made, dtype=torch.float64) * 0.7 ** torch.arange(width)
    cells = torch.randn(batch, height * across, width, generator=made, dtype=torch.float64) @ mixing.mT
    teacher = cells.mT.reshape(shape) + 3 * torch.randn(width, 1, 1, generator=made, dtype=torch.float64)
    student = teacher + 0.5 * torch.randn(shape, generator=made, dtype=torch.float64)
    return student, teacher


def twin_directions(teacher: Array, count: int) -> Array:
    cells = [one[:, row, column] for one in teacher for row, column in list(np.ndindex(one.shape[1:]))[::3]]
    centred = np.stack(cells) - np.mean(cells, axis=0)
    return np.linalg.svd(centred)[2][:count]


def twin_l1(student: Array, teacher: Array) -> float:
    total = 0.0
    for place in np.ndindex(student.shape):
        total += abs(student[place] - teacher[place])
    return total / student.size


def twin_edge(student: Array, teacher: Array, directions: Array | None = None) -> float:
    if directions is None:
        directions = twin_directions(teacher, min(8, teacher.shape[1]))
    total, (batch, _, height, width) = 0.0, student.shape
    for kernel in (SOBEL_X, SOBEL_X.T):
        squares = []
        for one in range(batch):
            projected = [np.tensordot(directions, maps[one], 1) for maps in (student, teacher)]
            for direction, row, column in np.ndindex(len(directions), height - 2, width - 2):
                windows = [maps[direction, row : row + 3, column : column + 3] for maps in projected]
                squares.append(((windows[0] * kernel).sum() - (windows[1] * kernel).sum()) ** 2)
        total += np.mean(squares)
    return total


def squared_radius(row: int, column: int, height: int, width: int, shifted: bool) -> Fraction:
    """Exact, so that no cell falls into a neighbouring ring by rounding."""
    if not shifted:
        return Fraction((row - height // 2) ** 2 + (column - width // 2) ** 2)
    signed = [Fraction(at - size if 2 * at >= size else at, size) for at, size in ((row, height), (column, width))]
    return signed[0] ** 2 + signed[1] ** 2


def twin_rings(height: int, width: int, shifted: bool) -> list[list[tuple[int, int]]]:
    """The cells of the spectrum in each of the 24 rings; those below 0.3 of the largest radius are empty."""
    radii = {place: squared_radius(*place, height, width, shifted) for place in np.ndindex(height, width)}
    largest, rings = max(radii.values()), [[] for _ in range(24)]
    for place, radius in radii.items():
        ring = max(number for number in range(24) if Fraction(number, 24) ** 2 * largest <= radius)
        if Fraction(2 * ring + 1, 48) >= Fraction(3, 10):
            rings[ring].append(place)
    return rings


def twin_spectral(student: Array, teacher: Array, shifted: bool = True) -> float:
    height, width = student.shape[2:]
    rings = [places for places in twin_rings(height, width, shifted) if places]
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1)) for size in (height, width)]
    window, errors = np.outer(*hann), []
    for one in range(len(student)):
        amplitudes = [
            np.mean([np.abs(np.fft.fft2(channel * window, norm="ortho")) for channel in maps[one]], axis=0)
            for maps in (student, teacher)
        ]
        for places in rings:
            logs = [np.log(np.mean([each[place] for place in places]) + 1e-6) for each in amplitudes]
            errors.append((logs[0] - logs[1]) ** 2)
    return float(np.mean(errors))


def released_rings(student: Tensor, teacher: Tensor) -> Tensor:
    return spectral_loss(student, teacher, shifted=False)


def twin_released_rings(student: Array, teacher: Array) -> float:
    return twin_spectral(student, teacher, shifted=False)


Loss = Callable[[Tensor, Tensor], Tensor]
TWINS = [
    pytest.param(l1_loss, twin_l1, id="l1"),
    pytest.param(edge_loss, twin_edge, id="edge"),
    pytest.param(spectral_loss, twin_spectral, id="spectral"),
    pytest.param(released_rings, twin_released_rings, id="released-rings"),
]
LOSSES = [pytest.param(twin.values[0], id=twin.id) for twin in TWINS]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("loss", "twin"), TWINS)
def test_values_agree_with_the_twin(loss: Loss, twin: Callable[..., float], shape: tuple[int, ...]) -> None:
    student, teacher = random_maps(shape)
    expected = twin(student.numpy(), teacher.numpy())
    exact = loss(student, teacher)
    assert exact.dtype == torch.float64
    assert exact.ndim == 0
    assert exact.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    single = loss(student.float(), teacher.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "twin"), TWINS)
def test_gradients_agree_with_the_twin(loss: Loss, twin: Callable[..., float]) -> None:
    student, teacher = random_maps((2, 9, 4, 5))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    values, step, made = student.detach().numpy(), 1e-6, np.random.default_rng(0)
    for place in (tuple(made.integers(student.shape)) for _ in range(8)):
        moved = np.zeros_like(values)
        moved[place] = step
        rise = twin(values + moved, teacher.numpy()) - twin(values - moved, teacher.numpy())
        assert gradient[place].item() == pytest.approx(rise / (2 * step), rel=1e-5, abs=1e-8)
    assert torch.autograd.gradcheck(lambda maps: loss(maps, teacher), student)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_student_gets_a_gradient(loss: Loss) -> None:
    student, teacher = (maps.requires_grad_() for maps in random_maps())
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert not loss(student.detach(), teacher).requires_grad
    assert not principal_directions(teacher).requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss: Loss) -> None:
    student, teacher = (maps.float() for maps in random_maps())
    student.requires_grad_()
    plain = loss(student, teacher)
    (gradient,) = torch.autograd.grad(plain, student)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(student, teacher)
        directions = principal_directions(teacher)
    assert torch.equal(cast, plain)
    assert torch.equal(torch.autograd.grad(cast, student)[0], gradient)
    assert torch.equal(directions, principal_directions(teacher))


@pytest.mark.parametrize("loss", LOSSES)
def test_narrow_maps_are_widened(loss: Loss) -> None:
    student, teacher = (maps.bfloat16() for maps in random_maps())
    found = loss(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(student.float(), teacher.float()))
    found.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("fill", [(0.0, 0.0), (0.0, 3.0), (2.0, 2.0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_constant_maps_are_finite(loss: Loss, fill: tuple[float, float]) -> None:
    student, teacher = (torch.full((1, 8, 9, 8), value) for value in fill)
    found = loss(student.requires_grad_(), teacher)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(student.grad).all()
    if fill[0] == fill[1]:
        assert found == 0


def test_rings_hold_the_true_frequencies_or_the_released_ones() -> None:
    """A difference in the finest pattern is what true rings see and released ones do not; a level, the opposite."""
    _, teacher = random_maps((1, 8, 16, 16))
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    checkerboard, level = 5 * (-1.0) ** (y + x), 5.0
    unseen = 1e-4  # not zero: a little leaks through the window
    assert spectral_loss(teacher + checkerboard, teacher) > 0.05
    assert released_rings(teacher + checkerboard, teacher) < unseen
    assert spectral_loss(teacher + level, teacher) < unseen
    assert released_rings(teacher + level, teacher) > 0.01


def test_edges_ignore_what_the_directions_do_not_show() -> None:
    student, teacher = random_maps((1, 9, 6, 6))
    directions = torch.eye(9, dtype=torch.float64)[:2]
    expected = twin_edge(student.numpy(), teacher.numpy(), directions.numpy())
    assert edge_loss(student, teacher, directions=directions.float()).item() == pytest.approx(expected)
    assert edge_loss(teacher + student[:, :, :1, :1], teacher).item() == pytest.approx(0)  # a constant shift
    other = teacher.clone()
    other[:, 2:] = student[:, 2:]
    assert edge_loss(other, teacher, directions=directions) == 0
    assert not edge_loss(student, teacher, directions=directions.requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_agree_with_svd(dtype: torch.dtype) -> None:
    _, teacher = random_maps((2, 12, 8, 8))
    found = principal_directions(teacher.to(dtype), 5)
    assert found.dtype == dtype
    expected = twin_directions(teacher.numpy(), 5)
    overlap = np.abs(found.double().numpy() @ expected.T)  # one by one, the sign aside
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-10 if dtype == torch.float64 else 1e-4)


def test_directions_keep_a_small_spread_beside_a_large_mean() -> None:
    _, teacher = random_maps((2, 12, 8, 8))
    far = (teacher + 1000).float()
    overlap = np.abs(principal_directions(far, 3).double().numpy() @ twin_directions(far.double().numpy(), 3).T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-3)


def fit_one_half(rank: int, folder: str) -> None:
    """What one of two processes does: the directions and the edge loss of its images, and of itself alone."""
    torch.set_num_threads(1)
    teacher = torch.load(f"{folder}/teacher.pt")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = [torch.distributed.new_group([member]) for member in range(2)][rank]
    mine = teacher[rank::2]  # dealt out as torch's DistributedSampler does
    found = principal_directions(mine), edge_loss(mine.flip(3), mine), principal_directions(mine, group=alone)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_batch_that_is_dealt_out_has_the_directions_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes, which meet in a sum."""
    _, teacher = random_maps((4, 10, 5, 7))  # 35 cells, not a multiple of three
    whole = principal_directions(teacher)
    meeting, given = threading.Barrier(2, timeout=60), {}

    def all_reduce(values: Tensor, group: object) -> None:
        given[threading.get_ident()] = values.clone()
        meeting.wait()
        total = sum(given.values())
        meeting.wait()
        values.copy_(total)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(principal_directions, (teacher[::2], teacher[1::2]))
    assert torch.equal(first, second)
    torch.testing.assert_close((first @ whole.mT).abs(), torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.slow
def test_two_processes_fit_the_directions_of_the_whole_batch(tmp_path: Path) -> None:
    _, teacher = random_maps((4, 10, 5, 7))  # 35 cells, not a multiple of three
    torch.save(teacher, tmp_path / "teacher.pt")
    # processes of their own: those that multiprocessing starts could not import this file by its name
    runs = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = principal_directions(teacher)
    assert torch.equal(parts[0][0], parts[1][0])
    torch.testing.assert_close((parts[0][0] @ whole.mT).abs(), torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, edge_loss(teacher.flip(3), teacher))
    for rank in range(2):
        torch.testing.assert_close(parts[rank][2], principal_directions(teacher[rank::2]))


def test_total_is_the_weighted_sum() -> None:
    student, teacher = random_maps()
    student.requires_grad_()
    total, parts = total_loss(student, teacher, LossWeights())
    assert list(parts) == ["l1", "edge", "spectral"]
    assert not any(part.requires_grad for part in parts.values())
    assert parts["l1"] == l1_loss(student, teacher)
    assert parts["edge"] == edge_loss(student, teacher)
    assert parts["spectral"] == spectral_loss(student, teacher)
    torch.testing.assert_close(total.detach(), parts["l1"] + parts["edge"] + 0.1 * parts["spectral"])
    expected = l1_loss(student, teacher) + edge_loss(student, teacher) + 0.1 * spectral_loss(student, teacher)
    gradients = [torch.autograd.grad(each, student)[0] for each in (total, expected)]
    torch.testing.assert_close(*gradients)


def test_total_computes_only_what_weighs() -> None:
    student, teacher = random_maps((1, 4, 2, 2))  # too small for edges and the spectrum
    total, parts = total_loss(student, teacher, LossWeights(l1=2, edge=0, spectral=0))
    assert list(parts) == ["l1"]
    assert total == 2 * parts["l1"]
    student, teacher = random_maps()
    _, parts = total_loss(student, teacher, LossWeights(l1=0, edge=0, true_rings=False))
    assert parts == {"spectral": released_rings(student, teacher)}


@pytest.mark.parametrize("loss", LOSSES)
def test_other_shapes_are_refused(loss: Loss) -> None:
    with pytest.raises(BrixelError, match=r"student's map has shape \(1, 4, 8, 8\), the teacher's \(1, 4, 8, 9\)"):
        loss(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 9))
    for shape in ((4, 8, 8), (0, 4, 8, 8)):
        with pytest.raises(BrixelError, match=r"expected one shape \(B, D, H, W\)"):
            loss(torch.zeros(shape), torch.zeros(shape))
    if loss is not l1_loss:
        with pytest.raises(BrixelError, match=r"\(1, 4, 2, 8\).*at least 3 x 3 cells"):
            loss(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8))


@pytest.mark.parametrize(("shape", "count"), [((1, 4, 8, 8), 5), ((1, 4, 8, 8), 0), ((4, 8, 8), 2), ((0, 4, 8, 8), 2)])
def test_directions_that_cannot_be_fitted_are_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(BrixelError, match=rf"{count} directions of maps .*expected 1 to D of \(B, D, H, W\)"):
        principal_directions(torch.zeros(shape), count)


def test_directions_refuse_values_that_are_not_finite() -> None:
    with pytest.raises(BrixelError, match="not finite"):
        principal_directions(torch.full((1, 9, 4, 4), torch.nan))


def test_directions_of_another_width_are_refused() -> None:
    with pytest.raises(BrixelError, match=r"shape \(8, 5\); expected \(N, 10\)"):
        edge_loss(*random_maps(), directions=torch.zeros(8, 5))


@pytest.mark.parametrize("weights", [{"l1": -1.0}, {"edge": float("nan")}, {"l1": 0, "edge": 0, "spectral": 0}])
def test_weights_that_make_no_loss_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(BrixelError, match="weights l1, edge, spectral"):
        LossWeights(**weights)


if __name__ == "__main__":
    fit_one_half(int(sys.argv[1]), sys.argv[2])
