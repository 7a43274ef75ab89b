"""Where training starts: the blend of the backbone's maps, fitted by least squares, and the scale of the teacher.

A linear map takes gradient descent hundreds of steps and least squares a few seconds. The target of a cell of the
student's grid is the mean of the 4 x 4 teacher cells inside it. Ridge regression pulls the solution towards the
backbone's last map, as images are few and their cells alike. After the fit the blend is frozen.

Shapes: B batch, D width, h x w the student's grid, N = B*h*w cells, M = 4 D + 1 inputs: four maps and a constant.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.model.upsampler import UPSCALE, SecondUpsampler
from brixel.train.config import TrainConfig
from brixel.train.distributed import DistributedContext, all_reduce_sum

SCALE_CROPS = 64
"""Crops from which the teacher's mean and deviation are measured at least."""
LEAST_DEVIATION = 0.05  # of a channel, relative to the mean over channels: a constant one must not divide by zero
RIDGE = 0.01  # weight of the pull, relative to the inputs' mean square; chosen on held-out crops (docs/log.md)


def is_fresh(blend: nn.Linear) -> bool:
    """Whether a blend is as initialised: its output is the last map."""
    width = blend.out_features
    others, last = blend.weight[:, :-width], blend.weight[:, -width:]
    return not others.any() and not blend.bias.any() and torch.equal(last, torch.eye(width).to(last))


def micro_batches_to_fit(config: TrainConfig, world_size: int) -> int:
    """Number of micro-batches that the fit reads: enough for ``config.fit`` crops, or to measure the teacher's scale.

    Not more than the run has. All sizes have a part in them.
    """
    wanted = max(config.fit, SCALE_CROPS if config.generation == 2 else 0)
    crops = min(wanted, config.cache or wanted)
    sizes = itertools.accumulate(itertools.cycle(config.batch_sizes))
    count = next(n for n, size in enumerate(sizes, 1) if size * world_size >= crops) if crops else 0
    return min(count, config.steps * config.accumulate)


class BlendFit:
    """Sums of a ridge regression of the teacher's maps on the backbone's, and its solution.

    Args:
        blend: The linear map; until it is fitted, what the regression is pulled towards.
    """

    def __init__(self, blend: nn.Linear) -> None:
        self.blend = blend
        self.start = torch.cat([blend.weight, blend.bias[:, None]], dim=1).detach().double().cpu()  # D M
        inputs = self.start.shape[1]
        self.gram, self.cross = torch.zeros(inputs, inputs).double(), torch.zeros(self.start.shape).double().mT

    @torch.no_grad()
    def add(self, maps: Sequence[Tensor], teacher: Tensor) -> None:
        """Add four maps (B, D, h, w) and the teacher's (B, D, 4h, 4w)."""
        expected = (*maps[-1].shape[:2], *(UPSCALE * cells for cells in maps[-1].shape[2:]))
        if teacher.shape != expected:
            raise BrixelError(f"the teacher's maps have shape {tuple(teacher.shape)}; expected {expected}")
        inputs = F.pad(rearrange(torch.cat(list(maps), dim=1), "b d h w -> (b h w) d"), (0, 1), value=1.0)  # N M
        targets = rearrange(F.avg_pool2d(teacher.float(), UPSCALE), "b d h w -> (b h w) d")  # N D
        if inputs.device.type == "mps":  # has no float64
            inputs, targets = inputs.cpu(), targets.cpu()
        inputs, targets = inputs.double(), targets.double()
        self.gram += (inputs.mT @ inputs).cpu()  # M M
        self.cross += (inputs.mT @ targets).cpu()  # M D

    @torch.no_grad()
    def solve(self, context: DistributedContext) -> None:
        """Set the blend to the solution over all processes; left as it is where maps were not finite."""
        gram, cross = all_reduce_sum(self.gram, context), all_reduce_sum(self.cross, context)
        if not (gram.isfinite().all() and cross.isfinite().all()):
            return  # the first training step reports it
        pull = RIDGE * gram.diagonal().mean()
        identity = torch.eye(len(gram)).double()
        solution = torch.linalg.solve(gram + pull * identity, cross + pull * self.start.mT).mT  # D M
        self.blend.weight.copy_(solution[:, :-1])
        self.blend.bias.copy_(solution[:, -1])


class TargetScale:
    """Mean and standard deviation of the teacher's features by channel, for an upsampler of the second generation."""

    def __init__(self, upsampler: SecondUpsampler) -> None:
        self.upsampler = upsampler
        self.sums = torch.zeros(3, len(upsampler.feature_mean), dtype=torch.float64)  # of ones, values, squares

    def add(self, teacher: Tensor) -> None:
        """Add the teacher's maps (B, D, 4h, 4w)."""
        cells = rearrange(teacher.detach().double().cpu(), "b d h w -> d (b h w)")
        self.sums += torch.stack(
            [torch.full((len(cells),), float(cells.shape[1])), cells.sum(1), cells.square().sum(1)]
        )

    @torch.no_grad()
    def store(self, context: DistributedContext) -> None:
        """Set the upsampler's buffers, from the sums over all processes; left as they are without finite ones."""
        count, total, squares = all_reduce_sum(self.sums, context)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        if not (mean.isfinite().all() and deviation.isfinite().all() and deviation.any()):
            return  # the first training step reports it
        self.upsampler.feature_mean.copy_(mean)
        self.upsampler.feature_std.copy_(deviation.clamp_min(LEAST_DEVIATION * deviation.mean()))
