"""Seeds of random choices that depend on nothing but their purpose, the seed of a run and a number."""

import hashlib


def derived_seed(purpose: str, seed: int, number: int, *, size_bytes: int) -> int:
    """A seed of ``size_bytes``, independent of those of other purposes and of neighbouring seeds and numbers."""
    digest = hashlib.blake2b(f"{purpose} {seed} {number}".encode(), digest_size=size_bytes).digest()
    return int.from_bytes(digest, "little")
