"""Which images are this process's, where `torchrun` started several."""

import hashlib
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """One process of several. An image belongs to a process by the hash of its name, whatever else there is."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_environment(cls) -> "Share":
        """As `torchrun` says by RANK and WORLD_SIZE; the only process where it does not."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def holds(self, image: str) -> bool:
        """Whether an image is this process's."""
        digest = hashlib.sha256(image.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.processes == self.rank


def own_device(device: str) -> str:
    """The device as given; for "auto" with several processes on one machine, the GPU that is this one's."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"
