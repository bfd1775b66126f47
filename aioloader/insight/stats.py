"""The frozen snapshot that `stats()` gives."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from textwrap import wrap
from time import perf_counter
from typing import Any

from aioloader.insight.gauges import Waits
from aioloader.insight.meters import ConsumerMeter, StageMeter
from aioloader.insight.stage_stats import StageStats
from aioloader.insight.stats_table import WIDTH, rate, table
from aioloader.insight.units import amount, duration

__all__ = ["StageStats", "Stats", "headline", "snapshot"]


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
        lines = wrap(headline(self), WIDTH, subsequent_indent="  ")
        return "\n".join([*lines, "", *table(self.stages, self.seconds)] if self.stages else lines)

    def as_dict(self) -> dict[str, Any]:
        """The statistics as plain dictionaries, lists and numbers."""
        return asdict(self)


def headline(stats: Stats) -> str:
    """The epoch and its consumer, in a sentence."""
    if stats.epoch is None or stats.first_batch_seconds is None:
        which = "no epoch has begun" if stats.epoch is None else f"epoch {stats.epoch}"
        waits = f", the consumer has waited {duration(stats.waiting_seconds)} for it" if stats.waiting_seconds else ""
        return f"{which}: no batch yet{waits}{', paused' if stats.paused else ''}"
    parts = [
        f"epoch {stats.epoch}: {amount(stats.batches)} batches in {duration(stats.seconds)}"
        f" ({amount(rate(stats.batches, stats.seconds))} per s)",
        f"the first after {duration(stats.first_batch_seconds)}",
        f"the consumer waited {duration(stats.waited_seconds)} ({stats.waited_fraction:.0%})",
    ]
    if stats.loop_cpu_fraction >= 0.005:
        parts.append(f"the loop's thread computed {stats.loop_cpu_fraction:.0%}")
    if stats.paused:
        parts.append("paused")
    return ", ".join(parts)


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
