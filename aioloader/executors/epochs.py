"""`set_epoch` for copies: objects that were sent to a worker process follow the epoch of their originals."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

__all__ = ["Copies", "Epochs", "Holds", "epochs_of", "with_set_epoch"]

Epochs: TypeAlias = tuple[tuple[int | None, int | None], ...]
"""For each object of `with_set_epoch`: its attribute `epoch`, and the epoch that the loader set; None: unknown."""


class Holds(ABC):
    """A function of aioloader that calls user objects."""

    @property
    @abstractmethod
    def held(self) -> tuple[Any, ...]:
        """These objects, and their methods that it calls."""


def with_set_epoch(functions: Iterable[Any]) -> list[Any]:
    """The objects with a `set_epoch` among `functions`, and among the objects that they are methods of.

    For a copy of `functions` these are the copies, in the same order.
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
    """The epochs that the user's objects are in; `told` is what `DataLoader.set_epoch` has set for `dataset`."""
    found = (getattr(original, "epoch", None) for original in originals)
    return tuple(
        (epoch if type(epoch) is int else None, told if original is dataset else None)
        for original, epoch in zip(originals, found, strict=True)
    )


class Copies:
    """The copies in a worker, made when the originals were in `epochs`.

    Their `set_epoch` is called only when the epoch of the original has changed: copies that count epochs themselves are
    left alone.
    """

    def __init__(self, functions: Iterable[Any], epochs: Epochs) -> None:
        self._copies = with_set_epoch(functions)
        self._epochs = epochs

    def tell(self, epochs: Epochs) -> None:
        """Call `set_epoch` where the epoch of the original has changed.

        Raises:
            Exception: What a `set_epoch` raises.
        """
        if epochs != self._epochs:
            for copy, (epoch, told), (old_epoch, old_told) in zip(self._copies, epochs, self._epochs, strict=True):
                if epoch is not None and epoch != old_epoch:
                    copy.set_epoch(epoch)
                elif told is not None and told != old_told:
                    copy.set_epoch(told)
            self._epochs = epochs
