"""Seeds that depend on names and numbers alone: the same on every machine and in every process."""

from hashlib import blake2b
from random import Random
from typing import Final

__all__ = ["BLOCK", "derive_seed", "random_of_block"]

BLOCK: Final = 4096
"""So many draws of a long row come from one generator, the next ones from another: then any of them can be found again
without those before it."""


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**63) for one purpose.

    Args:
        seed: The user's seed, any integer.
        path: What it is for, for instance the epoch and a stage's name; other paths give unrelated seeds.
    """
    text = repr((int(seed), *path)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def random_of_block(seed: int, number: int) -> Random:
    """The generator of the draws from `number * BLOCK` on."""
    return Random(derive_seed(seed, "block", number) if number else seed)
