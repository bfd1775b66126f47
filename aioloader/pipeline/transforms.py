"""The stages that make other samples, by functions of the user."""

from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from aioloader.core.checks import check_ahead, check_callable, check_count, check_gives_one, is_async_callable
from aioloader.core.limit import Limit, check_concurrency, width_of
from aioloader.core.policies import Hedge, Retry, check_policies
from aioloader.core.rate import Rate
from aioloader.core.typevars import T_co
from aioloader.pipeline.described import Described
from aioloader.pipeline.executors import AnyExecutor, RayExecutor, check_executor, kind_of
from aioloader.stages.map import FlatMap, Map

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Transforms"]

U = TypeVar("U")


class Transforms(Described[T_co]):
    """`map`, and `flat_map`."""

    @overload
    def map(
        self,
        fn: Callable[[T_co], Coroutine[Any, Any, U]],
        *,
        concurrency: int | Limit | None = None,
        ordered: bool = True,
        executor: RayExecutor | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        max_overtaken: int | None = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        record_order: str | PathLike[str] | None = None,
        replay_order: str | PathLike[str] | None = None,
    ) -> "Pipeline[U]": ...

    @overload
    def map(
        self,
        fn: Callable[[T_co], U],
        *,
        concurrency: int | Limit | None = None,
        ordered: bool = True,
        executor: AnyExecutor | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        max_overtaken: int | None = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        rate: Rate | None = None,
        record_order: str | PathLike[str] | None = None,
        replay_order: str | PathLike[str] | None = None,
    ) -> "Pipeline[U]": ...

    def map(
        self,
        fn: Callable[[Any], Any],
        *,
        concurrency: int | Limit | None = None,
        ordered: bool = True,
        executor: AnyExecutor | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        max_overtaken: int | None = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        record_order: str | PathLike[str] | None = None,
        replay_order: str | PathLike[str] | None = None,
    ) -> "Pipeline[Any]":
        """Call `fn` with each sample, and give what it returns.

        Args:
            fn: Takes a sample and returns one. An async function is awaited on the loop; any other runs in threads.
            concurrency: Samples under way at once, at least 1, or a `Limit` that other stages may share, and that may
                be changed at any time. Default: 64 for async functions, the usable cores for sync ones. Sync samples
                that take well under a millisecond travel in chunks.
            ordered: Give results in the order of the input; False: as they are finished.
            executor: For a sync `fn`: any `concurrent.futures.Executor`, which stays yours to shut down, or `"thread"`,
                which is the default: threads of the loader. `"process"`: `concurrency` processes of the loader, for
                Python code that holds the GIL; they stay until it is closed or collected. There are no more of them
                than a `Limit` had places when they were started. `"ray"`, or `aioloader.ray.RayWorkers(...)`, for sync
                and async functions: actors of a Ray cluster, as many as `concurrency` for a sync one, and one for each
                16 of it for an async one; see `docs/ray.md`.
            ahead: Samples that this stage has begun and the next one has not taken, at most; at least `concurrency`.
                Default: half as many again as `concurrency`; while a slow sample holds up finished ones after it, more
                begin, up to 16 times `concurrency` or 256 MiB of finished ones, but none of a live source.
            ahead_bytes: The same in bytes, by the running mean of what the results took; there is always room for
                `concurrency` samples. With `ahead`, both hold.
            max_overtaken: With `ordered=False`: an unfinished sample is overtaken by so many results at most, at least
                0; then those after it wait for it.
            retry: How often a call that fails is made again: the number of attempts, or a `Retry`.
            timeout: Seconds for one attempt. An async call is cancelled, and awaited while it cleans up; a worker
                process, or an actor with a sync call, is killed and replaced. It raises `TimeoutError`, which `retry`
                may retry. Threads cannot be stopped.
            hedge: For async functions: when a second call is made beside one that takes long, see `Hedge`.
            rate: How many calls begin in a second, see `Rate`; each attempt counts.
            record_order: With `ordered=False`: a folder that gets a file per epoch with the order in which the results
                left, four bytes per sample.
            replay_order: With `ordered=False`: a folder that `record_order` has filled; the results leave in that
                order again. No more of them wait than were under way when it was recorded.

        Raises:
            TypeError: `fn` cannot be called with one argument, or is a generator function.
            ValueError: `concurrency` is less than 1, `ahead` less than `concurrency`, or `executor`, `max_overtaken`,
                `retry`, `timeout`, `hedge`, `rate`, `record_order` or `replay_order` do not fit.
        """
        check_callable("fn", fn, arguments=1, example="map(decode)")
        check_gives_one("map", fn, "use flat_map(fn), which gives all of them as samples")
        if concurrency is not None:
            concurrency = check_concurrency(concurrency)
        width = None if concurrency is None else width_of(concurrency)
        ahead, ahead_bytes = check_ahead(ahead, ahead_bytes, width)
        is_async = is_async_callable(fn)
        if max_overtaken is not None:
            max_overtaken = check_count("max_overtaken", max_overtaken, least=0, hint="leave it out for any number")
            if ordered or replay_order is not None:
                raise ValueError(
                    "max_overtaken needs ordered=False, and no replay_order: else no result overtakes another, or as "
                    "many as it was recorded; leave it out"
                )
        if ordered and (record_order is not None or replay_order is not None):
            raise ValueError("record_order and replay_order need ordered=False: with ordered=True the order is known")
        if record_order is not None and replay_order is not None:
            raise ValueError("pass record_order or replay_order, not both: what is replayed is recorded already")
        return self._then(
            Map(
                fn,
                is_async,
                concurrency,
                ordered=bool(ordered),
                executor=check_executor(executor, fn, is_async),
                record_order=None if record_order is None else Path(record_order),
                replay_order=None if replay_order is None else Path(replay_order),
                ahead=ahead,
                ahead_bytes=ahead_bytes,
                max_overtaken=max_overtaken,
                policies=check_policies(retry, timeout, hedge, rate, is_async=is_async, executor=kind_of(executor)),
            )
        )

    @overload
    def flat_map(self, fn: Callable[[T_co], Coroutine[Any, Any, Iterable[U] | AsyncIterable[U]]]) -> "Pipeline[U]": ...

    @overload
    def flat_map(self, fn: Callable[[T_co], Iterable[U] | AsyncIterable[U]]) -> "Pipeline[U]": ...

    def flat_map(self, fn: Callable[[Any], Any]) -> "Pipeline[Any]":
        """Give all items of `fn(sample)`, an iterable or async iterable, one sample after the other.

        A generator function is iterated in a thread, an async generator function on the loop, each by one task.
        """
        check_callable("fn", fn, arguments=1, example="flat_map(lines_of)")
        return self._then(FlatMap(fn))
