"""The weights of several sources that are mixed: given once, by a schedule, or set while the loader runs.

Which source a draw takes depends on the weights at that draw and on nothing that time decides. So a change is kept with
the number of the draw from which it holds. A state has those that decide draws which are made again after it: the one
that holds where it goes on, and later ones, of draws that were made ahead. Those before are kept for `replay` alone.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import iscoroutinefunction
from itertools import pairwise
from math import inf, isfinite
from types import MappingProxyType
from typing import Any, Final, Literal

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.safe_text import add_note, safe_repr

__all__ = [
    "MixControl",
    "Mixes",
    "Mixture",
    "Place",
    "Schedule",
    "WeightBlock",
    "WeightFunction",
    "check_changes",
    "check_weights",
    "in_repetitions",
]

NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

STEPS_AT_ONCE: Final = 256
"""For so many steps the user's function is asked at once: a way into a thread and back costs what many calls do."""

Place = tuple[tuple[int, ...], int]
"""Where in an epoch a draw is: the numbers of the repetitions that it is in, and its own number in these.

Zeros at the end of the former are left out, so that the first draws have the same place with `repeat` and without."""


def in_repetitions(numbers: Iterable[int]) -> tuple[int, ...]:
    """The first part of a `Place`."""
    path = list(numbers)
    while path and path[-1] == 0:
        path.pop()
    return tuple(path)


class Schedule:
    """Weights of the sources of a `Pipeline.mix` that change while it is read.

    Made by `Schedule.steps` or `Schedule.linear`. A step is one draw of a sample, counted from 0 in each epoch.

    ```python
    warm_up = Schedule.linear({0: {"web": 1, "code": 0}, 100_000: {"web": 1, "code": 1}})
    ```
    """

    def __init__(self, how: Literal["steps", "linear"], points: Mapping[int, Mapping[str, float]]) -> None:
        if how not in ("steps", "linear"):
            raise ValueError(f"write Schedule.steps(...) or Schedule.linear(...), got {how!r}")
        points = dict(points)
        if not points:
            raise ValueError("a Schedule takes a dict of steps and weights, got none")
        self._how: Literal["steps", "linear"] = how
        self._at = [check_count("each step of a Schedule", step, least=0) for step in points]
        if self._at[0] != 0:
            raise ValueError(f"a Schedule begins at step 0, got {self._at[0]} first; say what holds before that")
        for before, after in pairwise(self._at):
            if after <= before:
                raise ValueError(f"the steps of a Schedule must increase, got {after} after {before}")
        names = _names(next(iter(points.values())))
        if not names:
            raise ValueError("a Schedule has weights for one source at least, got an empty dict")
        self.names = names
        self._weights = [check_weights(names, weights) for weights in points.values()]

    @staticmethod
    def steps(points: Mapping[int, Mapping[str, float]]) -> "Schedule":
        """From each of these steps on, its weights.

        Raises:
            TypeError, ValueError: They do not begin at 0 or increase, or the weights are none.
        """
        return Schedule("steps", points)

    @staticmethod
    def linear(points: Mapping[int, Mapping[str, float]]) -> "Schedule":
        """At each of these steps its weights, on a straight line between two of them, and the last ones after it.

        Raises:
            TypeError, ValueError: As `steps`.
        """
        return Schedule("linear", points)

    def __call__(self, step: int) -> dict[str, float]:
        """The weights at a step.

        Raises:
            TypeError, ValueError: It is no integer of at least 0.
        """
        check_count("the step of a Schedule", step, least=0)
        return dict(zip(self.names, self._at_step(step), strict=True))

    def _at_step(self, step: int) -> tuple[float, ...]:
        at = bisect_right(self._at, step) - 1
        now = self._weights[at]
        if self._how == "steps" or at + 1 == len(self._at):
            return now
        share = (step - self._at[at]) / (self._at[at + 1] - self._at[at])
        return tuple([a + (b - a) * share for a, b in zip(now, self._weights[at + 1], strict=True)])

    def until(self, step: int) -> int | None:
        """The step before which the weights at `step` do not change; None: they never do."""
        at = bisect_right(self._at, step)
        if at == len(self._at):
            return None
        moves = self._how == "linear" and self._weights[at - 1] != self._weights[at]
        return step + 1 if moves else self._at[at]

    def of(self, names: tuple[str, ...]) -> "Schedule":
        """The same with its names in this order.

        Raises:
            ValueError: They are others.
        """
        check_weights(names, self(0))
        points = {at: {name: self(at)[name] for name in names} for at in self._at}
        return Schedule(self._how, points)

    def _points(self) -> dict[int, dict[str, float]]:
        return {at: self(at) for at in self._at}

    def __repr__(self) -> str:
        return f"Schedule.{self._how}({self._points()!r})"

    def __reduce__(self) -> Any:
        return Schedule, (self._how, self._points())


def _names(weights: object) -> tuple[str, ...]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights by names must be a dict, got {safe_repr(weights)}")
    return tuple(weights)


def check_weights(names: tuple[str, ...], weights: Any) -> tuple[float, ...]:
    """One weight for each of the sources `names`, in their order.

    Raises:
        TypeError, ValueError: They are no weights of these sources.
    """
    given = _names(weights)
    if set(given) != set(names):
        odd = [name for name in given if name not in names] or [name for name in names if name not in given]
        what = "is no source" if odd[0] not in names else "has no weight"
        raise ValueError(
            f"weights must name each source once, but {safe_repr(odd[0])} {what}; the sources are "
            f"{', '.join(map(safe_repr, names))}"
        )
    for name, value in weights.items():
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"weights must be numbers, got {safe_repr(value)} for {name!r}")
        if not (_finite(value) and value >= 0):
            raise ValueError(f"weights must be finite and not negative, got {safe_repr(value)} for {name!r}")
    found = tuple(float(weights[name]) for name in names)
    if not 0.0 < sum(found) < inf:
        raise ValueError(f"the sum of the weights must be finite and more than 0, got {safe_repr(dict(weights))}")
    return found


def _finite(value: Any) -> bool:
    try:
        return isfinite(float(value))
    except OverflowError:
        return False


@dataclass(frozen=True)
class WeightBlock:
    """What a function has said of some steps.

    Attributes:
        number: Of the block.
        weights: From its first step on.
        error: What the function raised at the step after these, or what is wrong with its weights there, if it is.
    """

    number: int
    weights: list[tuple[float, ...]]
    error: BaseException | None = None


@dataclass(frozen=True)
class WeightFunction:
    """The user's function from a step to weights. It is the user's code: it runs in a thread, some steps ahead.

    Attributes:
        names: Of the sources, in order.
        fn: From the number of a draw to the weights there, of nothing else.
    """

    names: tuple[str, ...]
    fn: Callable[[int], Mapping[str, float]]

    def block(self, number: int) -> "WeightBlock":
        """The weights of all steps of a block, or of those before the first one that fails."""
        weights: list[tuple[float, ...]] = []
        try:
            for step in range(number * STEPS_AT_ONCE, (number + 1) * STEPS_AT_ONCE):
                weights.append(self._at_step(step))
        except BaseException as error:  # it is raised where its step is drawn
            return WeightBlock(number, weights, error)
        return WeightBlock(number, weights)

    def _at_step(self, step: int) -> tuple[float, ...]:
        try:
            return check_weights(self.names, self.fn(step))
        except Exception as error:
            add_note(error, f"aioloader: weights of the mix at step {step}, by {safe_repr(self.fn)}")
            raise

    def check(self) -> None:
        """Refuse what gives no weights, as far as its first ones tell.

        Raises:
            TypeError, ValueError: Why.
        """
        if iscoroutinefunction(self.fn):
            raise TypeError(f"weights by a function must be a plain one, got the async function {safe_repr(self.fn)}")
        self._at_step(0)

    def __repr__(self) -> str:
        return "a function"


@dataclass(frozen=True)
class Mixture:
    """The sources of a mix by name, and what their weights are if nobody sets others.

    Attributes:
        names: Of the sources, in order.
        schedule: The weights at each step.
    """

    names: tuple[str, ...]
    schedule: Schedule | WeightFunction

    @classmethod
    def of(cls, names: tuple[str, ...], weights: object) -> "Mixture":
        """Check both.

        Raises:
            TypeError, ValueError: They do not fit.
        """
        if callable(weights) and not isinstance(weights, Schedule):
            by_function = WeightFunction(names, weights)
            by_function.check()
            return cls(names, by_function)
        if not isinstance(weights, Schedule | Mapping):
            raise TypeError(
                f"weights of named sources must be a dict, a Schedule or a function of the step, got "
                f"{safe_repr(weights)}; write for instance {{{', '.join(f'{name!r}: 1' for name in names)}}}"
            )
        schedule = weights if isinstance(weights, Schedule) else Schedule.steps({0: weights})
        return cls(names, schedule.of(names))

    @property
    def by_function(self) -> WeightFunction | None:
        """What is asked for the weights, in a thread; None: a schedule has them."""
        return self.schedule if isinstance(self.schedule, WeightFunction) else None


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
            return schedule._at_step(step), schedule.until(step)
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
