"""The stages that leave samples out."""

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, overload

from typing_extensions import TypeIs

from aioloader.core.checks import check_callable, check_count, check_gives_one, is_async_callable
from aioloader.core.limit import Limit, check_concurrency
from aioloader.core.skip import Skip
from aioloader.core.typevars import T_co
from aioloader.pipeline.described import Described
from aioloader.pipeline.executors import AnyExecutor, check_executor
from aioloader.plan.requeue import check_requeue
from aioloader.sources.resolve import describe
from aioloader.stages.drop_if import DropIf
from aioloader.stages.map import Filter
from aioloader.stages.skip_errors import SkipErrors

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Choice"]

U = TypeVar("U")


class Choice(Described[T_co]):
    """By a function of the user's, or since they have failed."""

    @overload
    def filter(
        self,
        fn: Callable[[T_co], TypeGuard[U]],
        *,
        concurrency: int | Limit | None = None,
        max_dropped_in_a_row: int | None = None,
        executor: AnyExecutor | None = None,
    ) -> "Pipeline[U]": ...

    @overload
    def filter(
        self,
        fn: Callable[[T_co], TypeIs[U]],
        *,
        concurrency: int | Limit | None = None,
        max_dropped_in_a_row: int | None = None,
        executor: AnyExecutor | None = None,
    ) -> "Pipeline[U]": ...

    @overload
    def filter(
        self,
        fn: Callable[[T_co], object],
        *,
        concurrency: int | Limit | None = None,
        max_dropped_in_a_row: int | None = None,
        executor: AnyExecutor | None = None,
    ) -> "Pipeline[T_co]": ...

    def filter(
        self,
        fn: Callable[[Any], Any],
        *,
        concurrency: int | Limit | None = None,
        max_dropped_in_a_row: int | None = None,
        executor: AnyExecutor | None = None,
    ) -> "Pipeline[Any]":
        """Keep the samples for which `fn`, sync or async, returns true.

        Args:
            fn: Takes a sample. An async function is awaited on the loop; any other runs in threads.
            concurrency: Samples that it looks at at once, at least 1, or a `Limit` as for `map`. Default: 64 for async
                functions; a sync one has the threads of the functions beside it, or the usable cores.
            max_dropped_in_a_row: How many samples it may refuse one after the other, at least 1. The next one that it
                refuses fails with `NothingPassesError`: a batch that would have had it raises that, in its turn, and
                the count begins anew. Counted in the order in which samples come out; one that passes, or would have
                passed but for a later stage, begins the count anew, and those that failed before the filter do not
                count. Default: any number, so that an epoch in which nothing passes goes on until its source ends.
            executor: Where it runs, as for `map`.

        Raises:
            TypeError: `fn` cannot be called with one argument, or is a generator function, or a number is none.
            ValueError: `concurrency` or `max_dropped_in_a_row` is less than 1, or `executor` does not fit.
        """
        check_callable("fn", fn, arguments=1, example="filter(keep)")
        check_gives_one("filter", fn, "return True or False, or leave samples out in flat_map(fn)")
        if concurrency is not None:
            concurrency = check_concurrency(concurrency)
        if max_dropped_in_a_row is not None:
            hint = "leave it out for any number"
            max_dropped_in_a_row = check_count("max_dropped_in_a_row", max_dropped_in_a_row, least=1, hint=hint)
        is_async = is_async_callable(fn)
        return self._then(
            Filter(
                fn,
                is_async,
                concurrency=concurrency,
                max_dropped_in_a_row=max_dropped_in_a_row,
                executor=check_executor(executor, fn, is_async),
            )
        )

    def drop_if(self, fn: Callable[[T_co], object], *, requeue: bool = False) -> "Pipeline[T_co]":
        """Leave out the samples for which `fn` is true when their turn comes, however long ago they were made.

        `filter` looks at a sample as soon as it is there; `drop_if` looks when the next stage takes it. Before `batch`
        that is when the sample is put into a batch, and once more just before that batch is collated (which may make
        it shorter). Before `map` and other stages it is when these take the sample, ahead of the batch; what they make
        of it is not looked at. As the last stage it is the moment of the consumer's `next()`. Batches made ahead are
        not looked at again: put another `drop_if` after `batch`, or use `prefetch(0)`.

        ```python
        def stale(sample):
            return policy.version - sample["version"] > 4

        loader = Pipeline(channel).drop_if(stale).batch(64, max_wait=0.5)
        loader.stats()  # the stage's `dropped` says how many
        ```

        Args:
            fn: A quick sync function; it runs in a thread, and right before `batch` twice for most samples.
            requeue: A sample that would be left out is begun again instead, after those under way, from what came into
                the first `map` of those right before. It keeps its number and its place, so it is still to come: a
                resume stays exact, and nothing grows. `BatchInfo.attempts` counts. It is looked at when the next stage
                takes it, and not once more before its batch is collated.

        Raises:
            TypeError: `fn` cannot be called with one argument, or is async.
            ValueError: `requeue` without a `map` right before, which alone could make a sample anew; `filter` may be
                in between.
        """
        check_callable("fn", fn, arguments=1, example="drop_if(stale)")
        if is_async_callable(fn):
            raise TypeError(
                f"drop_if takes a sync function, since it looks at the last moment, got {describe(fn)}, which is "
                f"async; use filter for what must be awaited"
            )
        if requeue:
            check_requeue(self._plan)
        return self._then(DropIf(fn, bool(requeue)))

    def skip_errors(
        self,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
        *,
        max_errors: int | None = None,
        max_share: float | None = None,
        report: str | PathLike[str] | None = None,
    ) -> "Pipeline[T_co]":
        """Leave out the samples that fail in a stage before this one, or in the source, instead of raising.

        They cost nobody else: before `batch`, their neighbours fill the batch. After `batch`, a batch in which
        something fails is left out as a whole. Errors of other types, and what is raised after this stage, stand in
        their places as ever. So does the error of a source that fails for good, or of one of several: a sample is left
        out, a source is not.

        Past a limit, `TooManySkippedError` takes the place of each further error, with that error as its cause; the
        samples between them still come. A resume goes on with the counts, and does not try again what had been left
        out before the last batch; `repeat` counts each round anew. `stats()` has the count as `skipped`.

        ```python
        loader = Pipeline(keys).map(fetch).skip_errors(OSError, max_share=0.01, report="skipped.jsonl").batch(64)
        ```

        Args:
            on: The exception types that are left out.
            max_errors: Errors that are left out in an epoch, at most, 0 or more. None: any number.
            max_share: Errors as a share, 0 to 1, of the last 1,000 samples that came here; looked at from the 20th on.
                None: any share.
            report: A file that gets a line of JSON for each error that is left out; `python -m aioloader skipped FILE`
                sums it up. `docs/failures.md` says what is in a line. Its folder must be there.

        Raises:
            TypeError: `on` is no exception type nor a tuple of them, or another argument is of another type.
            ValueError: A limit is out of its range, or the report cannot be written.
        """
        return self._then(SkipErrors(Skip(on, max_errors, max_share, report)))
