"""What it costs a `for` loop to get a batch: `python -m bench.sync_face`.

The batch is one object that is always the same, made by an async source, so that nothing is measured but the way from
the loader's event loop into the consumer's thread. Where the consumer takes no time it must wait for each batch, and
how much room there is decides how often two threads wake each other; where it is slower, a batch lies ready.
"""

import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Final

from aioloader import Pipeline
from bench._harness import Contender, Epoch, Report, Target, Tick, Unit, by_for, parser_for, pick
from bench._rivals import spdl_loader

US: Final = Unit("µs per batch", lambda seconds: seconds * 1e6)
READY_SECONDS: Final = 0.0005

SINK: Final = "SPDL, default sink"
QUEUE: Final = "SPDL, thread queue"


async def batches(count: int) -> AsyncIterator[object]:
    """Made by nothing."""
    batch = object()
    for _ in range(count):
        yield batch


def ours(count: int, room: int) -> Any:
    return Pipeline(partial(batches, count)).prefetch(room)


def by_spdl(count: int, room: int, *, thread_queue: bool) -> Any:
    return spdl_loader(
        lambda builder: builder.add_source(batches(count)), threads=1, sink=room, thread_queue=thread_queue
    )


def waiting(loader: Any) -> Epoch:
    return by_for(loader, lambda _: 1)


def ready(loader: Any) -> Epoch:
    """Only the time inside `next()`: between two calls there is enough of it for the next batch to lie ready."""

    def epoch(tick: Tick) -> float:
        iterator = iter(loader)
        spent, count = 0.0, 0
        while True:
            time.sleep(READY_SECONDS)
            began = time.perf_counter()
            batch = next(iterator, None)
            took = time.perf_counter() - began
            if batch is None:
                return spent
            count += 1
            if count > 2:
                spent += took
            tick(1)

    return epoch


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    count = pick(options, full=3_000, quick=600, smallest=20)
    few = pick(options, full=400, quick=100, smallest=10)
    report = Report("sync_face", options)
    name = "aioloader, for"
    for room, reach in ((2, 1 / 3), (16, 0.05)):
        report.compare(
            f"the consumer waits for each batch, room for {room}",
            [
                Contender(name, lambda room=room: waiting(ours(count, room)), count),  # type: ignore[misc]
                Contender(
                    SINK,
                    lambda room=room: waiting(by_spdl(count, room, thread_queue=False)),  # type: ignore[misc]
                    count,
                    needs=("spdl",),
                ),
                Contender(
                    QUEUE,
                    lambda room=room: waiting(by_spdl(count, room, thread_queue=True)),  # type: ignore[misc]
                    count,
                    needs=("spdl",),
                ),
            ],
            [Target(name, "time", SINK, reach), Target(name, "time", QUEUE, 1)],
            unit=US,
        )
    report.compare(
        "a batch lies ready, room for 2",
        [
            Contender(name, lambda: ready(ours(few, 2)), few),
            Contender(SINK, lambda: ready(by_spdl(few, 2, thread_queue=False)), few, needs=("spdl",)),
            Contender(QUEUE, lambda: ready(by_spdl(few, 2, thread_queue=True)), few, needs=("spdl",)),
        ],
        [Target(name, "time", SINK, 1), Target(name, "time", QUEUE, 1)],
        unit=US,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
