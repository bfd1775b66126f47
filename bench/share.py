"""What four ranks that get the same cost, each for itself and with `share`: `python -m bench.share`.

Batches of 38 MB, made of samples that take some work. Measured are the calls that make them, the proportional memory
(PSS) that the loaders have added to all processes while each holds a batch and the next ones are made ahead, and how
long `next()` takes when a batch is ready. One rank alone is the limit.

What is compared: the sum of what the loaders of all ranks add, with what the loader of one rank alone adds. What is
there without a loader, Python and torch, is in neither: each process has imported it and read two batches before, and
all have come that far before the first of them is measured, since pages of libraries count for less the more map them.
On both sides there are four batches (one in use, two ahead, one free), and samples that wait to be collated, whose
number depends on time: so each is measured several times.
"""

import gc
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from aioloader import Pipeline
from bench._harness import Report, Target, parser_for, pick

BATCH: Final = 64
RANKS: Final = 4

ALONE: Final = "one rank alone"
EACH: Final = f"{RANKS} ranks, each for itself"
SHARED: Final = f"{RANKS} ranks, share"


def pss_mib() -> float:
    """The proportional memory of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not tell")


def work(rank: int, ranks: int, batches: int, side: int, *, shared: bool, job: str, results: Any, barrier: Any) -> None:
    """One rank: calls, MiB, and seconds of `next()`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=job)
    warnings.simplefilter("ignore")  # that nothing splits the data is what is measured
    calls = [0]

    def load(key: int) -> torch.Tensor:
        calls[0] += 1
        return torch.full((3, side, side), float(key))

    def loader_of(count: int) -> Pipeline:
        loader = Pipeline(range(BATCH * count)).map(load, concurrency=2).batch(BATCH)
        return loader.share(range(ranks)) if shared else loader

    for _ in loader_of(2):  # threads and modules are there from now on
        pass
    calls[0] = 0
    gc.collect()
    barrier.wait()
    before = pss_mib()
    barrier.wait()
    seconds: list[float] = []
    held = 0.0
    batch: Any = None
    steps = iter(loader_of(batches))
    for number in range(batches):
        began = time.perf_counter()
        batch = next(steps)
        seconds.append(time.perf_counter() - began)
        batch.sum()
        time.sleep(0.1)  # the step, in which the next batch is made
        barrier.wait()
        if number == batches // 2:
            time.sleep(0.3)
            barrier.wait()
            held = pss_mib() - before
            barrier.wait()
    del batch
    results.put((calls[0], held, statistics.median(seconds[1:])))


def measured(ranks: int, batches: int, side: int, *, shared: bool) -> tuple[float, float, float]:
    """Calls per sample, MiB of all ranks, and the median of `next()` in µs."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(ranks)
    job = f"{os.getpid()}-{time.monotonic_ns()}"
    common = {"shared": shared, "job": job, "results": results, "barrier": barrier}
    processes = [
        context.Process(target=work, args=(rank, ranks, batches, side), kwargs=common) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    calls, held, seconds = zip(*found, strict=True)
    return sum(calls) / (BATCH * batches), sum(max(0.0, one) for one in held), 1e6 * statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    batches = pick(options, full=40, quick=12, smallest=3)
    side = pick(options, full=224, quick=224, smallest=16)
    ranks = pick(options, full=RANKS, quick=RANKS, smallest=2)
    report = Report("share", options)
    rows = {}
    rounds = pick(options, full=3, quick=1, smallest=1)
    for name, count, sharing in ((ALONE, 1, False), (EACH, ranks, False), (SHARED, ranks, True)):
        found = [measured(count, batches, side, shared=sharing) for _ in range(rounds)]
        calls, mib, micros = map(statistics.median, zip(*found, strict=True))
        rows[name] = {"calls per sample": calls, "MiB of all": mib, "next(), µs": micros}
    report.table(f"medians of {rounds}: {batches} batches of {BATCH} x 3 x {side} x {side}", rows)
    shared, alone, each = rows[SHARED], rows[ALONE], rows[EACH]
    calls = shared["calls per sample"]
    report.judge(Target(SHARED, "time", ALONE, 1.0), calls, "{value} calls per sample; at most {reach}")
    memory = shared["MiB of all"] / max(1.0, alone["MiB of all"])
    report.judge(Target(SHARED, "memory", ALONE, 1.3), memory, "{value} of the memory of one rank; at most {reach}")
    extra = shared["next(), µs"] - each["next(), µs"]  # which begin at the same moment, too
    report.judge(Target(SHARED, "time", EACH, 100.0), extra, "{value} µs more for a batch; at most {reach}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
