"""Whole pipelines in Ray actors, beside workers of this machine: `python -m bench.ray_readers`.

Ray runs on the same machine, so nothing is said about a network: what is measured is what actors cost. Work of 0.4 ms
in Python for each sample, in small batches; and samples that are cheap, in batches of 38 MB. The measure is `map(fn,
executor="process")` with as many workers. First batches are left out: an actor takes seconds to begin.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from aioloader import Pipeline
from bench._harness import MS_PER_BATCH, Contender, Epoch, Report, Target, by_for, parser_for, pick
from bench.own_process import busy

WORKERS: Final = 2
PARTS: Final = 4
STEPS: Final = 8000  # about 0.4 ms
IMAGE: Final = (3, 224, 224)
BATCH: Final = 64

PROCESSES: Final = 'aioloader, executor="process"'
ACTORS: Final = "aioloader, in_ray()"
OWN: Final = "aioloader, in_process()"


def work(key: int) -> int:
    """Python that holds the GIL."""
    return busy(STEPS, key)


def image(key: int) -> Tensor:
    """600 KB for nothing."""
    return torch.full(IMAGE, float(key & 0xFF))


def by_processes(fn: Any, samples: int) -> Epoch:
    """Samples are made in worker processes, batches here."""
    return by_for(Pipeline(range(samples)).map(fn, executor="process", concurrency=WORKERS).batch(BATCH))


def by_actors(fn: Any, samples: int) -> Epoch:
    """Batches are made in actors."""
    return by_for(Pipeline(range(samples)).map(fn).batch(BATCH).in_ray(WORKERS, parts=PARTS))


def by_own_process(fn: Any, samples: int) -> Epoch:
    """Batches are made in one other process."""
    return by_for(Pipeline(range(samples)).map(fn, concurrency=WORKERS).batch(BATCH).in_process())


@contextmanager
def cluster() -> Iterator[None]:
    """Ray on this machine, for as long as it takes."""
    import ray

    ray.init("local", num_cpus=WORKERS, include_dashboard=False, configure_logging=False, object_store_memory=2 << 30)
    try:
        yield
    finally:
        ray.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    report = Report("ray_readers", options)
    with cluster():
        for words, fn, batches in (
            (
                f"{STEPS} steps of Python per sample, batches of {BATCH} numbers",
                work,
                pick(options, full=80, quick=16, smallest=4),
            ),
            (f"batches of {BATCH} images, 38 MB", image, pick(options, full=64, quick=12, smallest=2)),
        ):
            samples = batches * BATCH
            report.compare(
                words,
                [
                    Contender(PROCESSES, partial(by_processes, fn, samples), samples, skip=8 * BATCH),
                    Contender(ACTORS, partial(by_actors, fn, samples), samples, skip=8 * BATCH),
                    Contender(OWN, partial(by_own_process, fn, samples), samples, skip=8 * BATCH),
                ],
                [Target(ACTORS, "time", PROCESSES, 1.2)],
                unit=MS_PER_BATCH(BATCH),
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
