"""Seeds that depend on names and numbers alone: the same on every machine and in every process."""

from hashlib import blake2b

__all__ = ["derive_seed"]


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**63) for one purpose.

    Args:
        seed: The user's seed, any integer.
        path: What it is for, for instance the epoch and a stage's name; other paths give unrelated seeds.
    """
    text = repr((int(seed), *path)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1
