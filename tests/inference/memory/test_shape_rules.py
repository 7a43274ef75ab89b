"""Rules for tensors without data, against what PyTorch's kernels give."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from brixel.inference.memory.prediction import Job, predict_peak
from brixel.inference.memory.shape_rules import META, AttentionWithoutData, run_on_meta
from brixel.inference.memory.strategies import RowChunks, Tiles, Whole

WIDE = torch.zeros(2, 6, 8, 10).contiguous(memory_format=torch.channels_last)
CALLS = {
    "broadcast": (lambda a, b: a + b, (torch.zeros(3, 1, 5), torch.zeros(4, 1))),
    "numbers of one element keep their axes": (lambda a, b: a * b, (torch.zeros(4), torch.zeros(1, 1))),
    "promotion": (lambda a, b: a - b, (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4))),
    "whole numbers and a fraction": (lambda a: a * 0.5, (torch.zeros(4, dtype=torch.int64),)),
    "layer norm": (lambda a, w: F.layer_norm(a, (8,), w, w), (torch.zeros(2, 5, 8), torch.zeros(8))),
    "linear": (lambda a, w, b: F.linear(a, w, b), (torch.zeros(2, 5, 8), torch.zeros(3, 8), torch.zeros(3))),
    "bmm": (torch.bmm, (torch.zeros(2, 5, 8), torch.zeros(2, 8, 3))),
    "baddbmm": (torch.baddbmm, (torch.zeros(2, 1, 3), torch.zeros(2, 5, 8), torch.zeros(2, 8, 3))),
    "convolution": (lambda a, w: F.conv2d(a, w, stride=2, padding=1), (WIDE, torch.zeros(4, 6, 3, 3))),
    "grouped convolution": (lambda a, w: F.conv2d(a, w, padding=2, groups=6), (WIDE, torch.zeros(6, 1, 5, 5))),
    "padding of one number": (
        lambda a, w: F.conv2d(a, w, padding="valid"),
        (torch.zeros(1, 3, 9, 9), torch.zeros(4, 3, 3, 3)),
    ),
    "dilated convolution": (
        lambda a, w: F.conv2d(a, w, dilation=2),
        (torch.zeros(1, 3, 9, 9), torch.zeros(4, 3, 3, 3)),
    ),
    "transposed convolution": (
        lambda a, w: F.conv_transpose2d(a, w, stride=2),
        (torch.zeros(1, 3, 8, 8), torch.zeros(3, 5, 2, 2)),
    ),
    "convolution along a line": (lambda a, w: F.conv1d(a, w, stride=2), (torch.zeros(1, 3, 9), torch.zeros(4, 3, 3))),
    "plain max pool": (lambda a: F.max_pool2d(a, 2), (torch.zeros(1, 3, 9, 8),)),
    "max pool rounded up": (lambda a: F.max_pool2d(a, 2, ceil_mode=True), (torch.zeros(1, 3, 9, 8),)),
    "max pool of two sides": (lambda a: F.max_pool2d(a, (2, 3), (1, 2)), (torch.zeros(1, 3, 9, 8),)),
    "whole numbers divided": (lambda a: a / 2, (torch.zeros(4, dtype=torch.int64),)),
    "root of whole numbers": (lambda a: a.sqrt(), (torch.zeros(4, dtype=torch.int32),)),
    "sum of truths": (lambda a: a.sum(-1), (torch.zeros(2, 4, dtype=torch.bool),)),
    "cat of two dtypes": (lambda a, b: torch.cat([a, b]), (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3))),
    "cat with an empty one": (lambda a, b: torch.cat([a, b]), (torch.zeros(0), torch.zeros(2, 3))),
    "max pool": (lambda a: F.max_pool2d(a, 3, 2, padding=1), (WIDE,)),
    "bilinear": (lambda a: F.interpolate(a, (9, 7), mode="bilinear"), (WIDE,)),
    "bicubic": (lambda a: F.interpolate(a, (9, 7), mode="bicubic"), (torch.zeros(1, 3, 4, 4),)),
    "pad": (lambda a: F.pad(a, (1, 2, 3, 4)), (WIDE,)),
    "replicate": (lambda a: F.pad(a, (1, 1, 1, 0), mode="replicate"), (WIDE,)),
    "cat": (lambda a, b: torch.cat([a, b], 1), (torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))),
    "stack": (lambda a: torch.stack([a, a], -1), (torch.zeros(2, 3),)),
    "softmax of a transposed": (lambda a: a.mT.softmax(-1), (torch.zeros(2, 3, 4),)),
    "mean": (lambda a: a.mean((2, 3), keepdim=True), (WIDE,)),
    "sum": (lambda a: a.sum(-1), (WIDE,)),
    "index": (lambda a, i: a[:, i], (torch.zeros(2, 9, 3), torch.zeros(4, dtype=torch.int64))),
    "two indices": (lambda a, i: a[i, i], (torch.zeros(5, 9, 3), torch.zeros(4, dtype=torch.int64))),
    "index select": (lambda a, i: a.index_select(1, i), (torch.zeros(2, 9, 3), torch.zeros(4, dtype=torch.int64))),
    "repeat": (lambda a: a.repeat(2, 3, 1), (torch.zeros(3, 4),)),
    "roll": (lambda a: a.roll(1, 0), (torch.zeros(3, 4),)),
    "bags": (
        lambda i, t, w: F.embedding_bag(i, t, per_sample_weights=w, mode="sum"),
        (torch.zeros(5, 4, dtype=torch.int32), torch.zeros(9, 3), torch.zeros(5, 4)),
    ),
    "attention": (F.scaled_dot_product_attention, (torch.zeros(1, 2, 5, 8),) * 3),
    "triangle": (lambda a: torch.triu_indices(a.shape[0], 5, 1, device=a.device), (torch.zeros(4, 4),)),
    "range": (lambda a: torch.arange(3, 10, 2, device=a.device) + a[0, 0], (torch.zeros(4, 4),)),
}


class ByRule(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_on_meta(func, args, kwargs or {})


@pytest.mark.parametrize("name", CALLS)
def test_a_rule_gives_what_the_kernel_gives(name):
    call, tensors = CALLS[name]
    expected = call(*tensors)
    with AttentionWithoutData(), ByRule():
        made = call(*(tensor.to(META) for tensor in tensors))
    assert (made.shape, made.dtype, made.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("strategy", [Whole(), RowChunks(2), Tiles(8)])
def test_a_prediction_takes_few_operations(tiny, strategy, monkeypatch):
    """Planning answers within half a second: what repeats is counted once."""
    from brixel.inference.memory import prediction

    counted, genuine = [], prediction.run_on_meta
    monkeypatch.setattr(prediction, "run_on_meta", lambda func, *rest: counted.append(func) or genuine(func, *rest))
    predict_peak(tiny, strategy, Job(1, (49 * 16, 50 * 16)))
    is_new = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"  # earlier ones take more operations
    assert 100 < len(counted) < (6000 if is_new else 7000)


@pytest.mark.slow
def test_planning_does_not_import_pytorch_s_compiler():
    """It takes a second, more than planning itself."""
    program = (
        "import sys; from brixel import BrixelFeatures; model = BrixelFeatures.from_pretrained(device='cpu')\n"
        "for limit in ('1GiB', '400MiB'): model.plan((1024, 768), short_side_px='native', memory_limit=limit)\n"
        "sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
