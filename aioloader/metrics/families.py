"""Which metrics there are: their names, units and meanings, and where in `Stats` their values stand.

Names follow Prometheus: a prefix, the base unit (seconds, bytes, ratio) at the end, and `_total` after counters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from aioloader.insight.actors import ActorStats
from aioloader.insight.gauges import Waits
from aioloader.insight.stats import StageStats, Stats
from aioloader.masking import masked

__all__ = ["ACTOR", "FAMILIES", "LOADER", "QUANTILES", "STAGE", "Family", "Kind", "labels_of", "quantiles"]

Kind = Literal["counter", "gauge", "summary"]
T = TypeVar("T")

QUANTILES: Final = ("0.5", "0.95", "0.99")


@dataclass(frozen=True)
class Family(Generic[T]):
    """A metric.

    Attributes:
        name: Without the suffix `_total`.
        kind: A `"summary"` has quantiles of the latest values, and of all values their sum and count.
        help: What it says.
        value: Of the statistics of a loader, or of a stage. Of a summary: the waits, and how many there were.
    """

    name: str
    kind: Kind
    help: str
    value: Callable[[T], Any]

    @property
    def unit(self) -> str:
        """The last word of its name, if that is a unit; else empty."""
        last = self.name.rpartition("_")[2]
        return last if last in ("seconds", "bytes", "ratio") else ""


LOADER: Final[tuple[Family[Stats], ...]] = (
    Family("aioloader_epoch", "gauge", "Number of the newest epoch.", lambda s: s.epoch or 0),
    Family("aioloader_batches", "counter", "Batches handed to the consumer.", lambda s: s.batches),
    Family("aioloader_active_seconds", "counter", "Time from the first next() of epochs on.", lambda s: s.seconds),
    Family(
        "aioloader_first_batch_seconds",
        "gauge",
        "How long the first batch of the epoch took.",
        lambda s: s.first_batch_seconds or 0.0,
    ),
    Family(
        "aioloader_batch_wait_seconds",
        "summary",
        "How long the consumer waited for each batch after the first one.",
        lambda s: (s.waits, max(0, s.batches - 1)),
    ),
    Family(
        "aioloader_waiting_seconds",
        "gauge",
        "How long the consumer has been waiting for a batch, now.",
        lambda s: s.waiting_seconds,
    ),
    Family(
        "aioloader_loop_cpu_ratio",
        "gauge",
        "Share of the epoch in which the event loop's thread was computing.",
        lambda s: s.loop_cpu_fraction,
    ),
    Family("aioloader_paused", "gauge", "1 while no sample begins, see paused().", lambda s: int(s.paused)),
)
"""Of a loader."""

STAGE: Final[tuple[Family[StageStats], ...]] = (
    Family("aioloader_stage_samples", "counter", "Samples, or batches, that were finished.", lambda s: s.samples),
    Family("aioloader_stage_errors", "counter", "Samples that failed.", lambda s: s.errors),
    Family("aioloader_stage_retries", "counter", "Attempts after the first one.", lambda s: s.retries),
    Family("aioloader_stage_timeouts", "counter", "Calls whose timeout was up.", lambda s: s.timeouts),
    Family("aioloader_stage_hedges", "counter", "Second calls for slow samples.", lambda s: s.hedges),
    Family("aioloader_stage_skipped", "counter", "Errors that skip_errors left out.", lambda s: s.skipped),
    Family("aioloader_stage_dropped", "counter", "Samples that a predicate dropped.", lambda s: s.dropped),
    Family("aioloader_stage_partial_batches", "counter", "Batches given before they were full.", lambda s: s.partial),
    Family("aioloader_stage_cache_hits", "counter", "Samples that came from a cache.", lambda s: s.hits),
    Family("aioloader_stage_cache_misses", "counter", "Samples that were not in it.", lambda s: s.misses),
    Family("aioloader_stage_cache_bytes", "gauge", "Size of the samples in a cache.", lambda s: s.cached_bytes),
    Family("aioloader_stage_busy_seconds", "counter", "Time in user code, over all places.", lambda s: s.busy_seconds),
    Family("aioloader_stage_cpu_seconds", "counter", "CPU time of its threads in that.", lambda s: s.cpu_seconds),
    Family(
        "aioloader_stage_input_wait_seconds",
        "counter",
        "Time in which nothing was under way, for want of samples.",
        lambda s: s.waiting_for_input_seconds,
    ),
    Family(
        "aioloader_stage_room_wait_seconds",
        "counter",
        "Time in which nothing was under way, for want of room.",
        lambda s: s.waiting_for_room_seconds,
    ),
    Family("aioloader_stage_concurrency", "gauge", "Samples that may be under way at once.", lambda s: s.concurrency),
    Family("aioloader_stage_under_way", "gauge", "Samples under way, now.", lambda s: s.under_way),
    Family("aioloader_stage_finished", "gauge", "Finished samples that wait to be taken, now.", lambda s: s.finished),
    Family("aioloader_stage_room", "gauge", "Samples that its window could hold, at most.", lambda s: s.room),
    Family(
        "aioloader_stage_oldest_seconds",
        "gauge",
        "How long the oldest sample under way has been so, now.",
        lambda s: s.oldest_seconds,
    ),
    Family(
        "aioloader_stage_wait_seconds",
        "summary",
        "How long finished samples waited until they were taken.",
        lambda s: (s.waited_seconds, s.samples),
    ),
    Family(
        "aioloader_stage_rate_wait_seconds",
        "counter",
        "Time in which a call could have begun if its rate had let it.",
        lambda s: 0.0 if s.policies is None else s.policies.rate_wait_seconds,
    ),
)
"""Of each stage of a loader."""


ACTOR: Final[tuple[Family[ActorStats], ...]] = (
    Family("aioloader_actor_running", "gauge", "1 while the actor of a Ray cluster runs.", lambda a: int(a.running)),
    Family("aioloader_actor_samples", "counter", "Samples, or batches, that came from it.", lambda a: a.samples),
    Family("aioloader_actor_busy_seconds", "counter", "Time in which it was at work.", lambda a: a.busy_seconds),
    Family("aioloader_actor_received_bytes", "counter", "What came from it.", lambda a: a.received_bytes),
    Family("aioloader_actor_restarts", "counter", "Actors in its place that were lost.", lambda a: a.restarts),
)
"""Of each actor of a stage. These count for as long as the loader lives, and not for an epoch."""


FAMILIES: Final[tuple[Family[Any], ...]] = (*LOADER, *STAGE, *ACTOR)


def labels_of(stats: Stats) -> Iterator[tuple[StageStats, str, str]]:
    """Each stage with its name and its position, which tells apart stages of one name."""
    for position, stage in enumerate(stats.stages):
        yield stage, masked(stage.name), str(position)


def quantiles(waits: Waits) -> Iterator[tuple[str, float]]:
    """Those of a summary."""
    return iter(zip(QUANTILES, (waits.p50, waits.p95, waits.p99), strict=True))
