"""`set_epoch` for copies: an object that travelled to a worker process hears which epoch the user's own is in."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

__all__ = ["Copies", "Epochs", "Holds", "epochs_of", "with_set_epoch"]

Epochs: TypeAlias = tuple[tuple[int | None, int | None], ...]
"""For each object of `with_set_epoch` what its `epoch` says, and what the loader told it; None: nothing."""


class Holds(ABC):
    """A function of ours that works with objects of the user's."""

    @property
    @abstractmethod
    def held(self) -> tuple[Any, ...]:
        """They, and functions of theirs."""


def with_set_epoch(functions: Iterable[Any]) -> list[Any]:
    """The objects behind `functions` that have a `set_epoch`: the functions themselves, and what they are methods of.

    A copy of `functions` gives the copies, in the same order.
    """
    found: list[Any] = []
    for function in functions:
        if isinstance(function, Holds):
            found += with_set_epoch(function.held)
        elif isinstance(function, partial):
            found += with_set_epoch((function.func, *function.args))
        elif callable(getattr(function, "set_epoch", None)):
            found.append(function)
        elif (owner := getattr(function, "__self__", None)) is not None and callable(getattr(owner, "set_epoch", None)):
            found.append(owner)
    return found


def epochs_of(originals: Sequence[Any], dataset: Any = None, told: int | None = None) -> Epochs:
    """The epochs that the user's objects are in.

    Args:
        originals: Those of `with_set_epoch`.
        dataset: The one that `DataLoader.set_epoch` reaches.
        told: What it was called with.
    """
    says = (getattr(original, "epoch", None) for original in originals)
    return tuple(
        (epoch if type(epoch) is int else None, told if original is dataset else None)
        for original, epoch in zip(originals, says, strict=True)
    )


class Copies:
    """Copies in a worker.

    They are told an epoch only when that of the original has changed: one that counts its epochs itself goes on so.

    Args:
        functions: See `with_set_epoch`.
        epochs: Those of the originals when the copies were made.
    """

    def __init__(self, functions: Iterable[Any], epochs: Epochs) -> None:
        self._copies = with_set_epoch(functions)
        self._epochs = epochs

    def tell(self, epochs: Epochs) -> None:
        """The originals are in `epochs`.

        Raises:
            Exception: What a `set_epoch` raises.
        """
        if epochs != self._epochs:
            for copy, (says, told), (says_of, was_told) in zip(self._copies, epochs, self._epochs, strict=True):
                if says is not None and says != says_of:
                    copy.set_epoch(says)
                elif told is not None and told != was_told:
                    copy.set_epoch(told)
            self._epochs = epochs
