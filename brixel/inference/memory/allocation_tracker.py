"""How many bytes of tensors are alive at once: counted while a program runs, on real tensors or on fake ones.

Every storage is counted once, from the operation that made it to the moment that nobody holds it. What an operation
allocates inside itself and frees again is not seen; of ours that is little on the CPU (`docs/memory.md`).
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
    """Counts the live bytes of one kind of device, and their ``peak``, for what runs inside the context.

    Tensors made before belong to the count only after :meth:`track`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._device_type = device_type
        self._storages: dict[int, weakref.ref[Any]] = {}

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these as well, until they are freed."""
        for each in tensors:
            if each.device.type == self._device_type:
                self._add(each.untyped_storage(), each.untyped_storage().nbytes())

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these, nor views of them: they lie in a file, for instance."""
        for each in tensors:
            self._add(each.untyped_storage(), 0)

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
        result = func(*args, **(kwargs or {}))
        self.track(each for each in tree_leaves(result) if isinstance(each, Tensor))
        return result


def weights_and_buffers(module: nn.Module) -> list[Tensor]:
    """All that a module keeps on its device."""
    return [*module.parameters(), *module.buffers()]


def storage_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in weights_and_buffers(module)}
    return sum(each.nbytes() for each in storages.values())


def copy_with(module: Module, change: Callable[[Tensor], Tensor]) -> Module:
    """A copy of a module whose parameters and buffers are what ``change`` makes of them; they are not copied."""
    memo: dict[int, Any] = {}
    for each in weights_and_buffers(module):
        changed = change(each.detach())
        is_parameter = isinstance(each, nn.Parameter)
        memo[id(each)] = nn.Parameter(changed, requires_grad=each.requires_grad) if is_parameter else changed
    return copy.deepcopy(module, memo)
