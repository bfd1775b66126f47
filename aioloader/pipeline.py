"""`Pipeline`: the description of how samples become batches."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from torch import Generator, empty, int64

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.core.checks import (
    check_ahead,
    check_callable,
    check_count,
    check_gives_one,
    check_integer,
    check_seconds,
    is_async_callable,
)
from aioloader.core.limit import Limit, check_concurrency, width_of
from aioloader.core.memory import Alloc
from aioloader.core.mixture import Mixes, Mixture, Schedule, check_changes, check_weights
from aioloader.core.policies import Hedge, Retry, check_policies
from aioloader.core.rate import Rate
from aioloader.core.skip import Skip
from aioloader.device import Transfer, check_device
from aioloader.engine.fuse import PROCESSES, InProcesses
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import is_stateful
from aioloader.engine.window import Window
from aioloader.executors.processes.fork_server import check_processes
from aioloader.executors.ray.readers import Readers
from aioloader.loader import Loader
from aioloader.plan.admission import check_admission
from aioloader.plan.build import build
from aioloader.plan.by_file import check_by_file, cost_of_samples, uneven_files
from aioloader.plan.fetching import fetching
from aioloader.plan.for_ray import check_in_ray, check_pool, scaled, with_parts_of, workers_for
from aioloader.plan.mixing import mixture_named, mixtures_of
from aioloader.plan.parts import (
    datasets_of,
    drawing_samplers_of,
    is_indexable,
    keeping_last,
    limits_of,
    rates_of,
    samplers_of,
    streams_of,
    with_streams,
)
from aioloader.plan.plan import (
    Combined,
    Plan,
    Single,
    before_cache,
    flow_of,
    flows_of,
    forgets_numbers,
    length_of,
    with_ranks,
    without_reports,
)
from aioloader.plan.ranks import check_one_order, check_shard_state, is_sharded, is_shared, shard_state
from aioloader.plan.requeue import check_requeue
from aioloader.plan.state import Shape, shape_of
from aioloader.plan.uneven import uneven_stage
from aioloader.plan.unsplit import gives_all, warn_of_cost, warn_of_uneven
from aioloader.sources.fetch import FetchSource
from aioloader.sources.resolve import Indexable, StreamData, describe, is_one_source, resolve, source_name, warn_of_live
from aioloader.sources.sampler_order import detached_copies, draws_globally, draws_of, generators_of
from aioloader.stages.base import Pass, Stage
from aioloader.stages.batch import Batch, CollateWith, Unbatch
from aioloader.stages.batch_by_length import BatchByLength, TooLong
from aioloader.stages.cache import Cache
from aioloader.stages.device import PinMemory, To
from aioloader.stages.drop_if import DropIf
from aioloader.stages.flow import Guarantee
from aioloader.stages.in_process import OwnProcess
from aioloader.stages.in_ray import PARTS_PER_ACTOR, InRay
from aioloader.stages.length import check_length
from aioloader.stages.length_plan import Budget
from aioloader.stages.map import Filter, FlatMap, Map
from aioloader.stages.pack import OverRow, Pack
from aioloader.stages.pack_plan import Strategy
from aioloader.stages.rank import Even
from aioloader.stages.repeat import Repeat
from aioloader.stages.select import Enumerate, SkipFirst, Take
from aioloader.stages.shard import By, Shard
from aioloader.stages.share import Share
from aioloader.stages.shuffle import Shuffle
from aioloader.stages.skip_errors import SkipErrors

__all__ = ["Pipeline"]


class Pipeline(Loader):
    """Samples from a source, through stages, to batches; iterated by `for` or by `async for`.

    A pipeline is an immutable description: each method returns a new one. Each iteration is one epoch.

    ```python
    loader = Pipeline(keys).shuffle(seed=0).map(fetch, concurrency=256).map(decode).batch(64).prefetch(2)
    async for batch in loader: ...
    ```

    Args:
        source: A map-style torch Dataset or any Sequence (with `async def __getitem__` too), an IterableDataset or any
            iterable, an async iterable, another pipeline, or a function of no arguments that returns one of these and
            is called anew for each epoch. A generator is accepted for one epoch. Under `async for`, async sources and
            functions run on the caller's loop; sync ones always run in threads.
        sampler: For an indexable source: gives the keys of an epoch, in order, as a torch sampler does. Its
            `set_epoch`, if it has one, is called with the number of each epoch.
        concurrency: For a source whose samples are loaded by `__getitem__` or `__getitems__`: calls under way at once,
            at least 1, or a `Limit` as for `map`. Default: 64 where they are async; else the threads of the function
            after it, or usable cores.

    Raises:
        TypeError: `source` is none of these, or `sampler` or `concurrency` is for other sources.
        ValueError: `concurrency` is less than 1.
    """

    def __init__(self, source: Any, *, sampler: Any = None, concurrency: int | Limit | None = None) -> None:
        super().__init__()
        self._weights: dict[str, tuple[float, ...]] = {}  # that were set, by the addresses of their mixes
        self._weights_next: dict[str, tuple[tuple[float, ...], int | None]] = {}  # for an epoch that has not begun
        if concurrency is not None:
            concurrency = check_concurrency(concurrency)
        self._plan: Plan
        if isinstance(source, FetchSource):
            self._plan = fetching(source, *_resolve(source.keys, sampler))
            _check_loads(concurrency, None, source)
        elif not isinstance(source, Pipeline):
            data, keys = _resolve(source, sampler)
            _check_loads(concurrency, data, source)
            self._plan = Plan(Single(data, keys, tells_epoch=True, concurrency=concurrency))
        elif sampler is None:
            _check_loads(concurrency, None, source)
            self._plan = source._plan
        else:
            raise TypeError("sampler gives the keys of an indexable source, got a Pipeline; pass sampler to that one")

    @classmethod
    def _of(cls, plan: Plan) -> "Pipeline":
        pipeline = cls.__new__(cls)
        Loader.__init__(pipeline)
        pipeline._weights = {}
        pipeline._weights_next = {}
        pipeline._plan = plan
        return pipeline

    def _gives_all(self) -> bool:
        return gives_all(self._plan)

    def _tell_of_ranks(self, world_size: int) -> None:
        if cost := cost_of_samples(self._plan, lambda shard: not shard.said):
            warn_of_cost(cost)
        if world_size and (why := uneven_files(self._plan) or uneven_stage(self._plan)):
            warn_of_uneven(why)

    def _then(self, stage: Stage) -> "Pipeline":
        """This pipeline and one more stage."""
        if self._plan.gives_info:
            raise ValueError(f"with_info() must be the last stage, got {stage.label} after it")
        if self._plan.stages and self._plan.stages[-1].must_be_last:
            last = self._plan.stages[-1]
            raise ValueError(f"{last.label} must be the last stage, got {stage.label} after it; put it before .to()")
        plan = replace(self._plan, stages=(*self._plan.stages, stage))
        check_admission(plan)
        return self._of(plan)

    # -- stages ------------------------------------------------------------------------------------------------------

    def map(
        self,
        fn: Callable[[Any], Any],
        *,
        concurrency: int | Limit | None = None,
        ordered: bool = True,
        executor: Executor | Literal["thread", "process"] | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        max_overtaken: int | None = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        record_order: str | PathLike[str] | None = None,
        replay_order: str | PathLike[str] | None = None,
    ) -> "Pipeline":
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
                than a `Limit` had places when they were started.
            ahead: Samples that this stage has begun and the next one has not taken, at most; at least `concurrency`.
                Default: half as many again as `concurrency`; while a slow sample holds up finished ones after it, more
                begin, up to 16 times `concurrency` or 256 MiB of finished ones, but none of a live source.
            ahead_bytes: The same in bytes, by the running mean of what the results took; there is always room for
                `concurrency` samples. With `ahead`, both hold.
            max_overtaken: With `ordered=False`: an unfinished sample is overtaken by so many results at most, at least
                0; then those after it wait for it.
            retry: How often a call that fails is made again: the number of attempts, or a `Retry`.
            timeout: Seconds for one attempt. An async call is cancelled, and awaited while it cleans up; a worker
                process is killed and replaced. It raises `TimeoutError`, which `retry` may retry. Threads cannot be
                stopped.
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
                executor=_executor(executor, fn, is_async),
                record_order=None if record_order is None else Path(record_order),
                replay_order=None if replay_order is None else Path(replay_order),
                ahead=ahead,
                ahead_bytes=ahead_bytes,
                max_overtaken=max_overtaken,
                policies=check_policies(retry, timeout, hedge, rate, is_async=is_async, executor=executor),
            )
        )

    def filter(
        self,
        fn: Callable[[Any], Any],
        *,
        concurrency: int | Limit | None = None,
        max_dropped_in_a_row: int | None = None,
    ) -> "Pipeline":
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

        Raises:
            TypeError: `fn` cannot be called with one argument, or is a generator function, or a number is none.
            ValueError: `concurrency` or `max_dropped_in_a_row` is less than 1.
        """
        check_callable("fn", fn, arguments=1, example="filter(keep)")
        check_gives_one("filter", fn, "return True or False, or leave samples out in flat_map(fn)")
        if concurrency is not None:
            concurrency = check_concurrency(concurrency)
        if max_dropped_in_a_row is not None:
            hint = "leave it out for any number"
            max_dropped_in_a_row = check_count("max_dropped_in_a_row", max_dropped_in_a_row, least=1, hint=hint)
        return self._then(
            Filter(
                fn,
                is_async_callable(fn),
                concurrency=concurrency,
                max_dropped_in_a_row=max_dropped_in_a_row,
            )
        )

    def drop_if(self, fn: Callable[[Any], Any], *, requeue: bool = False) -> "Pipeline":
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
    ) -> "Pipeline":
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

    def flat_map(self, fn: Callable[[Any], Any]) -> "Pipeline":
        """Give all items of `fn(sample)`, an iterable or async iterable, one sample after the other.

        A generator function is iterated in a thread, an async generator function on the loop, each by one task.
        """
        check_callable("fn", fn, arguments=1, example="flat_map(lines_of)")
        return self._then(FlatMap(fn))

    def shuffle(self, buffer_size: int | None = None, *, seed: int = 0) -> "Pipeline":
        """Give the samples in another order in each epoch, which depends only on `seed` and the number of the epoch.

        Args:
            buffer_size: None: a full permutation, for an indexable source, with nothing but `map`, `shard`, `take` and
                `skip` in between. Else at least 1: this many samples are held, and each output is drawn from them.
            seed: Any integer.

        Raises:
            ValueError: No `buffer_size`, and what comes before is a stream.
        """
        if buffer_size is not None:
            buffer_size = check_count("buffer_size", buffer_size, least=1)
        elif not flow_of(self._plan).by_key:
            raise ValueError(
                f"shuffle() without buffer_size permutes an indexable source, but {self!r} is a stream; "
                f"pass shuffle(buffer_size=1000), or shuffle right after the source"
            )
        return self._then(Shuffle(buffer_size, check_integer("seed", seed)))

    def batch(
        self,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        max_wait: float | None = None,
    ) -> "Pipeline":
        """Group samples into batches of `batch_size`.

        Args:
            batch_size: At least 1.
            drop_last: Leave out a shorter batch at the end of the source. Batches that `max_wait` cuts short are given.
            collate_fn: From a list of samples to a batch, off the event loop (an async one on it). Default: torch's
                `default_collate`, which says which samples do not fit. `list` or `tuple`: the samples as they are,
                which costs nothing.
            max_wait: Seconds, 0 or more, after which a batch is given as it is, counted from its first sample. For live
                sources. None: a batch waits until it is full. `stats()` counts short batches as `partial`.
        """
        size = check_count("batch_size", batch_size, least=1)
        if collate_fn is not None:
            check_callable("collate_fn", collate_fn, arguments=1, example="batch(64, collate_fn=pad)")
        if max_wait is not None:
            max_wait = check_seconds("max_wait", max_wait)
        return self._then(Batch(size, bool(drop_last), CollateWith(collate_fn), max_wait))

    def batch_by_length(
        self,
        max_tokens: int,
        length: Callable[[Any], int] | str,
        *,
        padded: bool = True,
        max_samples: int | None = None,
        window: int | None = 2048,
        seed: int = 0,
        too_long: TooLong = "alone",
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> "Pipeline":
        """Group samples into batches of at most `max_tokens` tokens, of samples that are about as long.

        `window` samples are sorted by their lengths and cut into batches, which are given in an order that depends on
        `seed`, the number of the epoch and that of the window. So the first batch waits for a whole window; while its
        batches are given, the next window comes in. Where a sample has failed, only that is raised: before the batches
        of its window, or with `window=None` between those before it and those after it.

        Before `shard()` whole batches are dealt, the same number to each rank.

        ```python
        loader = Pipeline(documents).map(tokenize).batch_by_length(16384, len, collate_fn=pad).shard()
        ```

        Args:
            max_tokens: At least 1.
            length: How many tokens a sample has, at least 1: a sync function of it, or the name of the field that is
                as long.
            padded: All samples of a batch are padded to the longest, so that count times longest is what counts. False:
                the sum of the lengths.
            max_samples: Samples in a batch, at least 1. None: any number.
            window: Samples that are sorted together, at least 1. A resume in the middle of a window reads it again.
                None: the order is kept, and a batch is closed before the sample that would pass the budget.
            seed: Any integer.
            too_long: What becomes of a sample that is longer than `max_tokens`: `"alone"` makes a batch of it,
                `"drop"` leaves it out (`stats()` counts it as `dropped`), `"error"` raises in its place.
            collate_fn: As for `batch`. The default stacks, which fails for samples of several lengths: pass one that
                pads.

        Raises:
            TypeError: `length` cannot be called with one argument, or is async, or a number is none.
            ValueError: A number is too small, or `too_long` is something else.
        """
        of = check_length(length, "batch_by_length(16384, len)")
        if collate_fn is not None:
            check_callable("collate_fn", collate_fn, arguments=1, example="batch_by_length(16384, len, collate_fn=pad)")
        budget = Budget(max_tokens, bool(padded), max_samples)
        return self._then(BatchByLength(budget, of, window, seed, too_long, CollateWith(collate_fn)))

    def pack(
        self,
        seq_len: int,
        *,
        length: Callable[[Any], int] | str | None = None,
        strategy: Strategy = "best_fit",
        open_rows: int = 64,
        max_documents: int | None = None,
        too_long: OverRow = "split",
        pad_value: float | Mapping[str, float] = 0,
        pad_to: int = 1,
    ) -> "Pipeline":
        """Pack documents into rows of `seq_len` tokens; gives `Packed`.

        A document is a tensor, array or list of numbers, or a mapping of names to these, all of one length: each field
        is packed alike. What is after the last document of a row is padding. A document that failed, or is none, raises
        in its turn, and the rows are made of the others.

        Before `shard()` whole rows are dealt. `batch(n)` after it stacks rows, see `Packed`.

        ```python
        loader = Pipeline(documents).map(tokenize).pack(4096).shard().batch(8)
        ```

        Args:
            seq_len: Tokens of a row, at least 1.
            length: Is compared with what a document has: a sync function, or the name of a field. None: nothing is.
            strategy: Where a document goes. `"best_fit"`: into the open row that it fills best; `"first_fit"`: into the
                oldest open row that has room; `"split"`: after the one before it, cut where the row ends.
            open_rows: Rows that are filled at a time, at least 1: more of them need less padding. A resume reads again
                what is in them.
            max_documents: Of a row, at least 1. None: any number.
            too_long: A document of more than `seq_len` tokens: `"split"` cuts it, `"drop"` leaves it out (`stats()`
                counts it as `dropped`), `"error"` raises in its place.
            pad_value: What padding is; for documents with fields, also a mapping of their names. `labels` are padded
                with -100 unless it names them.
            pad_to: Each document is padded to a multiple of this, for context parallelism: twice as many as ranks.

        Raises:
            TypeError: `length` cannot be called with one argument, or is async, or a number is none.
            ValueError: A number is too small, `seq_len` is no multiple of `pad_to`, or a word is none of those above.
        """
        of = None if length is None else check_length(length, "pack(4096, length=len)")
        return self._then(Pack(seq_len, of, strategy, open_rows, max_documents, too_long, pad_value, pad_to))

    def cache(
        self, *, memory_bytes: int | None = None, disk: str | PathLike[str] | None = None, version: Any = ""
    ) -> "Pipeline":
        """Keep the samples that come here, so that the next epoch does not make them again.

        For a cached sample none of the stages before this one runs. Samples of an indexable source with nothing but
        `map`, `filter`, `shuffle()`, `shard`, `take` and `skip` in between are known by their keys, and may come in
        another order in each epoch. All others are known by their position, so the stages before the cache must give
        the same samples in each epoch; a source whose samples are all cached is not even opened. Random augmentation
        belongs after the cache. Errors are not kept.

        In memory the cache belongs to this pipeline and those made of it, and lives as long as they do. Nothing is
        evicted: when the budget is used up, the other samples are made anew in each epoch. Functions after the cache
        get copies, and may change them.

        Args:
            memory_bytes: The budget, at least 1.
            disk: A directory, made when it is needed, which other processes may use at the same time. Samples travel by
                pickle: it is to be trusted as code is.
            version: Of what is before a cache on disk, anything that has a `str`. The directory is refused when it
                was made with another one, or by a pipeline of other stages; change it when functions have changed.

        Raises:
            TypeError: Neither `memory_bytes` nor `disk`, or both.
            ValueError: The directory is not this pipeline's, or samples cannot be told apart from epoch to epoch.
        """
        pipeline = before_cache(self._plan)
        if (memory_bytes is None) == (disk is None):
            raise TypeError(
                f"cache() takes either memory_bytes or disk, got {memory_bytes=} and {disk=}; pass for instance "
                f"cache(memory_bytes=4 << 30) or cache(disk='cache')"
            )
        if memory_bytes is not None:
            return self._then(Cache(MemoryStore(check_count("memory_bytes", memory_bytes, least=1)), pipeline))
        assert disk is not None
        store = DiskStore(Path(disk), str(version))
        store.check(pipeline)
        return self._then(Cache(store, pipeline))

    def unbatch(self) -> "Pipeline":
        """Give the samples of each batch, rows of tensors and items of lists: the inverse of the default `batch`."""
        return self._then(Unbatch(flows_of(self._plan)[-1].collated))

    def take(self, n: int) -> "Pipeline":
        """Give the first `n` samples; no more are read."""
        return self._then(Take(check_count("n", n, least=0)))

    def skip(self, n: int) -> "Pipeline":
        """Leave out the first `n` samples."""
        return self._then(SkipFirst(check_count("n", n, least=0)))

    def repeat(self, n: int | None = None) -> "Pipeline":
        """Give everything before this `n` times, or for ever, shuffled anew each time."""
        if n is not None:
            n = check_count("n", n, least=0, hint="leave it out to repeat for ever")
        for stream in streams_of(self._plan):
            if stream.single_use and (n is None or n > 1):
                raise ValueError(
                    f"repeat({'' if n is None else n}) reads its source again, but {describe(stream.make)} can be "
                    f"iterated once; pass the generator function itself (without calling it)"
                )
        return self._then(Repeat(n))

    def enumerate(self) -> "Pipeline":
        """Give pairs `(number, sample)`, counted from 0 in each epoch."""
        return self._then(Enumerate())

    def shard(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        group: Any = None,
        mesh: Any = None,
        even: Even | None = None,
        by: By = "sample",
    ) -> "Pipeline":
        """Give this rank's part: every `world_size`-th sample, or file, the same number of samples on every rank.

        Without arguments, rank and world size are those of torch.distributed when it is initialised, else of the
        environment's RANK and WORLD_SIZE, else there is one rank. They are looked up when iteration begins; nothing
        here ever communicates.

        Args:
            rank: In [0, world_size).
            world_size: How many ranks there are.
            group: A torch.distributed.ProcessGroup instead: the ranks are those in it.
            mesh: A DeviceMesh of one dimension instead, such as `mesh["dp"]`, or a pair `(mesh, "dp")`: the ranks are
                those along it, and all that differ in other dimensions only, as in tensor parallelism, get the same.
            even: When the last round has fewer samples than there are ranks: `"pad"`, the default, fills it from the
                beginning, as torch's DistributedSampler does, `"drop"` leaves it out, `"error"` raises: at the start
                when the length is known, else at the end. By files, these three need a source that has counted its
                samples (ParquetRows): a rank with fewer reads its own files again, or all end after as many as the
                shortest has. Without a count the default is to give what is in the rank's files.
            by: `"file"`: deal the files of `TarShards`, `Lines` or `ParquetRows`, every `world_size`-th in the order of
                the epoch, so that a rank opens its own alone. It comes right after the source, or maps. A state is then
                that of one rank, of as many. `"sample"`: every rank reads all files, and a `ReadAllWarning` says so.

        Raises:
            TypeError, ValueError: The arguments do not fit, or the samples before come in no order that all ranks
                would see alike; or there are no files to deal, or `even` needs a count that nobody has.
        """
        if any(stage.for_several_ranks for stage in self._plan.stages):
            raise ValueError("shard() comes before share(), which gives several ranks the same, got it after that")
        shard = Shard(rank, world_size, group, mesh, "pad" if even is None else even, by)
        if by != "sample":
            shard = check_by_file(self._plan, shard, even)
        if shard.by == "sample":
            check_one_order(self._plan)
        pipeline = self._then(shard)
        if cost := cost_of_samples(pipeline._plan, lambda stage: stage is shard and shard.said):
            warn_of_cost(cost)
        return pipeline

    def in_process(self) -> "Pipeline":
        """Run everything before this in a process of its own, for a training loop that is busy in Python.

        There it has an event loop, threads and a GIL of its own, and finished batches come in shared memory that is
        used again. Order, errors at their place, bounds and state are as without it. What is different: all of it is
        pickled (cloudpickle takes what is defined in `__main__`), async sources and functions run on the event loop of
        that process, so that clients must be made there, in a source function or at first use, and what functions
        change is changed there. The process stays from one epoch to the next until the loader is closed or collected.

        Raises:
            ValueError: Something before this cannot go there, or has gone already.
        """
        check_processes("in_process()")
        for stage in self._plan.stages:
            if stage.here_only:
                raise ValueError(f"in_process() must come before {stage.label}, got {self!r}; put it first, once")
        for stream in streams_of(self._plan):
            if stream.single_use:
                raise ValueError(
                    f"in_process() sends its source to another process, but {describe(stream.make)} is at work here; "
                    f"pass the generator function itself (without calling it)"
                )
        for label, limit in limits_of(self._plan):
            raise ValueError(
                f"in_process() sends {label} to another process, which cannot share its {limit!r} with this one; pass "
                f"concurrency={limit.value}, or put that stage after in_process()"
            )
        for label, rate in rates_of(self._plan):
            raise ValueError(
                f"in_process() sends {label} to another process, which cannot share its {rate!r} with this one; put "
                f"that stage after in_process(), or leave the rate out"
            )
        for sampler in samplers_of(self._plan):
            if draws_globally(sampler) or generators_of(sampler):
                raise ValueError(
                    f"in_process() leaves this process's random generators behind, but {describe(sampler)} draws from "
                    f"one; use shuffle(seed=...) instead of it"
                )
        return self._then(OwnProcess())

    def in_ray(
        self,
        actors: int = 4,
        *,
        parts: int | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        ahead: int = 2,
        retries: int = 3,
        spread: bool = True,
        address: str | None = None,
        pool: Any = None,
    ) -> "Pipeline":
        """Run everything before this in actors of a Ray cluster: many machines read, and this process trains.

        What is before it is dealt into `parts`, and each part is a pipeline of its own: part i has every `parts`-th
        sample, from number i on; of sources that read files, every `parts`-th file, where there are so many. The parts
        give their batches one each in turn; one that has ended drops out of the turn. So the order depends on `parts`,
        and neither on the actors nor on time. With `batch` before it, each part has batches of its own.

        Actors only host the parts. There may be more or fewer of them at any resume, and while the loader runs
        (`scale`). When an actor dies, or its node, its parts go on elsewhere from what has come, and nothing is lost,
        repeated or reordered; `BatchInfo.attempts` says what was begun again. Order, errors at their place, states and
        pauses are those of the parts. With `.shard()` before it, ranks read disjoint samples; with a `pool` they share
        its actors.

        As for `in_process`, all of it is pickled, and async functions run on the actor's event loop. `docs/ray.md` has
        what to size, and what is promised when machines die.

        Args:
            actors: How many, at least 1. 0: the parts run in this process, without Ray, with the same batches and
                states.
            parts: At least `actors`. It is in the state, which loads into a loader with as many parts only. Default: 4
                times `actors`, and what a state says when one is loaded.
            num_cpus: CPUs of the cluster that each actor holds, at least 0.
            num_gpus: GPUs that each holds.
            resources: Other resources that each holds, by name.
            runtime_env: Ray's description of what the actors need: packages, files, variables.
            ahead: Batches of each part that are made and have not been handed out, beside those that are made in its
                actor; at least 1. Fewer where Ray's object store is small. Of samples that are not batched it is 64.
            retries: How many deaths of its actor a sample survives; then it fails at its place with `WorkerDiedError`.
            spread: Ask Ray to spread the actors over its nodes.
            address: The cluster; None: that of `ray.init(...)`, else of RAY_ADDRESS. `"local"`: one of the loader's
                own, which ends with it.
            pool: A `RayPool`, whose actors other ranks and loaders use, too. None: the actors are the loader's own,
                and end with it.

        Raises:
            ImportError: Ray is not installed.
            TypeError, ValueError: Something before this cannot go there, or has gone already, or would be another thing
                in each part; or an argument does not fit.
        """
        actors = check_count("actors", actors, least=0)
        check_in_ray(self._plan, repr(self))
        number = PARTS_PER_ACTOR * max(1, actors) if parts is None else check_count("parts", parts, least=1)
        if number < actors:
            raise ValueError(f"each actor runs whole parts, so there are at least as many, got {actors=} and {parts=}")
        stage = InRay(
            actors,
            number,
            parts is not None,
            check_count("ahead", ahead, least=1),
            workers_for(actors, num_cpus, num_gpus, resources, runtime_env, retries, spread, address),
            check_pool(pool),
        )
        return self._then(stage)

    def scale(self, *, actors: int) -> None:
        """Let what is before `in_ray` run in so many actors from now on. Safe in any thread, at any time.

        No sample moves. New actors take over parts as they begin to run; those that are too many go on with nothing.

        Args:
            actors: At least 1, and at most as many as there are parts.

        Raises:
            TypeError, ValueError: There is no `in_ray` with actors, or the number does not fit.
        """
        self._plan = scaled(self._plan, check_count("actors", actors, least=1))
        with self._lock:
            processes = self._processes
        for owner in () if processes is None else processes.kept:
            if isinstance(owner, Readers):
                owner.scale(actors)

    def share(self, group: Any, *, timeout: float = 600.0) -> "Pipeline":
        """Let one of several ranks on a host read for all of them, which are to get the same.

        For tensor parallelism and the like: `.share(mesh["tp"])`. On each host the first rank of the group runs what is
        before this; the others get what it gives, in shared memory, in the same order and with the same state. A batch
        is there once for all, and copied page by page for who changes it. It pays where reading or making a batch is
        dear; for a cheap one it changes nothing. It uses no collective call, and no process group for data.

        All ranks make the loader in the same place of the program, and iterate it in the same epochs, as often. The
        first batch comes when all have asked for it. A rank that ends early is not waited for any more; if the one that
        reads ends or dies, the others get a `WorkerDiedError` after what it had given.

        Args:
            group: A torch.distributed.ProcessGroup, a DeviceMesh of one dimension or a pair `(mesh, "tp")`, or the
                global ranks as a list. Which of them are on this host is found by torchrun's LOCAL_RANK and
                LOCAL_WORLD_SIZE; without these, all are.
            timeout: In seconds; so long the ranks wait for each other when an epoch begins.

        Raises:
            TypeError, ValueError: The group is none, or this does not run on Linux, or something before or after this
                does not fit.
        """
        for stage in self._plan.stages:
            if stage.on_device or stage.for_several_ranks:
                raise ValueError(f"share() lends batches in host memory, once, got it after {stage.label}")
        return self._then(Share(group, timeout))

    def pin_memory(self) -> "Pipeline":
        """Put batches into page-locked memory, for copies to a device that you make yourself; `to` does both.

        Without an accelerator it warns and does nothing, as torch's DataLoader does.
        """
        return self._then(PinMemory())

    def to(self, device: Any) -> "Pipeline":
        """Copy batches to `device`, safe to use on the stream that is current at `next()`. The last stage.

        Args:
            device: `"cuda"`, `"cuda:1"`, `"cpu"`, a `torch.device`, or the index of a CUDA device.

        Raises:
            TypeError, ValueError: Not a device.
            DeviceError: A device that is not there.
        """
        check_device(device)
        return self._then(To(device))

    def prefetch(self, n: int) -> "Pipeline":
        """Hold `n` finished batches ahead; default 2.

        0: each is collated when it is asked for. Samples are under way before that all the same, see `map`.
        """
        count = check_count("prefetch", n, least=0, hint="prefetch(0) makes no batch ahead")
        return self._of(replace(self._plan, prefetch=count))

    def max_staleness(self, batches: int) -> "Pipeline":
        """Let the consumer decide when samples begin: none before the batch that is `batches` in front of its own.

        For training on what the newest policy made: a map generates with the weights of now, and what it begins too
        early would be stale. At most `(asked + batches) * batch_size` samples have been begun and neither handed out
        nor left out, where `asked` is the number of batches that the consumer is waiting for. What `filter`, `drop_if`,
        `drop_last` or an error leaves out makes room at once. With ordered maps, and batches that are full, no sample
        is more than `batches` batches old when its batch is given: `BatchInfo.ages` says how old each is. 0 is
        on-policy: samples begin when their batch is asked for.

        It is in no state: after a resume it counts from there. It comes after `batch`, and holds for all that is
        before; what waits for more samples than its batch, such as `shuffle(1000)`, must be before the first map.

        ```python
        loader = Pipeline(prompts).shuffle().repeat().map(rollout, concurrency=64).filter(has_variance).batch(8)
        async for batch in loader.max_staleness(1): ...
        ```

        Args:
            batches: At least 0.

        Raises:
            TypeError: Not an integer.
            ValueError: It is negative, there is no `batch` after the maps, or a stage between them cannot bear it.
        """
        count = check_count("max_staleness", batches, least=0, hint="max_staleness(0) begins samples when asked")
        plan = replace(self._plan, staleness=count)
        check_admission(plan)
        return self._of(plan)

    def with_seed(self, seed: int | None) -> "Pipeline":
        """Let `sample_rng()` in this pipeline's functions depend on `seed`; None: draw one, and keep it in the state.

        With `shard` or `share`, None is 0, since all ranks need the same.

        It is not the seed of `shuffle` and `mix`, which have their own.
        """
        return self._of(replace(self._plan, seed=None if seed is None else check_integer("seed", seed)))

    def with_info(self) -> "Pipeline":
        """Give pairs `(batch, info)`: a `BatchInfo` says which samples are in the batch. The last stage."""
        return self._of(replace(self._plan, gives_info=True))

    @property
    def _seed(self) -> int | None:
        """Of `sample_rng`; None: to be drawn.

        With `shard` it is 0 unless told: ranks cannot agree on a drawn one without talking, and with one each, a
        sample would get other random numbers on another rank.
        """
        of_several = is_sharded(self._plan) or is_shared(self._plan)
        return 0 if self._plan.seed is None and of_several else self._plan.seed

    # -- several sources ---------------------------------------------------------------------------------------------

    @staticmethod
    def merge(*sources: Any) -> "Pipeline":
        """Give samples of all sources, as they come. Ends when all have ended.

        When a source fails, its error is raised once, and the others go on; a resume tries it again.
        """
        return Pipeline._of(Plan(Combined("merge", _plans("merge", sources))))

    @staticmethod
    def interleave(*sources: Any) -> "Pipeline":
        """Give one sample of each source in turn, the first source's first; goes on with the others when one ends.

        When a source fails, its error is raised in its turn, and the others go on; a resume tries it again.
        """
        return Pipeline._of(Plan(Combined("interleave", _plans("interleave", sources))))

    @staticmethod
    def mix(
        sources: Sequence[Any] | Mapping[str, Any],
        weights: Sequence[float] | Mapping[str, float] | Schedule,
        *,
        seed: int = 0,
    ) -> "Pipeline":
        """Give samples of several sources, each drawn by weight; goes on with the others when one ends.

        When a source fails, its error is raised where it is drawn, and the others go on; a resume tries it again.

        Args:
            sources: Anything that `Pipeline` takes; or a dict of such by names, whose weights may change.
            weights: One positive number for each; they need not add up to 1. Of named sources a dict, in which some may
                be 0, or a `Schedule`; see also `set_weights`.
            seed: The draws depend on it and on the epoch.

        Raises:
            TypeError, ValueError: The weights do not fit the sources.
        """
        if isinstance(sources, Mapping):
            return _mix_by_names(sources, weights, check_integer("seed", seed))
        if is_one_source(sources) or isinstance(sources, range) or is_one_source(weights):
            raise TypeError(
                f"mix takes a list of sources and a list of weights, got {describe(sources)} and {describe(weights)}; "
                f"write for instance mix([a, b], [3, 1])"
            )
        plans = _plans("mix", sources)
        return Pipeline._of(Plan(Combined("mix", plans, _weights(weights, len(plans)), check_integer("seed", seed))))

    @staticmethod
    def zip(*sources: Any) -> "Pipeline":
        """Give tuples with one sample of each source; ends with the shortest, and when one fails."""
        return Pipeline._of(Plan(Combined("zip", _plans("zip", sources))))

    # -- what a loader is --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches (samples, without `batch`) per epoch.

        Raises:
            TypeError: That is known only when it has run.
        """
        return length_of(self._plan)

    def __bool__(self) -> bool:
        return True  # `if loader:` does not ask for the length

    @property
    def _gives_info(self) -> bool:  # type: ignore[override]  # a plain attribute where nobody asks for it
        return self._plan.gives_info

    def __repr__(self) -> str:
        return ".".join((_describe_source(self._plan), *(stage.label for stage in self._plan.stages)))

    def __iter__(self) -> Any:
        """An iterator for `for`: the loader runs on an event loop in a thread of its own."""
        warn_of_live(self, *(stream.make for stream in streams_of(self._plan)))
        return super().__iter__()

    def _check_usable(self) -> None:
        for stream in streams_of(self._plan):
            if stream.single_use:
                stream.check_unused()

    def _build(self, progress: Progress) -> Window:
        if self._transfer is None:
            self._transfer = _open_transfer(self._plan)
        return self._nodes(progress, self._transfer, self._alloc(self._transfer))

    def _nodes(self, progress: Progress, transfer: Transfer | None = None, alloc: Alloc | None = None) -> Window:
        this_pass = Pass(progress.epoch, sample_seed=self._sample_seed(self._seed))
        draws = draws_of(progress, sole=self._draws_alone)
        return build(self._plan, this_pass, transfer, alloc, self._open_processes, draws=draws, mixes=progress.mixes)

    # -- state -------------------------------------------------------------------------------------------------------

    def _shape(self) -> Shape:
        return shape_of(self._plan)

    def _ranks(self) -> dict[str, Any] | None:
        return shard_state(self._plan)

    def _check_ranks(self, ranks: dict[str, Any] | None, begun: bool) -> None:
        check_shard_state(self._plan, ranks, begun=begun)

    def _guarantee_without_a_source(self) -> Guarantee:
        flow = flow_of(self._plan)
        return (flow.at_least("at-least-once") if forgets_numbers(self._plan) else flow).guarantee

    def _guarantee(self) -> Guarantee:
        return flow_of(self._plan).guarantee

    def _never_again(self) -> str | None:
        why = super()._never_again()
        flow = flow_of(self._plan)
        if why is None and flow.completion_order:
            why = "samples come in another order each time"
        if why is None and flow.timed:
            why = "which samples a batch holds depends on time"
        return why

    def _sure_length(self) -> int | None:
        if not is_indexable(self._plan):
            return None
        try:
            length = length_of(self._plan)
            # A short last batch in which a sample failed is not dropped: its error is one more.
            return length if length == length_of(keeping_last(self._plan)) else None
        except TypeError:
            return None

    def _detached(self) -> Self:
        again = super()._detached()
        samplers = set(map(id, samplers_of(self._plan)))
        moving = [
            stream.make
            for stream in streams_of(self._plan)
            if not stream.call and (id(stream.make) in samplers or is_stateful(stream.make))
        ]
        copies = detached_copies(moving, shared=datasets_of(self._plan))
        again._plan = with_streams(without_reports(self._plan), dict(zip(map(id, moving), copies, strict=True)))
        return again

    def _random_state(self) -> dict[str, Any]:
        state = self._seed_state(self._seed)
        if self._weights:
            state["weights"] = {address: [[[], 0, list(weights)]] for address, weights in self._weights.items()}
        for address, (weights, at) in self._weights_next.items():
            changes = state.setdefault("weights", {}).setdefault(address, [])
            changes[:] = [*(changes if at else []), [[], at or 0, list(weights)]]
        return state

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        super()._check_random_state(state, begun=begun)
        check_changes(state.get("weights", {}), mixtures_of(self._plan))

    def _set_random_state(self, state: dict[str, Any]) -> None:
        super()._set_random_state(state)
        self._weights = {
            address: tuple(changes[-1][2]) for address, changes in state.get("weights", {}).items() if changes
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        before, self._plan = self._plan, with_parts_of(self._plan, state)
        try:
            super().load_state_dict(state)
        except BaseException:
            self._plan = before
            raise
        with self._lock:
            self._weights_next = {}  # what was set before is not in the state

    load_state_dict.__doc__ = Loader.load_state_dict.__doc__

    # -- weights -----------------------------------------------------------------------------------------------------

    def set_weights(self, weights: Mapping[str, float], *, at: int | None = None) -> int | None:
        """Mix named sources by other weights from now on, in later epochs too. Safe in any thread.

        Draws are made ahead of what is handed out; those that are made stay. What was set is in the state, with the
        number of the draw from which it holds: a resume goes on exactly. Several ranks that must draw alike say `at`,
        since one has made more draws ahead than another.

        ```python
        loader.set_weights({"web": 1, "code": 1})
        ```

        Args:
            weights: One for each of the sources that one `Pipeline.mix` has named; 0 for one that is not drawn.
            at: The number of the draw, counted from 0 in this epoch; None: the next one that is not made yet.

        Returns:
            The draw from which they hold; None: no draw has been made, and they hold from the first one.

        Raises:
            TypeError, ValueError: There is no such mix, or more than one, or the weights are none, or that draw has
                been made; or it is not said, and there are several ranks that must agree.
        """
        address, mixture = mixture_named(self._plan, weights)
        checked = check_weights(mixture.names, weights)
        if is_shared(self._plan):
            raise ValueError(
                "set_weights does not reach the rank that reads for the others of share(); say the change beforehand, "
                "by a Schedule"
            )
        if at is not None:
            at = check_count("at", at, least=0)
        elif (ranks := flow_of(with_ranks(self._plan)).ranks) is not None and ranks.world_size > 1:
            raise ValueError(
                "set_weights needs at=, the same on all ranks: each has made another number of draws ahead, and ranks "
                "that draw differently would deal samples twice; pass for instance the number of samples that all "
                "ranks have had so far, and some thousands more"
            )
        with self._lock:
            progress = self._progress
            running = self._loaded is None and progress is not None and not progress.over
            mixes = progress.mixes if running and progress is not None else None
            found = at if mixes is None else mixes.control(address, mixture).set(checked, at)
            if mixes is None:
                self._weights_next[address] = checked, at
            else:
                self._weights[address] = checked
        return found

    def _generators(self) -> list[Generator]:
        return generators_of(*(stream.make for stream in streams_of(self._plan)))

    def _draws_globally(self) -> bool:
        return any(map(draws_globally, drawing_samplers_of(self._plan)))

    @property
    def _draws_alone(self) -> bool:
        """One sampler draws from torch's global generator, and no other one."""
        return sum(map(draws_globally, drawing_samplers_of(self._plan))) == 1

    def _begins(self, progress: Progress) -> None:
        if mixtures_of(self._plan):
            with self._lock:
                progress.mixes = Mixes(progress.loader_state.setdefault("weights", {}), self._weights_next)
                self._weights |= {address: weights for address, (weights, _) in self._weights_next.items()}
                self._weights_next = {}
        if self._draws_globally() and not self._draws_alone and not progress.begun_before:
            empty((), dtype=int64, device="cpu").random_()  # for all of them, or the next epoch would be the same


def _resolve(source: Any, sampler: Any) -> tuple[Indexable | StreamData, StreamData | None]:
    data = resolve(source)
    if sampler is None:
        return data, None
    if not isinstance(data, Indexable):
        raise TypeError(f"sampler gives the keys of an indexable source, got {describe(source)}; leave sampler out")
    keys = resolve(sampler)
    if isinstance(keys, Indexable):
        keys = StreamData(sampler, call=False, single_use=False)
    return data, keys


def _check_loads(concurrency: int | Limit | None, data: Indexable | StreamData | None, source: Any) -> None:
    """Refuse a `concurrency` of a source that has nothing to load, or that may not be so far ahead."""
    if concurrency is None:
        return
    if isinstance(data, Indexable) and data.load is not None:
        check_ahead(*data.bounds, width_of(concurrency))
        return
    if isinstance(source, Pipeline | FetchSource):
        way_out = "pass concurrency where that one is made"
    elif isinstance(data, Indexable):
        way_out = "its samples are in memory: pass concurrency to the map after it"
    else:
        way_out = "it is read one sample after the other: pass concurrency to the map after it"
    raise TypeError(
        f"concurrency says how many samples of a map-style source are loaded at once, by its __getitem__; got "
        f"{describe(source)}; {way_out}"
    )


def _executor(executor: Any, fn: Callable[[Any], Any], is_async: bool) -> Executor | InProcesses | None:
    if executor is None or executor == "thread":
        return None
    if executor == "process":
        check_processes("executor='process'")
    elif not callable(getattr(executor, "submit", None)):
        kind = ValueError if isinstance(executor, str) else TypeError
        raise kind(f"executor must be a concurrent.futures.Executor, 'thread' or 'process', got {executor!r}")
    if is_async:
        raise ValueError(
            f"executor runs sync functions, but {describe(fn)} is async and awaited on the loop; leave it out"
        )
    return PROCESSES if executor == "process" else executor


def _plans(how: str, sources: Sequence[Any]) -> tuple[Plan, ...]:
    if isinstance(sources, str | bytes) or not hasattr(sources, "__iter__"):
        raise TypeError(f"{how} takes a list of sources, got {describe(sources)}")
    if not sources:
        raise ValueError(f"{how} needs at least one source, got none")
    if how != "mix" and len(sources) == 1 and _holds_pipelines(sources[0]):
        raise TypeError(
            f"{how} takes its sources one by one, got one {type(sources[0]).__name__} of {len(sources[0])} that has "
            f"pipelines in it; write {how}(*sources)"
        )
    pipelines = [source if isinstance(source, Pipeline) else Pipeline(source) for source in sources]
    for pipeline in pipelines:
        if pipeline._plan.gives_info:
            raise ValueError(f"{how} combines samples, got pairs with their info; put .with_info() after .{how}()")
        if pipeline._plan.staleness is not None:
            raise ValueError(
                f"max_staleness counts the batches that are handed out; put .max_staleness() after .{how}()"
            )
        if any(stage.on_device for stage in pipeline._plan.stages):
            raise ValueError(f"{how} combines samples in host memory, got {pipeline!r}; put .to() after .{how}()")
    return tuple(pipeline._plan for pipeline in pipelines)


def _holds_pipelines(source: Any) -> bool:
    """Whether a list of pipelines was passed for several; other lists may be meant as samples."""
    return isinstance(source, list | tuple) and any(isinstance(sample, Loader) for sample in source)


def _mix_by_names(sources: Mapping[str, Any], weights: Any, seed: int) -> Pipeline:
    for name in sources:
        if not isinstance(name, str):
            raise TypeError(f"the names of sources must be str, got {name!r}")
    names = tuple(sources)
    plans = _plans("mix", tuple(sources.values()))
    return Pipeline._of(Plan(Combined("mix", plans, (), seed, Mixture.of(names, weights))))


def _weights(weights: Any, count: int) -> tuple[float, ...]:
    try:
        values = tuple(weights)
    except TypeError:
        raise TypeError(f"weights must be a list of numbers, got {weights!r}") from None
    if len(values) != count:
        raise ValueError(f"weights must have one number per source, got {len(values)} for {count} sources")
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"weights must be numbers, got {value!r}")
        if not (isfinite(value) and value > 0):
            raise ValueError(f"weights must be positive and finite, got {list(values)}; leave out a source of weight 0")
    return tuple(float(value) for value in values)


def _describe_source(plan: Plan) -> str:
    source = plan.source
    if isinstance(source, Combined):
        return f"Pipeline.{source.how}({', '.join(_describe_source(inner) for inner in source.plans)})"
    data = source.data.data if isinstance(source.data, Indexable) else source.data.make
    return f"Pipeline({source.name or source_name(data)})"


def _open_transfer(plan: Plan) -> Transfer | None:
    """The way to the plan's device, or to its page-locked memory."""
    for stage in reversed(plan.stages):
        if stage.on_device:
            return stage.open_transfer()
    return None
