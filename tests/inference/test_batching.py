import pytest
import torch

from brixel.inference.batching import run_batches


def images(*sizes):
    return [(torch.full((3, height, height), float(index)), index) for index, height in enumerate(sizes)]


def recorder(calls):
    def forward(batch):
        calls.append(tuple(batch.shape))
        return batch[:, :1] * 10

    return forward


@pytest.mark.parametrize(
    ("sizes", "batch_size", "batches"),
    [
        ((4, 4, 4, 4, 4), 2, [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)]),
        ((4, 4, 5, 4), 8, [(3, 3, 4, 4), (1, 3, 5, 5)]),
        ((4, 5, 4, 5, 5), 2, [(2, 3, 4, 4), (2, 3, 5, 5), (1, 3, 5, 5)]),
        # the first waits no longer than eight images for another of its size
        ((4, 5, 5, 5, 5, 5, 5, 5, 4), 2, [(2, 3, 5, 5)] * 3 + [(1, 3, 4, 4), (1, 3, 5, 5), (1, 3, 4, 4)]),
        ((4, 5, 4), 1, [(1, 3, 4, 4), (1, 3, 5, 5), (1, 3, 4, 4)]),
        ((4,), 3, [(1, 3, 4, 4)]),
        ((), 3, []),
    ],
)
def test_images_of_one_size_share_a_batch_and_order_is_kept(sizes, batch_size, batches):
    calls = []
    results = list(run_batches(recorder(calls), images(*sizes), batch_size=batch_size))
    assert calls == batches
    assert [tag for _, tag in results] == list(range(len(sizes)))
    for result, tag in results:
        assert torch.equal(result, torch.full((1, sizes[tag], sizes[tag]), 10.0 * tag))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_item_without_pixels_comes_in_its_turn(batch_size):
    items = [(None, "first"), *images(4, 5), (None, "fourth"), *images(4), (None, "last")]
    results = list(run_batches(recorder([]), items, batch_size=batch_size))
    assert [tag for _, tag in results] == ["first", 0, 1, "fourth", 0, "last"]
    assert [result is None for result, _ in results] == [True, False, False, True, False, True]


def test_an_error_in_place_of_a_result_comes_in_its_turn():
    def forward(batch):
        return [MemoryError() if image[0, 0, 0] == 1 else image for image in batch]

    results = list(run_batches(forward, images(4, 4, 5, 4), batch_size=2))
    assert [(isinstance(result, MemoryError), tag) for result, tag in results] == [
        (False, 0),
        (True, 1),
        (False, 2),
        (False, 3),
    ]


def test_nothing_is_read_ahead_of_the_batch_at_hand():
    taken = []

    def items():
        for item in images(*[4] * 9):
            taken.append(item[1])
            yield item

    stream = run_batches(recorder([]), items(), batch_size=2)
    assert taken == []
    next(stream)
    assert taken == [0, 1]
    next(stream)
    assert taken == [0, 1]
    next(stream)
    assert taken == [0, 1, 2, 3]


def test_results_before_a_failing_item_come_first():
    def items():
        yield from images(4, 4, 4)
        raise KeyError("the fourth")

    seen = []
    with pytest.raises(KeyError, match="the fourth"):
        for _, tag in run_batches(recorder([]), items(), batch_size=8):
            seen.append(tag)
    assert seen == [0, 1, 2]


def test_results_can_take_part_in_training():
    """They carry no graph of the forward pass, and are ordinary tensors, not inference tensors."""
    weight = torch.ones((), requires_grad=True)
    (result, _), *_ = run_batches(lambda batch: batch * weight, images(2), batch_size=1)
    assert not result.requires_grad
    (result * weight).sum().backward()


@pytest.mark.parametrize(("allowed", "first"), [(99, (4, 3, 5, 5)), (4, (1, 3, 4, 4))])
def test_no_more_is_held_than_allowed(allowed, first):
    calls = []
    results = run_batches(recorder(calls), images(4, 5, 5, 5, 5, 4, 4, 4), batch_size=4, max_in_flight=lambda: allowed)
    assert [tag for _, tag in results] == list(range(8))
    assert calls[0] == first


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_of_one_size_is_formed_where_only_that_may_be_held(batch_size):
    calls = []
    results = run_batches(recorder(calls), images(*[4] * 6), batch_size=batch_size, max_in_flight=lambda: batch_size)
    assert len(list(results)) == 6
    assert calls == [(batch_size, 3, 4, 4)] * (6 // batch_size)


def test_a_batch_of_a_size_is_no_larger_than_allowed():
    calls = []
    allowed = {4: 2, 5: 9}
    items = images(4, 5, 4, 4, 5, 4, 5)
    results = run_batches(recorder(calls), items, batch_size=3, max_batch=lambda image_hw: allowed[image_hw[1]])
    assert [tag for _, tag in results] == list(range(7))
    assert calls == [(2, 3, 4, 4), (2, 3, 4, 4), (3, 3, 5, 5)]
