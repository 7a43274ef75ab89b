"""Which images belong to this process, where `torchrun` started several."""

import hashlib
from dataclasses import dataclass

from brixel.utils.processes import launched_process


@dataclass(frozen=True)
class ProcessShare:
    """One process of a run. The hash of an image's relative path says which process it belongs to."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def from_environment(cls) -> "ProcessShare":
        """This process as `torchrun` started it; the only one otherwise. Raises BrixelError as `launched_process`."""
        process = launched_process()
        return cls(process.rank, process.processes)

    def contains(self, relative_path: str) -> bool:
        """Whether an image belongs to this process."""
        digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.processes == self.rank
