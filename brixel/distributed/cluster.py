"""The cluster: connecting to it, how many actors it has room for, and errors that come from its machines."""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from brixel.distributed.sources import (
    READ_CPUS,
    import_ray,
)
from brixel.errors import BrixelError

T = TypeVar("T")
_CONNECT_S = 20.0


def pool_size(ray: Any, actors: int | None, resources: Mapping[str, float], *, is_streamed: bool) -> int:
    """How many actors; as many as the cluster has room for where None."""
    room = (total(ray, "CPU") - (READ_CPUS if is_streamed else 0)) / resources["num_cpus"]
    if resources["num_gpus"]:
        room = min(room, total(ray, "GPU") / resources["num_gpus"])
    if "memory" in resources:
        room = min(room, total(ray, "memory") / resources["memory"])
    if room < (actors or 1):
        asked = ", ".join(f"{name.removeprefix('num_')} {amount:g}" for name, amount in resources.items() if amount)
        raise BrixelError(
            f"the cluster has room for {int(room)} actors of {asked}, and {actors or 1} were asked for: it has "
            f"{total(ray, 'CPU'):g} CPUs and {total(ray, 'GPU'):g} GPUs"
        )
    return int(room) if actors is None else actors


def total(ray: Any, resource: str) -> float:
    """How much of a resource the cluster has, such as "CPU"."""
    return float(ray.cluster_resources().get(resource, 0))


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected: as it is, to the cluster at an address, or to one that ends with the block."""
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    log = logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    begun = not ray.is_initialized()
    try:
        if begun:
            is_local = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
            local = {"include_dashboard": False} if is_local else {}
            if local:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent without being asked for
            try:
                _check_reachable(address)
                ray.init(address=address, logging_level="warning", **local)
            except (OSError, ValueError, RuntimeError) as error:
                raise BrixelError(f"no Ray cluster at {address or 'this machine'} ({error})") from error
        yield ray
    finally:
        context.enable_progress_bars = before[0]
        log.setLevel(before[1])
        if begun and ray.is_initialized():
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise OSError where nothing answers at "HOST:PORT": Ray itself tries for many minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def on_an_actor(ray: Any, resources: Mapping[str, float], function: Callable[[], T]) -> T:
    """Call a function on a machine with these resources.

    An actor that is killed afterwards, and not a task: workers of Ray 2.60 that have imported torch may abort when they
    end by themselves.
    """
    actor = ray.remote(_Caller).options(**resources).remote()
    try:
        return ray.get(actor.call.remote(function))
    finally:
        ray.kill(actor)


class _Caller:
    def call(self, function: Callable[[], T]) -> T:
        return function()


@contextmanager
def own_errors(ray: Any) -> Iterator[None]:
    """Errors of ours that were raised on another machine are raised here as they were."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            for own in (cause, getattr(cause, "cause", None)):
                if isinstance(own, BrixelError) and not isinstance(own, ray.exceptions.RayError):
                    raise BrixelError(str(own)) from error
            cause = cause.__cause__
        raise
