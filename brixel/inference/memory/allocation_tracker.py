"""Counts the bytes of tensors that are alive at once while a program runs, on real tensors or on those without data.

Every storage is counted once, from the operation that made it until nothing refers to it. What an operation allocates
inside itself and frees again is not seen; on the CPU that is little (`docs/memory.md`).
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


class AllocationTracker(TorchDispatchMode):
    """Counts the ``live`` bytes on one type of device, and their ``peak``, for what runs inside the context.

    Tensors that were made before are counted only after :meth:`track`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._device_type = device_type
        self._storages: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do not wrap `__torch_dispatch__` for torch.compile, which would import the compiler, for a second."""
        return False

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors as well, until they are freed."""
        for tensor in tensors:
            if tensor.device.type == self._device_type:
                self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, nor views of them: they are mapped files, for instance."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), 0)

    def _add(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        if self._storages.pop(key, None) is not None:
            self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it made."""
        result = self.run(func, args, kwargs or {})
        made = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        self.track(leaf for leaf in made if isinstance(leaf, Tensor))
        return result

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)


def weights_and_buffers(module: nn.Module) -> list[Tensor]:
    """The tensors that a module keeps on its device."""
    return [*module.parameters(), *module.buffers()]


def storage_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in weights_and_buffers(module)}
    return sum(storage.nbytes() for storage in storages.values())


def copy_with(module: Module, change: Callable[[Tensor], Tensor]) -> Module:
    """A copy of a module whose parameters and buffers are replaced by ``change`` of them, without copying them."""
    memo: dict[int, Any] = {}
    for tensor in weights_and_buffers(module):
        changed = change(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(changed, requires_grad=tensor.requires_grad) if is_parameter else changed
    return copy.deepcopy(module, memo)
