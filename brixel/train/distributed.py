"""Several processes under `torchrun`: rank and world size, reductions, synchronised batch norm.

In a run of one process, every function here returns at once and no process group is made.
"""

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

from brixel.errors import BrixelError
from brixel.utils.devices import choose_device
from brixel.utils.processes import launched_process, own_device

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class DistributedContext:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    barrier_group: dist.ProcessGroup | None = None  # its barriers wait for days rather than minutes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes files and prints."""
        return self.rank == 0


@contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """Initialise the process group that `torchrun` describes in the environment, if any, and destroy it at the end."""
    world_size, chosen = launched_process().processes, choose_device(own_device(device))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", 0)
    if world_size == 1:
        yield DistributedContext(0, 1, chosen)
        return
    if chosen.type == "cuda":
        _check_gpus()
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        # while rank 0 fills a cache of teacher maps, the others wait for longer than the default timeout
        barrier_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield DistributedContext(dist.get_rank(), dist.get_world_size(), chosen, barrier_group)
    except BaseException as error:
        # the traceback's frames hold DistributedDataParallel: if it outlives its process group, torch can deadlock
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group()


def _check_gpus() -> None:
    """Raise BrixelError where this machine has fewer GPUs than processes: NCCL takes one process for each."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
    if here > gpus:
        raise BrixelError(f"{here} processes train on a machine with {gpus} GPUs; start torchrun with {gpus} at most")


def all_reduce_sum(value: Tensor, context: DistributedContext) -> Tensor:
    """The sum of a tensor over the processes, without gradient, on the tensor's device."""
    if context.world_size == 1:
        return value
    total = value.detach().to(context.device, copy=True)
    dist.all_reduce(total)
    return total.to(value.device)


def all_reduce_mean(value: Tensor, context: DistributedContext) -> Tensor:
    """The mean of a tensor over the processes, without gradient."""
    return all_reduce_sum(value.detach(), context) / context.world_size


def barrier(context: DistributedContext) -> None:
    """Wait until every process has called this."""
    if context.world_size > 1:
        dist.barrier(context.barrier_group)


class _AllReduceSum(torch.autograd.Function):
    """The sum over the processes, of the value in the forward pass and of its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _differentiable_sum(gradient)


def _differentiable_sum(value: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(value)  # type: ignore[no-untyped-call]
    return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm`, which needs CUDA, for the CPU. Every process must hold as many values."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) by mean and variance over all processes in training."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _differentiable_sum(x.sum((0, 2, 3))) / count  # C
        centred = x - mean[:, None, None]
        variance = _differentiable_sum(centred.square().sum((0, 2, 3))) / count  # C
        with torch.no_grad():
            assert self.momentum is not None
            running_mean, running_var, batches = self.buffers()
            batches += 1
            running_mean.lerp_(mean, self.momentum)
            running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]


def sync_batch_norm(module: Module, context: DistributedContext) -> Module:
    """The module with batch norms over all processes; unchanged for one process."""
    if context.world_size == 1:
        return module
    if context.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = CpuSyncBatchNorm
    return module
