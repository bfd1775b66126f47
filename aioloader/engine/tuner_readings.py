"""What a `Tuner` reads while it measures, and what it adds up: blocks of time, or short epochs as a whole."""

from dataclasses import dataclass, field, replace

from aioloader.engine.knobs import Key
from aioloader.insight.meters import ConsumerMeter

__all__ = ["LastEpoch", "Reading", "Taken", "WholeEpoch", "waited_by"]


@dataclass
class Reading:
    """Counters of a run at one moment; times are `perf_counter` seconds."""

    at: float
    batches: float  # that were handed out, and those that could be made of what is finished
    waited: float  # for the first one, too
    cpu: float
    calls: dict[Key, tuple[int, int, float]]  # calls that have ended, those that failed or are repeated, seconds in it


def waited_by(consumer: ConsumerMeter) -> float:
    """Seconds, for the first batch and for what it waits for now, too."""
    return (consumer.first_after_seconds or 0.0) + consumer.waited_seconds + consumer.waiting_seconds


@dataclass(frozen=True)
class LastEpoch:
    """The consumer of an epoch when that ended: it may be given the last batches only then.

    Attributes:
        at: When that was.
        batches: What it had been given.
        waited: Seconds, as in `Reading`.
    """

    consumer: ConsumerMeter
    at: float
    batches: int
    waited: float


@dataclass(frozen=True)
class WholeEpoch:
    """An epoch that may be a block.

    Attributes:
        since: When its first batch was asked for; or when the last one ended.
        spent: `Tuner.spent` when it began.
        last: The one before it, if that ended right before.
        taken: What was measured until it began.
    """

    since: float
    spent: float
    last: LastEpoch | None
    taken: "Taken"

    def began(self) -> Reading:
        """The beginning of the block, with what was given out of the last one since."""
        if self.last is None:
            return Reading(self.since, 0.0, 0.0, 0.0, {})
        late = self.last.consumer
        return Reading(self.since, self.last.batches - late.batches, self.last.waited - waited_by(late), 0.0, {})


@dataclass
class Taken:
    """What was measured at one point so far."""

    blocks: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    cpu: float = 0.0
    busy: dict[Key, float] = field(default_factory=dict)
    calls: dict[Key, int] = field(default_factory=dict)
    failed: dict[Key, int] = field(default_factory=dict)

    def copy(self) -> "Taken":
        """The same, to go on with."""
        return replace(
            self, blocks=[*self.blocks], busy=dict(self.busy), calls=dict(self.calls), failed=dict(self.failed)
        )

    def add(self, before: Reading, after: Reading) -> None:
        """A block."""
        seconds = max(1e-9, after.at - before.at)
        self.blocks.append((after.batches - before.batches, seconds))
        self.seconds += seconds
        self.waited += after.waited - before.waited
        self.cpu += after.cpu - before.cpu
        for key, (calls, failed, busy) in after.calls.items():
            had = before.calls.get(key, (0, 0, 0.0))
            self.calls[key] = self.calls.get(key, 0) + calls - had[0]
            self.failed[key] = self.failed.get(key, 0) + failed - had[1]
            self.busy[key] = self.busy.get(key, 0.0) + busy - had[2]

    @property
    def failed_share(self) -> float:
        """Of the stage where most calls fail."""
        shares = (self.failed[key] / calls for key, calls in self.calls.items() if calls > 0)
        return min(1.0, max(shares, default=0.0))
