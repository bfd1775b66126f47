"""The weights of mixes while an epoch runs: who sets them, and from which draw on they hold.

Which source a draw takes depends on the weights at that draw and on nothing that time decides. So a change is kept with
the number of the draw from which it holds. A state has those that decide draws which are made again after it: the one
that holds where it goes on, and later ones, of draws that were made ahead. Those before are kept for `replay` alone.
"""

import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.mixture import STEPS_AT_ONCE, Mixture, Schedule, WeightBlock, check_weights
from aioloader.core.safe_text import safe_repr

__all__ = ["MixControl", "Mixes", "Place", "check_changes", "in_repetitions"]

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

Place = tuple[tuple[int, ...], int]
"""Where in an epoch a draw is: the numbers of the repetitions that it is in, and its own number in these.

Zeros at the end of the former are left out, so that the first draws have the same place with `repeat` and without."""


def in_repetitions(numbers: Iterable[int]) -> tuple[int, ...]:
    """The first part of a `Place`."""
    path = list(numbers)
    while path and path[-1] == 0:
        path.pop()
    return tuple(path)


class MixControl:
    """The weights of one mix in one epoch. Read and moved on by its node, set by others, in any thread.

    Args:
        mixture: What holds until somebody sets weights.
        changes: Places, and the weights from there on; a list that a state holds, in order.

    Attributes:
        lock: Held while draws are made.
        place: Of the next draw; None: nobody draws yet.
        version: Another number after each change.
    """

    def __init__(self, mixture: Mixture, changes: list[Any]) -> None:
        self.lock = threading.RLock()  # a finalizer or a signal handler may set weights, too
        self.place: Place | None = None
        self.version = 0
        self.mixture = mixture
        self._changes = changes
        self._pending: tuple[tuple[float, ...], int | None] | None = None
        self._block: WeightBlock | None = None  # of weights by a function

    def missing(self, place: Place) -> int | None:
        """The block of weights that the user's function is to be asked for before that draw; None: none is."""
        if self.mixture.by_function is None or any(_place(change) <= place for change in self._changes):
            return None
        number = place[1] // STEPS_AT_ONCE
        return None if self._block is not None and self._block.number == number else number

    def found(self, block: WeightBlock) -> None:
        """What the user's function gave."""
        with self.lock:
            self._block = block
            self.version += 1

    def failure(self, place: Place) -> BaseException | None:
        """What the user's function raised for that draw, once nothing is `missing` there; None: it did not."""
        block = self._block
        if block is None or block.error is None or any(_place(change) <= place for change in self._changes):
            return None
        return block.error if place[1] % STEPS_AT_ONCE >= len(block.weights) else None

    def begin(self, place: Place) -> None:
        """The next draw is that of `place`."""
        with self.lock:
            self.place = place
            if self._pending is not None:
                (weights, at), self._pending = self._pending, None
                self.set(weights, None if at is None else max(at, place[1]))

    def set(self, weights: tuple[float, ...], at: int | None) -> int | None:
        """Let them hold from the draw `at` on; None: from the next one that is not made yet.

        Returns:
            Which one that is; None: nobody draws yet, and it is the first one.

        Raises:
            ValueError: That draw has been made.
        """
        with self.lock:
            if self.place is None:
                self._pending = weights, at
                return at
            repetitions, draw = self.place
            if at is None:
                at = draw
            elif at < draw:
                raise ValueError(
                    f"draw {at} has been made already: {draw} have been, ahead of what was handed out; pass at={draw} "
                    f"or more"
                )
            self._put((repetitions, at), weights)
            return at

    def _put(self, place: Place, weights: tuple[float, ...]) -> None:
        changes = self._changes
        while changes and _place(changes[-1]) >= place:  # what was to come later is not what is wanted now
            changes.pop()
        self.version += 1
        changes.append([list(place[0]), place[1], list(weights)])

    def weights(self, place: Place) -> tuple[tuple[float, ...], int | None]:
        """Those of a draw, and the number of the draw, in these repetitions, before which they do not change."""
        found: tuple[float, ...] | None = None
        until: int | None = None
        for change in reversed(self._changes):  # there may be one for each step so far, and few are to come
            its = _place(change)
            if its <= place:
                found = tuple(change[2])
                break
            until = its[1] if its[0] == place[0] else None
        if found is not None:
            return found, until
        weights, ends = self._by_step(place[1])
        return weights, min((end for end in (until, ends) if end is not None), default=None)

    def _by_step(self, step: int) -> tuple[tuple[float, ...], int | None]:
        schedule = self.mixture.schedule
        if isinstance(schedule, Schedule):
            return schedule.at_step(step), schedule.until(step)
        number, at = divmod(step, STEPS_AT_ONCE)
        if self._block is None or self._block.number != number or at >= len(self._block.weights):
            return (1.0,) * len(self.mixture.names), step  # not known, and nothing is drawn before it is
        return self._block.weights[at], step + 1


def _place(change: Any) -> Place:
    return in_repetitions(change[0]), change[1]


class Mixes:
    """The mixes of one epoch, by their addresses.

    Args:
        state: What a state has of all of them: changes by address.
        set_before: Weights that were set since the state was loaded, or the last epoch began, and from which draw on.
    """

    def __init__(
        self, state: dict[str, Any], set_before: Mapping[str, tuple[tuple[float, ...], int | None]] = NOTHING
    ) -> None:
        self._state = state
        self._set_before = dict(set_before)
        self._controls: dict[str, MixControl] = {}
        self._lock = threading.RLock()

    def again(self) -> "Mixes":
        """For nodes that give the same once more."""
        return Mixes(self._state)

    def control(self, address: str, mixture: Mixture) -> MixControl:
        """That of one mix."""
        with self._lock:  # weights may be set while the nodes are built
            if address not in self._controls:
                control = self._controls[address] = MixControl(mixture, self._state.setdefault(address, []))
                if address in self._set_before:
                    control.set(*self._set_before[address])
            return self._controls[address]

    def needed(self) -> dict[str, Any]:
        """The changes that decide draws from here on, once nodes have been resumed: a state without the others."""
        with self._lock:
            places = {address: control.place for address, control in self._controls.items()}
        needed = {}
        for address, changes in self._state.items():
            place = places.get(address)
            before = [number for number, change in enumerate(changes) if place is not None and _place(change) <= place]
            needed[address] = changes[max(before, default=0) :]
        return needed

    def settle(self) -> None:
        """Let what was set hold from the beginning of the epoch on, for mixes that have not been resumed."""
        for control in self._controls.values():
            if control.place is None:
                control.begin(((), 0))


def check_changes(state: Any, mixtures: Mapping[str, Mixture]) -> None:
    """Refuse what a state says of weights that were set, if it does not fit.

    Raises:
        ValueError, TypeError: Why.
    """
    for address, changes in dict(state).items():
        if address not in mixtures:
            raise ValueError(f"it tells of a mix {safe_repr(address)}, which is not there")
        for change in cursor_sequence(changes):
            repetitions, draw, weights = cursor_parts(change, 3)
            for number in cursor_sequence(repetitions):
                as_count(number)
            as_count(draw)
            names = mixtures[address].names
            check_weights(names, dict(zip(names, cursor_parts(weights, len(names)), strict=True)))
