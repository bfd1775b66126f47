"""Functions and batches in actors of a Ray cluster, beside worker processes: `python -m bench.ray`.

Everything is on this machine, so nothing is said about a network: what is measured is what actors cost beside processes
of our own, which have the same cores. The loaders stay open from epoch to epoch, and so do their workers. Functions are
timed over whole epochs, short and long ones: Ray Data has made most of a short one when its first batch comes. Then:
how long nothing comes when an actor is killed, and how long a close takes in the middle of a long call. Ray Data, which
does not keep order here, takes part where it is installed with what it needs.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import torch
import torch.utils.data
from torch import Tensor

from aioloader import DataLoader, Pipeline
from bench._harness import MB_PER_SECOND, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick, whole

BATCH: Final = 50
WORKERS: Final = 2
WORK: Final = {"2 µs": 25, "0.4 ms": 8_000, "12 ms": 240_000}  # steps
SAMPLES: Final = {"2 µs": (40_000, 400_000), "0.4 ms": (2_000, 20_000), "12 ms": (120, 600)}  # of short and long epochs
LARGE: Final = (64, 3, 224, 224)  # a batch of 38 MB

PROCESS: Final = f'map(executor="process"), {WORKERS} processes'
ACTORS: Final = f'map(executor="ray"), {WORKERS} actors'
RAY_DATA: Final = "Ray Data, iter_torch_batches"
MADE_BY_PROCESSES: Final = f'DataLoader(worker_type="process"), {WORKERS} processes'
MADE_BY_ACTORS: Final = f'DataLoader(worker_type="ray"), {WORKERS} actors'
MADE_HERE: Final = f'map(executor="ray").batch(64), {WORKERS} actors'


class Work:
    """Pure Python that never lets go of the GIL."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, key: int) -> int:
        value = key
        for _ in range(self.steps):
            value = (value * 1103515245 + 12345) & 0x7FFFFFFF
        return key


class Images(torch.utils.data.Dataset[Tensor]):
    """Images whose making costs little beside their way back."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return image(index)


def image(key: int) -> Tensor:
    """Of 600 KB."""
    return torch.full(LARGE[1:], float(key))


def by_ray_data(samples: int, work: Work) -> Epoch:
    """In tasks, as it likes; its plan is made anew each epoch, as its users have it."""

    def epoch(tick: Tick) -> None:
        import ray.data

        dataset = ray.data.range(samples).map(lambda row: {"key": work(row["id"])})
        for batch in dataset.iter_torch_batches(batch_size=BATCH):
            tick(len(batch["key"]))

    return epoch


def compare_maps(report: Report, options: Any, opened: ExitStack) -> None:
    """Three sizes of work, two lengths of epochs."""
    for said, steps in WORK.items():
        for long, samples in enumerate(SAMPLES[said]):
            compare_map(report, options, opened, said, Work(steps), samples, most_rounds=5 if long else 15)


def compare_map(
    report: Report, options: Any, opened: ExitStack, said: str, work: Work, samples: int, *, most_rounds: int
) -> None:
    """One of them."""
    count = pick(options, full=samples, quick=samples // 4, smallest=4) // BATCH * BATCH or BATCH

    def loader(executor: Any) -> Epoch:
        pipeline = Pipeline(range(count)).map(work, executor=executor, concurrency=WORKERS).batch(BATCH)
        return whole(by_for(opened.enter_context(pipeline)))

    report.compare(
        f"{said} of Python a sample, {count:,} of them, batches of {BATCH}",
        [
            Contender(PROCESS, partial(loader, "process"), count, ours=True),
            Contender(ACTORS, partial(loader, "ray"), count),
            Contender(RAY_DATA, lambda: whole(by_ray_data(count, work)), count, needs=("pandas", "pydantic")),
        ],
        [Target(ACTORS, "time", PROCESS, 1.1), Target(ACTORS, "speed", RAY_DATA, 1.0)],
        rounds=pick(options, full=most_rounds, quick=2, smallest=1),
    )


def compare_batches(report: Report, options: Any, opened: ExitStack) -> None:
    """38 MB each."""
    count = pick(options, full=256, quick=8, smallest=2) * LARGE[0]  # more than a second
    size = 4 * LARGE[1] * LARGE[2] * LARGE[3]

    def made_there(worker_type: Any) -> Epoch:
        return by_for(
            opened.enter_context(
                DataLoader(
                    Images(count), LARGE[0], num_workers=WORKERS, persistent_workers=True, worker_type=worker_type
                )
            )
        )

    def made_here() -> Epoch:
        pipeline = Pipeline(range(count)).map(image, executor="ray", concurrency=WORKERS).batch(LARGE[0])
        return by_for(opened.enter_context(pipeline))

    report.compare(
        "batches of 38 MB",
        [
            Contender(MADE_BY_PROCESSES, partial(made_there, "process"), count, ours=True),
            Contender(MADE_BY_ACTORS, partial(made_there, "ray"), count),
            Contender(MADE_HERE, made_here, count),
        ],
        [
            Target(MADE_BY_ACTORS, "time", MADE_BY_PROCESSES, 1.2),
            Target(MADE_HERE, "time", MADE_BY_PROCESSES, 1.1),
        ],
        unit=MB_PER_SECOND(size),
    )


def kill_an_actor(options: Any) -> None:
    """The longest time without a batch, beside one in which nothing dies."""
    samples = pick(options, full=3000, quick=1000, smallest=100)
    with Pipeline(range(samples)).map(Work(100_000), executor="ray", concurrency=WORKERS).batch(10) as loader:
        for killed in (False, True):
            gaps, found, last = [], [], time.perf_counter()
            for number, batch in enumerate(loader):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                found += batch.tolist()
                if killed and number == samples // 40:
                    actors = [actor.pid for stage in loader.stats().stages for actor in stage.actors]
                    os.kill(next(pid for pid in actors if pid is not None), signal.SIGKILL)
            what = "an actor is killed" if killed else "nothing dies"
            complete = "complete and in order" if found == list(range(samples)) else "NOT complete and in order"
            print(f"{what}: {complete}, longest time without a batch {max(gaps[1:]):.2f} s", flush=True)


def sleep_long(key: int) -> int:
    """A call of 30 s, after the first one."""
    time.sleep(30 if key else 0)
    return key


def close_in_a_call() -> None:
    """How long it takes."""
    loader = Pipeline(range(4)).map(sleep_long, executor="ray", concurrency=WORKERS)
    next(iter(loader))
    began = time.perf_counter()
    loader.close()
    print(f"close in the middle of a call of 30 s: {time.perf_counter() - began:.2f} s; at most 2", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    import ray

    options = parser_for(__doc__).parse_args(arguments)
    report = Report("ray", options)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        "local",
        num_cpus=8 * WORKERS,  # they only count what actors hold
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2 << 30,
    )
    with ExitStack() as opened:
        compare_batches(report, options, opened)  # first: Ray Data leaves processes behind that are not quite idle
    with ExitStack() as opened:
        compare_maps(report, options, opened)
    kill_an_actor(options)
    close_in_a_call()
    ray.shutdown()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
