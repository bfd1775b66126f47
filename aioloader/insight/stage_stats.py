"""What `stats()` says of one stage."""

from dataclasses import dataclass, field

from aioloader.insight.actors import ActorStats
from aioloader.insight.gauges import Waits
from aioloader.insight.meters import Kind
from aioloader.insight.policies import PolicyStats

__all__ = ["StageStats"]


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
