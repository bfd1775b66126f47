"""`map`, `filter`, `flat_map`: the stages that run user functions."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader.core.checks import callable_name
from aioloader.core.cores import usable_cores
from aioloader.core.limit import Limit
from aioloader.core.memory import IntoMemory
from aioloader.core.policies import Policies
from aioloader.core.rate import Rate
from aioloader.core.written import Written
from aioloader.engine.flat_map_node import FlatMapNode
from aioloader.engine.fuse import FusedOps
from aioloader.engine.ops import InProcesses, OnRay, Op
from aioloader.executors.ray.cluster import check_named
from aioloader.stages.base import Builder, Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared

__all__ = ["ASYNC_CONCURRENCY", "Filter", "FlatMap", "Map"]

ASYNC_CONCURRENCY: Final = 64  # what awaits costs next to nothing; this many requests hide usual latencies


@dataclass(frozen=True)
class Map(Stage):
    """`fn` of each sample, up to `concurrency` side by side.

    Args:
        fn: Sync or async.
        is_async: Whether `fn` is awaited on the loop.
        concurrency: A `Limit` may be shared with others. None: 64 for async functions, the usable cores for sync ones.
        ordered: Results in the order of the input.
        executor: Where `fn` runs; None: threads of ours, or the loop.
        name: Instead of the name of `fn`.
        initializer: Called in each of our threads with its number.
        thread_name: Of our threads.
        record_order: With `ordered=False`: a folder for the order in which results left.
        replay_order: With `ordered=False`: such a folder, whose order is taken.
        ahead: Samples begun and not yet taken by what follows; None: decided by the engine.
        ahead_bytes: The same in bytes of finished ones.
        grows: More than `ahead` while a slow one at the front holds finished ones up.
        max_overtaken: With `ordered=False`: results that may overtake a slower sample.
        policies: What is done about calls that fail, take long, or are too many.
        written: Where its arguments are written, where that is no `map` of a pipeline; None: nowhere.
    """

    fn: Callable[[Any], Any]
    is_async: bool
    concurrency: int | Limit | None = None
    ordered: bool = True
    executor: Executor | InProcesses | OnRay | None = None
    name: str | None = None
    initializer: Callable[[int], None] | None = None
    thread_name: str = "aioloader-map"
    record_order: Path | None = None
    replay_order: Path | None = None
    ahead: int | None = None
    ahead_bytes: int | None = None
    grows: bool = False
    max_overtaken: int | None = None
    policies: Policies | None = None
    written: Written | None = None

    exact_in_any_order = True
    passes = True
    makes_anew = True
    part_by_part = True

    @property
    def limit(self) -> Limit | None:  # type: ignore[override]  # a plain attribute where there is none
        return self.concurrency if isinstance(self.concurrency, Limit) else None

    @property
    def rate(self) -> Rate | None:  # type: ignore[override]  # a plain attribute where there is none
        return None if self.policies is None else self.policies.rate

    @property
    def logs_order(self) -> bool:  # type: ignore[override]  # a plain attribute where it never does
        return self.record_order is not None or self.replay_order is not None

    @property
    def same_each_epoch(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.ordered

    @property
    def label(self) -> str:
        return self.name or f"map({callable_name(self.fn)})"

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]  # a plain attribute where there are none
        return (self.fn,)

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
        unordered = self.name or f"map({callable_name(self.fn)}, ordered=False)"
        return replace(
            before.limited(Shared.SAME_RANK, unordered),
            completion_order=before.completion_order or unordered,
            steps=replace(before.steps, unordered=before.steps.unordered or unordered),
        )

    def build(self, builder: Builder) -> None:
        _check_cluster(self.executor, builder)
        builder.fuse(
            Op(
                self.fn.into(builder.alloc) if isinstance(self.fn, IntoMemory) else self.fn,
                self.label,
                self.is_async,
                self.concurrency or _default_concurrency(self.is_async, self.ahead),
                ordered=self.ordered,
                executor=self.executor,
                initializer=self.initializer,
                thread_name=self.thread_name,
                record_order=self.record_order,
                replay_order=self.replay_order,
                ahead=self.ahead,
                ahead_bytes=self.ahead_bytes,
                grows=self.grows,
                max_overtaken=self.max_overtaken,
                policies=self.policies,
                written=self.written if self.name else Written(f".{self.label[:-1]}", room="ahead"),
            )
        )


def _default_concurrency(is_async: bool, ahead: int | None = None) -> int:
    width = ASYNC_CONCURRENCY if is_async else usable_cores()
    return width if ahead is None else min(width, ahead)


def _check_cluster(executor: Any, builder: Builder) -> None:
    """Where it is a Ray cluster, each epoch begins by a look at whether somebody has named one."""
    if isinstance(executor, OnRay):
        builder.beginnings.append(partial(check_named, executor.workers.address))


@dataclass(frozen=True)
class Filter(Stage):
    """The samples of which `fn` is true; a step of a journey, like `Map`.

    Args:
        fn: Sync or async.
        is_async: Whether `fn` is awaited on the loop.
        name: Instead of the name of `fn`.
        concurrency: None: as many as `Map`; a sync one has those of the functions beside it in the same place.
        executor: See `Map`.
        max_dropped_in_a_row: More samples that it refuses one after the other are an error; None: any number.
    """

    fn: Callable[[Any], Any]
    is_async: bool
    name: str | None = None
    concurrency: int | Limit | None = None
    max_dropped_in_a_row: int | None = None
    executor: Executor | InProcesses | OnRay | None = None

    exact_in_any_order = True
    passes = True
    only_selects = True
    same_each_epoch = True
    part_by_part = True

    @property
    def limit(self) -> Limit | None:  # type: ignore[override]  # a plain attribute where there is none
        return self.concurrency if isinstance(self.concurrency, Limit) else None

    @property
    def label(self) -> str:
        return self.name or f"filter({callable_name(self.fn)})"

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]  # a plain attribute where there are none
        return (self.fn,)

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} keeps as many samples as it turns out to")

    def shape(self) -> dict[str, Any]:
        return {"stage": "filter", "name": callable_name(self.fn)}

    def flow(self, before: Flow) -> Flow:
        limited = before.limited(Shared.SAME_RANK, self.label)
        return replace(limited, by_key=False, steps=replace(before.steps, only_maps=False))

    def build(self, builder: Builder) -> None:
        _check_cluster(self.executor, builder)
        builder.fuse(
            Op(
                self.fn,
                self.label,
                self.is_async,
                self.concurrency or _default_concurrency(self.is_async),
                executor=self.executor,
                predicate=True,
                flexible=self.concurrency is None,
                max_dropped_in_a_row=self.max_dropped_in_a_row,
                written=None if self.name else Written(f".{self.label[:-1]}"),
            )
        )


@dataclass(frozen=True)
class FlatMap(Stage):
    """The items of `fn(sample)`, one sample after the other."""

    fn: Callable[[Any], Any]

    same_each_epoch = True
    part_by_part = True

    @property
    def label(self) -> str:
        return f"flat_map({callable_name(self.fn)})"

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]  # a plain attribute where there are none
        return (self.fn,)

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} gives as many items as its function turns out to")

    def shape(self) -> dict[str, Any]:
        return {"stage": "flat_map", "name": callable_name(self.fn)}

    def flow(self, before: Flow) -> Flow:
        limited = before.counted().limited(Shared.SAME_RANK, self.label).closed()
        return replace(limited, batch_size=None, one_a_step=False)  # a batch gives any number of samples, of any size

    def build(self, builder: Builder) -> None:
        unordered_input = bool(builder.flow.completion_order)
        builder.node = FlatMapNode(builder.close(), self.fn, self.label, unordered_input=unordered_input)
        builder.fused = FusedOps()
