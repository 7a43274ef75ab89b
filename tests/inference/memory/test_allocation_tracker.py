import torch

from brixel.inference.memory.allocation_tracker import AllocationTracker, copy_with, storage_bytes


def test_live_bytes_are_counted_while_they_live():
    held = torch.ones(1000)
    with AllocationTracker("cpu") as tracker:
        tracker.track([held, held[:10]])
        assert tracker.live == 4000
        made = held * 2
        view = made[5:]
        assert tracker.live == 8000
        del made
        assert tracker.live == 8000  # the view holds it
        del view
        assert (tracker.live, tracker.peak) == (4000, 8000)
        out = torch.empty(50)
        tracker.leave_out([torch.empty(0), out])
    del held
    assert tracker.peak == 8000


def test_a_tensor_that_is_left_out_stays_out_when_it_is_written_to():
    out = torch.zeros(100)
    with AllocationTracker("cpu") as tracker:
        tracker.leave_out([out])
        out[:10].fill_(1)
    assert tracker.peak == 0


def test_a_copy_shares_or_changes_weights_and_leaves_the_model_alone(tiny):
    twin = copy_with(tiny, lambda tensor: tensor.double())
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in tiny.parameters()} == {torch.float32}
    assert storage_bytes(twin) > storage_bytes(tiny) > 0
