"""The frozen snapshot that `stats()` gives."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

from aioloader.insight.actors import ActorStats
from aioloader.insight.gauges import Waits
from aioloader.insight.meters import ConsumerMeter, Kind, StageMeter
from aioloader.insight.policies import PolicyStats
from aioloader.insight.stats_table import table

__all__ = ["StageStats", "Stats", "snapshot"]


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage in one epoch.

    Attributes:
        name: The stage as written in the pipeline, `map(fetch)`. Adjacent sync stages that run in one hop are one.
        kind: `"source"` (read by one task; `flat_map` too), `"async"` (awaited on the loop), `"sync"` (in threads or
            an executor), `"process"` (in worker processes), `"ray"` (in actors of a cluster) or `"fold"` (on the loop,
            without user code; only `batch` with `max_wait` is shown).
        concurrency: How many samples may be under way at once.
        samples: Samples, or batches, that it has finished.
        errors: How many of them failed.
        busy_seconds: Time inside the user's function, summed over concurrent samples; may exceed the epoch's.
        cpu_seconds: CPU time of its threads in that; 0 where it is not known.
        utilization: busy_seconds as a fraction of what `concurrency` samples could have used, 0 to 1.
        waiting_for_input_seconds: Time in which nothing was under way because no sample came from the stages before.
        waiting_for_room_seconds: Time in which nothing was under way because finished samples were not taken.
        finished_slots: The average number of finished samples in the window when some were taken.
        room: The maximum number of samples (or batches), under way and finished, that its window could hold in this
            epoch. It grows where all stages of a window are cheap, so that a hop into a thread is worth its cost. The
            rooms of all stages together limit how many samples are begun; those that `batch` and `shuffle(n)` hold
            while they fill count for the stages after them.
        ordered: Whether samples leave the window in the order of the input, so that finished ones wait for a slower one
            before them.
        dropped: Samples (or batches) that a predicate of `filter` or `drop_if` dropped, or a `Channel` for newer ones.
        retries: Attempts after the first one of a sample, see `Retry`. Of a source that reads from a store, here and in
            the next two: of one of its requests.
        timeouts: Calls whose `timeout` was up.
        hedges: Second calls for samples whose first one took long, see `Hedge`.
        partial: Batches that were delivered before they were full, because `max_wait` was over.
        skipped: For a `skip_errors`, errors that it left out in this epoch, of the stages before it; else 0.
        hits: For a `cache`, samples that came from it in this epoch, without work in the stages before it.
        misses: For a `cache`, samples that were not in it.
        cached_bytes: For a `cache`, the size of all samples in it.
        under_way: Samples (or batches) whose call in this stage has begun and not ended, now. For a source: 1 while it
            is being read.
        finished: Finished samples (or batches) in its window that wait to be taken, now; stages of one window share it.
        oldest_seconds: How long the one that has been under way longest has been so; 0.0 if none is. Where cheap
            samples share a hop into a thread or a worker process, counted from the beginning of the hop: some
            milliseconds at most.
        oldest_key: Its key, as text; empty where none is under way, or its key is not known. For a batch, the keys of
            its samples.
        waited_seconds: How long samples that were finished waited until what follows the window took them; in the last
            window, until the batch was handed out. Stages of one window share it.
        live: For a source: its samples are still being produced (`Channel`, watched files), so that waiting for them
            is nobody's limit.
        epochs: For a source of a `mix` by names: how often it has been gone through, 1.5 for one and a half times,
            where its length is known; else None.
        policies: What its retries, timeouts, second calls and rate are, and have done; None: it has none of these.
        actors: What is known of its actors in a cluster; empty where it has none.
    """

    name: str
    kind: Kind
    concurrency: int
    samples: int
    errors: int
    busy_seconds: float
    cpu_seconds: float
    utilization: float
    waiting_for_input_seconds: float
    waiting_for_room_seconds: float
    finished_slots: float
    room: int
    ordered: bool = True
    dropped: int = 0
    retries: int = 0
    timeouts: int = 0
    hedges: int = 0
    partial: int = 0
    skipped: int = 0
    hits: int = 0
    misses: int = 0
    cached_bytes: int = 0
    under_way: int = 0
    finished: int = 0
    oldest_seconds: float = 0.0
    oldest_key: str = ""
    waited_seconds: Waits = field(default_factory=Waits)
    live: bool = False
    policies: PolicyStats | None = None
    actors: tuple[ActorStats, ...] = ()
    epochs: float | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """A loader in its newest epoch.

    Attributes:
        epoch: Its number; None before the first.
        seconds: From the first `next()` until now, or until the epoch ended.
        first_batch_seconds: How long the first batch took; None before it.
        batches: How many batches were delivered.
        waited_seconds: Time that the consumer spent in `next()` after the first batch.
        waited_fraction: That as a fraction of the time since the first batch, 0 to 1.
        loop_cpu_fraction: The fraction of the time in which the event loop's thread was computing, 0 to 1. Under
            `async for` it includes your own code. 0 where there is no loop, or the system does not measure it.
        stages: In the order of the pipeline.
        waiting_seconds: How long the consumer has been waiting for a batch, now; 0.0 if it does not wait.
        paused: Whether no sample begins now, see `paused()`.
        waiting_for_ranks: Whether it waits for other ranks now, with `shard(even="agree")`.
        waits: How long the consumer waited for each batch after the first one: of this epoch their sum and maximum, of
            the latest ones, about four thousand, p50, p95 and p99.
    """

    epoch: int | None
    seconds: float
    first_batch_seconds: float | None
    batches: int
    waited_seconds: float
    waited_fraction: float
    loop_cpu_fraction: float
    stages: tuple[StageStats, ...]
    waiting_seconds: float = 0.0
    paused: bool = False
    waiting_for_ranks: bool = False
    waits: Waits = field(default_factory=Waits)

    def __str__(self) -> str:
        """A table for a terminal, within 100 columns."""
        return table(self)

    def as_dict(self) -> dict[str, Any]:
        """The statistics as plain dictionaries, lists and numbers."""
        return asdict(self)


def snapshot(
    epoch: int | None, meters: Iterable[StageMeter], consumer: ConsumerMeter | None, *, paused: bool = False
) -> Stats:
    """The current values of the counters."""
    if consumer is None or consumer.began is None:
        return Stats(epoch, 0.0, None, 0, 0.0, 0.0, 0.0, (), paused=paused)
    seconds = (consumer.ended or perf_counter()) - consumer.began
    steady = seconds - (consumer.first_after_seconds or 0.0)
    waited = consumer.waited_seconds / steady if consumer.batches > 1 and steady > 0 else 0.0
    return Stats(
        epoch=epoch,
        seconds=seconds,
        first_batch_seconds=consumer.first_after_seconds,
        batches=consumer.batches,
        waited_seconds=consumer.waited_seconds,
        waited_fraction=min(1.0, waited),
        loop_cpu_fraction=min(1.0, consumer.loop.seconds() / seconds) if consumer.loop is not None and seconds else 0.0,
        stages=tuple(_stage(meter, seconds) for meter in list(meters)),
        waiting_seconds=consumer.waiting_seconds,
        waiting_for_ranks=consumer.asks_ranks,
        paused=paused,
        waits=consumer.waits,
    )


def _stage(meter: StageMeter, seconds: float) -> StageStats:
    capacity = seconds * meter.concurrency
    gauges = meter.gauges
    now = perf_counter()
    policies = gauges.policies
    if policies is not None and gauges.next_attempt_at is not None:
        policies = replace(policies, next_attempt_seconds=max(0.0, gauges.next_attempt_at - now))
    return StageStats(
        name=meter.name,
        kind=meter.kind,
        concurrency=meter.concurrency,
        samples=meter.samples if meter.kind == "source" else max(0, meter.samples - meter.retries),
        errors=meter.errors,
        busy_seconds=meter.busy_seconds,
        cpu_seconds=meter.cpu_seconds,
        utilization=min(1.0, meter.busy_seconds / capacity) if capacity > 0 else 0.0,
        waiting_for_input_seconds=meter.idle.seconds("input"),
        waiting_for_room_seconds=meter.idle.seconds("room"),
        finished_slots=meter.finished_sum / meter.handovers if meter.handovers else 0.0,
        room=meter.room + meter.ahead,
        ordered=meter.ordered,
        dropped=meter.dropped + meter.dropped_late,
        retries=meter.retries,
        timeouts=meter.timeouts,
        hedges=meter.hedges,
        partial=meter.partial,
        skipped=meter.skipped,
        hits=meter.hits,
        misses=meter.misses,
        cached_bytes=meter.cached_bytes,
        under_way=gauges.under_way,
        finished=gauges.finished,
        oldest_seconds=0.0 if gauges.oldest_since is None else max(0.0, now - gauges.oldest_since),
        oldest_key=gauges.oldest_key,
        waited_seconds=gauges.waits,
        live=meter.live,
        policies=policies,
        actors=() if meter.actors is None else meter.actors(),
        epochs=meter.samples / meter.epoch_length if meter.epoch_length else None,
    )
