"""Where training starts: the blend of the backbone's maps, fitted to the teacher by least squares.

A linear map takes gradient descent hundreds of steps and least squares a few seconds. The target of a cell of the
student's grid is the mean of the 4 x 4 teacher cells inside it. Ridge regression pulls the solution towards the
backbone's last map, as images are few and their cells alike. After the fit the blend is frozen.

Shapes: B batch, D width, h x w the student's grid, N = B*h*w cells, M = 4 D + 1 inputs: four maps and a constant.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.model.upsampler import UPSCALE
from brixel.train.config import TrainConfig
from brixel.train.distributed import DistributedContext, all_reduce_sum

RIDGE = 0.01  # weight of the pull, relative to the inputs' mean square; chosen on held-out crops (docs/log.md)


def is_fresh(blend: nn.Linear) -> bool:
    """Whether a blend is as initialised: its output is the last map."""
    width = blend.out_features
    others, last = blend.weight[:, :-width], blend.weight[:, -width:]
    return not others.any() and not blend.bias.any() and torch.equal(last, torch.eye(width).to(last))


def micro_batches_to_fit(config: TrainConfig, world_size: int) -> int:
    """Number of micro-batches to fit the blend to: enough for ``config.fit`` crops, and no more than the run has."""
    crops = min(config.fit, config.cache or config.fit)
    return min(math.ceil(crops / (config.batch_size * world_size)), config.steps * config.accumulate)


@torch.no_grad()
def fit_blend(
    blend: nn.Linear,
    block_maps: Callable[[Tensor], Sequence[Tensor]],
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    context: DistributedContext,
) -> None:
    """Set ``blend`` to the ridge regression of the teacher's maps on the backbone's.

    ``block_maps``: from pixels (B, 3, S, S) to four maps (B, D, h, w). ``micro_batches``: pixels with teacher maps
    (B, D, 4h, 4w); the fit is over those of all processes. Maps that are not finite leave the blend as it is, and the
    first training step reports them.
    """
    start = torch.cat([blend.weight, blend.bias[:, None]], dim=1).double().cpu()  # D M
    gram, cross = torch.zeros(start.shape[1], start.shape[1]).double(), torch.zeros(start.shape).double().mT
    for pixels, teacher in micro_batches:
        maps = block_maps(pixels)
        expected = (*maps[-1].shape[:2], *(UPSCALE * cells for cells in maps[-1].shape[2:]))
        if teacher.shape != expected:
            raise BrixelError(f"the teacher's maps have shape {tuple(teacher.shape)}; expected {expected}")
        inputs = F.pad(rearrange(torch.cat(list(maps), dim=1), "b d h w -> (b h w) d"), (0, 1), value=1.0)  # N M
        targets = rearrange(F.avg_pool2d(teacher.float(), UPSCALE), "b d h w -> (b h w) d")  # N D
        if inputs.device.type == "mps":  # has no float64
            inputs, targets = inputs.cpu(), targets.cpu()
        inputs, targets = inputs.double(), targets.double()
        gram += (inputs.mT @ inputs).cpu()  # M M
        cross += (inputs.mT @ targets).cpu()  # M D
    gram, cross = all_reduce_sum(gram, context), all_reduce_sum(cross, context)
    if not (gram.isfinite().all() and cross.isfinite().all()):
        return
    pull = RIDGE * gram.diagonal().mean()
    solution = torch.linalg.solve(gram + pull * torch.eye(len(gram)).double(), cross + pull * start.mT).mT  # D M
    blend.weight.copy_(solution[:, :-1])
    blend.bias.copy_(solution[:, -1])
