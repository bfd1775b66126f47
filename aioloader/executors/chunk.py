"""A chunk: several samples that go to a worker together, because one hop costs 30 to 70 µs."""

import os
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from time import perf_counter, thread_time
from types import CoroutineType
from typing import Any, Final, NamedTuple, NoReturn

from aioloader.core.address import Address
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.executors.isolated import isolated
from aioloader.executors.processes.failures import portable

__all__ = ["DROP", "NOTHING", "Call", "ChunkResult", "Failed", "Refusal", "Stop", "apply_chunk", "refuse_coroutine"]


class Stop(NamedTuple):
    """Where a sample has come to an end, in a window in which filters count what they refuse (see `InARow`).

    Attributes:
        row: Identifies the window's `InARow`.
        passed: How many of these filters have let it pass.
        counts: Whether a refusal there is one of the next one.
    """

    row: Address
    passed: int
    counts: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One synchronous user function of a journey.

    Attributes:
        fn: The function, sample to sample, or a predicate.
        predicate: Whether `fn` only decides if the sample is kept.
        label: The stage's name in notes and statistics.
        seed: The seed of `sample_rng` in this epoch; None: the stage has no random numbers.
        stop: What is said of samples that end here; None: nobody asks.
    """

    fn: Callable[[Any], Any]
    predicate: bool
    label: str
    seed: int | None = None
    stop: Stop | None = None


@dataclass(slots=True)
class Refusal:
    """The outcome of a sample that a predicate dropped.

    Attributes:
        nothing: The sample was None, which functions return when they cannot make it; a later try may succeed.
        stop: Of the predicate.
    """

    nothing: bool
    stop: Stop | None = None


DROP: Final = Refusal(nothing=False)
NOTHING: Final = Refusal(nothing=True)


class Failed:
    """The outcome of a sample for which a function raised.

    Attributes:
        error: What.
        label: The name of its stage.
        stop: See `Call`.
        seconds: How long the sample had taken; None: not known.
    """

    __slots__ = ("error", "label", "seconds", "stop")

    def __init__(
        self, error: BaseException, label: str, stop: Stop | None = None, seconds: float | None = None
    ) -> None:
        self.error = error
        self.label = label
        self.stop = stop
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return Failed, (portable(self.error, f"process {os.getpid()}"), self.label, self.stop, self.seconds)


@dataclass(slots=True)
class ChunkResult:
    """The result of a chunk.

    Attributes:
        outcomes: One per sample that was tried, in order: its new value, a `Refusal` or a `Failed`. There are fewer
            than samples when the time was up; the rest was not touched.
        busy_seconds: Wall time in user functions.
        cpu_seconds: CPU time of the worker's thread. Much less than `busy_seconds` means that it waited for I/O or for
            the GIL.
    """

    outcomes: list[Any]
    busy_seconds: float
    cpu_seconds: float


def refuse_coroutine(coroutine: Coroutine[Any, Any, Any], label: str) -> NoReturn:
    """Raise for a function that was taken for a sync one and returned a coroutine.

    Raises:
        TypeError: Always.
    """
    coroutine.close()
    raise TypeError(f"the function of {label} returned a coroutine; define it with `async def`, so that it is awaited")


def apply_chunk(
    calls: Sequence[Call],
    values: Iterable[Any],
    budget_seconds: float,
    outcomes: list[Any] | None = None,
    sample: SampleContext | None = None,
) -> ChunkResult:
    """Apply all `calls` to each of `values`, until about `budget_seconds` have passed; at least one value is tried.

    The limit is for samples that used to be cheap and turn slow: the rest of the chunk goes back, and other workers
    share it.

    Context variables that a sample's functions set are not visible to the next sample, see `isolated`.

    Args:
        calls: The functions of one journey.
        values: The samples; each is taken from the iterable only when it is begun.
        budget_seconds: When to stop.
        outcomes: The outcomes are appended to this list, so that other threads see them at once.
        sample: The context for `sample_rng`, in which the iterable of `values` names the current sample.
    """
    outcomes = [] if outcomes is None else outcomes
    token = current_sample.set(sample)
    sample = SampleContext() if sample is None else sample  # unused
    cpu_began = thread_time()
    began = perf_counter()
    values = iter(values)
    isolated(_try_some, calls, values, began + budget_seconds, outcomes, sample)
    busy_seconds = perf_counter() - began
    current_sample.reset(token)
    result = ChunkResult(outcomes, busy_seconds, thread_time() - cpu_began)
    # The traceback of a failed sample keeps this frame alive, and frames that refer to `sample`. These must not keep
    # the other samples of the chunk, nor the entry that has this very error.
    sample.name = None
    try:
        return result
    finally:
        del values, outcomes, result


def _try_some(
    context: Context,
    clean: Context,
    calls: Sequence[Call],
    values: Iterator[Any],
    deadline: float,
    outcomes: list[Any],
    sample: SampleContext,
) -> bool:
    """Go on until the values or the time run out, or until a function has set a context variable (returns True)."""
    value: Any = None
    result: Any = None
    more = False
    now = perf_counter()
    for value in values:
        for call in calls:
            sample.seed = call.seed
            try:
                result = call.fn(value)
                if type(result) is CoroutineType:
                    result = refuse_coroutine(result, call.label)
                if not call.predicate:
                    value = result
                elif not result:  # here: a tensor of several elements is neither true nor false, and raises
                    if call.stop is None:
                        value = DROP if value is not None else NOTHING
                    else:
                        value = Refusal(value is None, call.stop)
                    break
            except BaseException as error:  # KeyboardInterrupt and SystemExit too: they are raised in the consumer
                value = Failed(error, call.label, call.stop, perf_counter() - now)
                break
        outcomes.append(value)
        now = perf_counter()
        if now > deadline:
            break
        try:
            more = context != clean
        except Exception:
            more = True
        if more:
            break
    try:
        return more
    finally:  # as in `apply_chunk`
        del values, value, outcomes, result
