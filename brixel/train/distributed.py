"""Several processes under `torchrun`: who we are, sums over all, batch norm over all. One process needs none of it."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brixel.utils.devices import choose_device

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, its device; a group that waits for as long as it takes."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that `torchrun` describes in the environment; this process alone where it describes none."""
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", local)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        # while the first fills a cache of teacher features the others wait, longer than a step may take
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield World(dist.get_rank(), dist.get_world_size(), chosen, patient)
    except BaseException as error:
        # frames that failed hold DistributedDataParallel; if it goes after its group, torch may wait for itself forever
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group()


def mean_over_all(value: Tensor, world: World) -> Tensor:
    """A number's mean over the processes, without gradient."""
    value = value.detach().clone()
    if world.size > 1:
        dist.all_reduce(value)
    return value / world.size


def wait_for_all(world: World) -> None:
    """Return when every process has come here."""
    if world.size > 1:
        dist.barrier(world.patient)


class _SumOverAll(torch.autograd.Function):
    """The sum over the processes, in both directions."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _sum_over_all(value: Tensor) -> Tensor:
    total: Tensor = _SumOverAll.apply(value)  # type: ignore[no-untyped-call]
    return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for the CPU, which torch's own refuses. Every process must hold as many values."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), normalised by mean and variance over all processes in training."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _sum_over_all(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum_over_all(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronised(module: Module, world: World) -> Module:
    """The module with its batch norms over all processes; as it is where there is one."""
    if world.size == 1:
        return module
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = CpuSyncBatchNorm
    return module
