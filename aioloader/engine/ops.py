"""The user's functions as a window calls them, and where they run."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aioloader.core.address import Address
from aioloader.core.cores import usable_cores
from aioloader.core.limit import Limit, width_of
from aioloader.core.policies import Policies
from aioloader.core.written import Written
from aioloader.engine.turns import Turns
from aioloader.executors.chunk import Call, Stop
from aioloader.executors.epochs import Epochs, epochs_of
from aioloader.executors.ray.workers import RayWorkers

__all__ = ["PROCESSES", "InProcesses", "OnRay", "Op"]


@dataclass(frozen=True)
class InProcesses:
    """Runs sync functions in worker processes of the loader.

    Args:
        kept: The workers stay from one epoch to the next.
        in_turn: The workers take turns, so that random numbers are repeatable when each worker has its own seed.
        prepare: Called before the first sample; returns a function that each worker calls with its number, or None.
            That function is sent to the workers with the others.
        turns: The source, when only the workers know where the data ends.
        epochs: Returns the current epochs of the user's objects with `set_epoch`, for their copies in the workers.
    """

    kept: bool = True
    in_turn: bool = False
    prepare: Callable[[], Callable[[int], None] | None] | None = None
    turns: Turns | None = None
    epochs: Callable[[Sequence[Any]], Epochs] = epochs_of


PROCESSES: Final = InProcesses()
"""The usual place. Neighbouring stages that run here are sent to the workers together."""


@dataclass(frozen=True)
class OnRay:
    """Runs functions in actors of a Ray cluster.

    Args:
        workers: What the actors need.
        prepare: See `InProcesses`.
        epochs: See there.
        seeds_each: The global generators are seeded for each call, so that what is drawn from them does not depend on
            who makes it.
    """

    workers: RayWorkers
    prepare: Callable[[], Callable[[int], None] | None] | None = None
    epochs: Callable[[Sequence[Any]], Epochs] = epochs_of
    seeds_each: bool = False


@dataclass(eq=False)
class Op:
    """A function that a window calls with each entry; not changed once it is fused.

    Attributes:
        fn: Sync or async.
        label: Its name in statistics and in notes of errors.
        is_async: Whether `fn` is awaited on the loop.
        concurrency: The maximum number of calls at once, or a `Limit` that it shares with others.
        address: See `Address`; identifies its worker processes, and its random numbers depend on it.
        seed: The seed of its samples' random numbers; None: it draws none.
        predicate: `fn` decides which entries stay.
        ordered: Results come in the order of the input.
        executor: Where `fn` runs; None: a sync one in threads of the loader, an async one on the loop.
        initializer: Called in each of the loader's threads with its number.
        thread_name: The name of these threads.
        flexible: The user did not set the concurrency: next to another sync op, it takes that one's.
        many: Does the same as `fn` for a list of samples at once, where that may be cheaper.
        dataset: With `many`: the dataset from which `fn` loads samples by their keys.
        record_order: With `ordered=False`: a folder to which the order of the results is written.
        replay_order: With `ordered=False`: such a folder; results come in the order that it has.
        in_place: `fn` runs no user code and takes less time than a hop: it is called on the loop.
        light: Says of a value, and a number of bytes, whether `fn` runs nothing of the user's for it, and may turn out
            to take less time than a hop (see `ThreadStep`), and whether the value is no larger. None: of no value.
        ahead: Entries that may be under way and finished together; None: as many as its window has use for. One with a
            bound of its own has a window of its own.
        ahead_bytes: The same in bytes of finished ones.
        grows: More than `ahead` while a slow one at the front holds finished ones up, see `Growth`.
        max_overtaken: With `ordered=False`: results that may overtake a slower one; None: any number.
        max_dropped_in_a_row: With `predicate`: entries that it may refuse one after the other; None: any number.
        stop: What is said of entries that end here; None: nobody asks.
        policies: What is done about its calls. With any it shares no hop with others.
        written: Where the user writes its concurrency; None: nowhere.
    """

    fn: Callable[[Any], Any]
    label: str
    is_async: bool = False
    concurrency: int | Limit = field(default_factory=usable_cores)
    address: Address = ()
    seed: int | None = None
    predicate: bool = False
    ordered: bool = True
    executor: Executor | InProcesses | OnRay | None = None
    initializer: Callable[[int], None] | None = None
    thread_name: str = "aioloader-map"
    flexible: bool = False
    many: Callable[[list[Any]], Any] | None = None
    dataset: Any = None
    record_order: Path | None = None
    replay_order: Path | None = None
    in_place: bool = False
    light: Callable[[Any, float], bool] | None = None
    ahead: int | None = None
    ahead_bytes: int | None = None
    grows: bool = False
    max_overtaken: int | None = None
    max_dropped_in_a_row: int | None = None
    stop: Stop | None = None
    policies: Policies | None = None
    written: Written | None = None

    @property
    def width(self) -> int:
        """The maximum number of calls at once, as of now."""
        return width_of(self.concurrency)

    @property
    def bounded(self) -> bool:
        """Whether the user has said how much may be ahead."""
        return self.ahead is not None or self.ahead_bytes is not None

    @property
    def call(self) -> Call:
        """The same for steps that run several ops in one hop."""
        return Call(self.fn, self.predicate, self.label, self.seed, self.stop)
