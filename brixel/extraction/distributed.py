"""Which images and which GPU belong to this process, where `torchrun` started several."""

import hashlib
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProcessShare:
    """One process of a run. The hash of an image's relative path says which process it belongs to."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def from_environment(cls) -> "ProcessShare":
        """RANK and WORLD_SIZE as `torchrun` sets them; one process where they are not set."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def contains(self, relative_path: str) -> bool:
        """Whether an image belongs to this process."""
        digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.processes == self.rank


def own_device(device: str) -> str:
    """The device as given; for "auto" with several processes on one machine, the GPU of this process."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"
