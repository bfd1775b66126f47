"""`map`, `filter`, `flat_map`: the stages that run user functions."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from aioloader.core.checks import callable_name
from aioloader.core.cores import usable_cores
from aioloader.engine.turns import Turns
from aioloader.executors.epochs import Epochs, epochs_of
from aioloader.stages.base import Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared

__all__ = ["ASYNC_CONCURRENCY", "PROCESSES", "Filter", "FlatMap", "InProcesses", "Map"]

ASYNC_CONCURRENCY: Final = 64  # what awaits costs next to nothing; this many requests hide usual latencies


@dataclass(frozen=True)
class InProcesses:
    """A place where sync functions run: worker processes of the loader.

    Args:
        kept: They stay from one epoch to the next.
        key: Names them among those of the loader that are kept; None: the stages do.
        in_turn: The workers take turns, so that with seeds of their own random numbers are repeatable.
        prepare: Called before the first sample; gives what each worker calls with its number, if anything. That travels
            with the functions.
        turns: The source, when it is the workers that know when there is no more.
        epochs: Gives those that the user's objects with `set_epoch` are in, for their copies there.
    """

    kept: bool = True
    key: str | None = None
    in_turn: bool = False
    prepare: Callable[[], Callable[[int], None] | None] | None = None
    turns: Turns | None = None
    epochs: Callable[[Sequence[Any]], Epochs] = epochs_of


PROCESSES: Final = InProcesses()
"""Neighbouring stages there cross together."""


@dataclass(frozen=True)
class Map(Stage):
    """`fn` of each sample, up to `concurrency` side by side.

    Args:
        fn: Sync or async.
        is_async: Whether `fn` is awaited on the loop.
        concurrency: None: 64 for async functions, the usable cores for sync ones.
        ordered: Results in the order of the input.
        executor: Where a sync `fn` runs; None: threads of ours.
        name: Instead of the name of `fn`.
        initializer: Called in each of our threads with its number.
        thread_name: Of our threads.
        flexible: The concurrency is nobody's wish: beside another sync stage, it takes that one's.
        many: The same as `fn` for a list of samples at once, where that may be cheaper.
        record_order: With `ordered=False`: a folder for the order in which results left.
        replay_order: With `ordered=False`: such a folder, whose order is taken.
        in_place: `fn` runs no code of the user's and takes less time than a hop: it is called on the loop.
    """

    fn: Callable[[Any], Any]
    is_async: bool
    concurrency: int | None = None
    ordered: bool = True
    executor: Executor | InProcesses | None = None
    name: str | None = None
    initializer: Callable[[int], None] | None = None
    thread_name: str = "aioloader-map"
    flexible: bool = False
    many: Callable[[list[Any]], Any] | None = None
    record_order: Path | None = None
    replay_order: Path | None = None
    in_place: bool = False

    exact_in_any_order = True

    @property
    def same_each_epoch(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.ordered

    @property
    def label(self) -> str:
        return self.name or f"map({callable_name(self.fn)})"

    @property
    def width(self) -> int:
        """The concurrency that it runs with."""
        return self.concurrency or (ASYNC_CONCURRENCY if self.is_async else usable_cores())

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> dict[str, Any]:
        return {"stage": "map", "name": self.name or callable_name(self.fn), "ordered": self.ordered}

    def flow(self, before: Flow) -> Flow:
        if self.ordered:
            return before
        if before.steps.input_order:  # who has left the window is known by number
            before = before.at_least("at-least-once")
        if self.replay_order is not None:
            return before
        unordered = f"{self.label[:-1]}, ordered=False)"
        return replace(
            before.limited(Shared.SAME_RANK, unordered),
            completion_order=before.completion_order or unordered,
            steps=replace(before.steps, unordered=before.steps.unordered or unordered),
        )


@dataclass(frozen=True)
class Filter(Stage):
    """The samples of which `fn` is true; a step of a journey, like `Map`."""

    fn: Callable[[Any], Any]
    is_async: bool
    name: str | None = None

    concurrency = None
    ordered = True
    executor = None
    initializer = None
    thread_name = "aioloader-map"
    flexible = True
    exact_in_any_order = True
    same_each_epoch = True

    @property
    def label(self) -> str:
        return self.name or f"filter({callable_name(self.fn)})"

    @property
    def width(self) -> int:
        """The concurrency that it runs with."""
        return ASYNC_CONCURRENCY if self.is_async else usable_cores()

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} keeps as many samples as it turns out to")

    def shape(self) -> dict[str, Any]:
        return {"stage": "filter", "name": callable_name(self.fn)}

    def flow(self, before: Flow) -> Flow:
        limited = before.limited(Shared.SAME_RANK, self.label)
        return replace(limited, by_key=False, steps=replace(before.steps, only_maps=False))


@dataclass(frozen=True)
class FlatMap(Stage):
    """The items of `fn(sample)`, one sample after the other."""

    fn: Callable[[Any], Any]

    same_each_epoch = True

    @property
    def label(self) -> str:
        return f"flat_map({callable_name(self.fn)})"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} gives as many items as its function turns out to")

    def shape(self) -> dict[str, Any]:
        return {"stage": "flat_map", "name": callable_name(self.fn)}

    def flow(self, before: Flow) -> Flow:
        return before.counted().limited(Shared.SAME_RANK, self.label).closed()
