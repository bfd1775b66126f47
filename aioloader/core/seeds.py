"""Seeds that depend on names and numbers only: the same on every machine and in every process."""

from hashlib import blake2b
from random import Random
from typing import Final

__all__ = ["BLOCK", "derive_seed", "random_of_block"]

BLOCK: Final = 4096
"""The number of draws from one generator. The next ones come from another, so that any draw of a long sequence can be
found without those before it."""


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**63) for one purpose.

    Args:
        seed: The user's seed, any integer.
        path: The purpose, for instance the epoch and a stage's name; different paths give unrelated seeds.
    """
    text = repr((int(seed), *path)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def random_of_block(seed: int, number: int) -> Random:
    """The generator of the `BLOCK` draws from `number * BLOCK` on."""
    return Random(derive_seed(seed, "block", number) if number else seed)
