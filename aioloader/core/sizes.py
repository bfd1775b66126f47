"""About how much memory a sample takes, told without running code of the user."""

from collections.abc import Iterable
from itertools import islice
from sys import getsizeof
from typing import Any, Final

import torch

__all__ = ["MeanBytes", "rough_bytes"]

_ITEMS: Final = 64  # of a container that are looked at; the others are taken to be like them
_DEPTH: Final = 4
_RUNNING: Final = 16  # samples: a change is seen in the mean after about so many


class MeanBytes:
    """The running mean of what samples take in memory.

    Attributes:
        now: Bytes; None: none has been seen.
    """

    now: float | None = None

    def saw(self, sample: object) -> None:
        """One more."""
        size = rough_bytes(sample)
        self.now = size if self.now is None else self.now + (size - self.now) / _RUNNING

    def places(self, nbytes: float) -> int | None:
        """How many samples these bytes are enough for; None: not known."""
        return None if self.now is None else int(nbytes / max(1.0, self.now))


def rough_bytes(sample: object, depth: int = _DEPTH) -> int:
    """Bytes of a sample, roughly: of tensors and arrays what they hold, of containers what is in them.

    Good enough to say how many of them fit into a budget. What is shared is counted each time; of an object of the
    user's class its attributes count.
    """
    if isinstance(sample, torch.Tensor):
        return int(sample.nbytes) if sample.layout is torch.strided else 0
    if isinstance(sample, bytes | bytearray | str | int | float | None):
        return _own(sample)
    if isinstance(sample, memoryview):
        return sample.nbytes
    if type(sample).__module__ == "numpy":
        return int(getattr(sample, "nbytes", 0)) + 100
    if depth == 0:
        return _own(sample)
    if isinstance(sample, list | tuple | set | frozenset):
        return _own(sample) + _of_items(sample, len(sample), depth)
    if isinstance(sample, dict):
        return _own(sample) + _of_items(sample.values(), len(sample), depth)
    attributes = getattr(sample, "__dict__", None)
    inside = _of_items(attributes.values(), len(attributes), depth) if type(attributes) is dict else 0
    return _own(sample) + inside


def _own(sample: object) -> int:
    try:
        return getsizeof(sample, 64)
    except Exception:  # a `__sizeof__` of the user's
        return 64


def _of_items(items: Iterable[Any], count: int, depth: int) -> int:
    if not count:
        return 0
    seen = min(count, _ITEMS)
    total = sum(rough_bytes(item, depth - 1) for item in islice(items, seen))
    return total * count // seen
