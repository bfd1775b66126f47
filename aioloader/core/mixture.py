"""The weights of several sources that are mixed, as they are described: given once, by a schedule, or by a function."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import iscoroutinefunction
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Final, Literal

from aioloader.core.checks import check_count
from aioloader.core.safe_text import add_note, safe_repr

__all__ = ["STEPS_AT_ONCE", "Mixture", "Schedule", "WeightBlock", "WeightFunction", "check_weights"]

STEPS_AT_ONCE: Final = 256
"""For so many steps the user's function is asked at once: a way into a thread and back costs what many calls do."""


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
        return dict(zip(self.names, self.at_step(step), strict=True))

    def at_step(self, step: int) -> tuple[float, ...]:
        """The same in the order of `names`, for a step that is known to be one."""
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
