"""Where training starts: the blend of the backbone's maps, fitted to the teacher by least squares.

What a linear map can do takes gradient descent hundreds of steps and this a few seconds. Each cell of the low grid is
asked for the mean of the teacher's cells below it. The answer is drawn a little towards the backbone's last map as it
is (ridge regression), as images are few and their cells alike. From then on the blend stays as it is.

Shapes: B batch, D width, h x w the low grid, M = 4 D + 1 inputs: the channels of four maps and a constant.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from brixel.errors import BrixelError
from brixel.model.adapter import tokens_of
from brixel.model.upsampler import UPSCALE
from brixel.train.distributed import World

RIDGE = 0.01  # weight of the pull, as a share of the inputs' mean square; chosen on held-out crops (docs/log.md)


def is_fresh(blend: nn.Linear) -> bool:
    """Whether a blend still gives the last map as it is."""
    width = blend.out_features
    others, last = blend.weight[:, :-width], blend.weight[:, -width:]
    return not others.any() and not blend.bias.any() and torch.equal(last, torch.eye(width).to(last))


@torch.no_grad()
def fit_blend(
    blend: nn.Linear,
    maps_of: Callable[[Tensor], Sequence[Tensor]],
    passes: Iterable[tuple[Tensor, Tensor]],
    world: World,
) -> None:
    """Set ``blend`` to the ridge regression of the teacher's maps on the backbone's, over all processes' passes.

    ``maps_of``: pixels (B, 3, S, S) -> four maps (B, D, h, w). ``passes``: pixels with teacher maps (B, D, 4h, 4w).
    Maps that are not finite are left to the first step to complain of: the blend then stays as it was.
    """
    start = torch.cat([blend.weight, blend.bias[:, None]], dim=1).double().cpu()  # D M
    inputs, joint = torch.zeros(start.shape[1], start.shape[1]).double(), torch.zeros(start.shape).double().mT
    for pixels, teacher in passes:
        maps = maps_of(pixels)
        _check_shape(teacher, maps[-1])
        known = F.pad(torch.cat([tokens_of(each) for each in maps], dim=-1).flatten(0, 1), (0, 1), value=1.0)
        wanted = tokens_of(F.avg_pool2d(teacher.float(), UPSCALE)).flatten(0, 1)  # B*h*w D
        if known.device.type == "mps":  # knows no float64
            known, wanted = known.cpu(), wanted.cpu()
        known, wanted = known.double(), wanted.double()
        inputs += (known.mT @ known).cpu()  # M M
        joint += (known.mT @ wanted).cpu()  # M D
    inputs, joint = _over_all(inputs, world), _over_all(joint, world)
    if not (inputs.isfinite().all() and joint.isfinite().all()):
        return
    pull = RIDGE * inputs.diagonal().mean()
    solved = torch.linalg.solve(inputs + pull * torch.eye(len(inputs)).double(), joint + pull * start.mT).mT  # D M
    blend.weight.copy_(solved[:, :-1])
    blend.bias.copy_(solved[:, -1])


def _check_shape(teacher: Tensor, low: Tensor) -> None:
    expected = (*low.shape[:2], UPSCALE * low.shape[2], UPSCALE * low.shape[3])
    if teacher.shape != expected:
        raise BrixelError(f"the teacher's maps have shape {tuple(teacher.shape)}; expected {expected}")


def _over_all(sums: Tensor, world: World) -> Tensor:
    """The sum over the processes."""
    if world.size == 1:
        return sums
    sums = sums.to(world.device)
    dist.all_reduce(sums)
    return sums.cpu()
