"""How fast batches get to a CUDA device, and how much of that hides behind the model: `python -m bench.gpu`.

Three questions, each beside what can be had without a loader: `tensor.to(device)`, `pin_memory()` before it, and SPDL's
transfer, where SPDL is installed (`pip install spdl_io`):

1. Bandwidth: bytes per second of `aioloader.device.Transfer`, against one bare page-locked copy of the same size.
2. Overlap: of the time that copies take, which part disappears behind kernels? `1 - (T_both - T_compute) / T_copy` is
   1 when copies cost the training step nothing, 0 when they cost their full time, and below 0 when they cost more.
3. Cost: how long the consumer's thread is busy with one batch before it can queue its kernels. Transfer and SPDL work
   in a thread of their own, and cost the consumer what it takes to receive the batch.

Batches of worker processes come in shared memory, which is page-locked once, where it is: "Transfer, shared". The row
"page-locking, shared" is what that takes, for a batch's worth of memory that was not page-locked before.

Prints a table and then one line of JSON per row. Without a CUDA device it says so and ends with status 0.
"""

import argparse
import importlib
import json
import os
import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from aioloader.core.memory import tensor_over
from aioloader.device import Backend, Transfer, open_backend
from aioloader.executors.processes.segments import create_file
from aioloader.memory.mapping import Mapping, mapping_of

MIB = 1 << 20
AHEAD = 2
"""Batches that the device thread may be ahead, the loader's default."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: Per batch, the median over the rounds.
        gigabytes_per_second: 10^9 bytes; None without copies.
        share: Of the bare page-locked copy's bandwidth; None beside kernels.
        overlap: See the module; None without kernels.
        consumer_us: Microseconds of the consumer's thread per batch, the median; None where there are no kernels.
    """

    what: str
    batch_mib: int
    seconds: float
    gigabytes_per_second: float | None
    share: float | None = None
    overlap: float | None = None
    consumer_us: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 64, 256], help="sizes of a batch")
    parser.add_argument("--batches", type=int, default=30, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if torch.cuda.device_count() == 0:
        print(f"no CUDA device was found (torch {torch.__version__}): nothing to measure")
        return 0
    torch.cuda.set_device(torch.device(options.device))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{options.batches} batches per round, median of {options.rounds} rounds\n")
    rows: list[Row] = []
    print(f"{'what':<44}{'MiB':>6}{'ms/batch':>11}{'GB/s':>9}{'share':>8}{'overlap':>9}{'consumer us':>13}")
    for mib in options.mib:
        for row in measure(mib, options.batches, options.rounds, options.device):
            rows.append(row)
            print(
                f"{row.what:<44}{row.batch_mib:>6}{row.seconds * 1e3:>11.3f}"
                f"{_number(row.gigabytes_per_second):>9}{_number(row.share):>8}{_number(row.overlap):>9}"
                f"{_number(row.consumer_us):>13}",
                flush=True,
            )
    print()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": str(torch.__version__), "cuda": torch.version.cuda}
    for row in rows:
        print(json.dumps({**machine, **asdict(row)}))
    return 0


def measure(mib: int, batches: int, rounds: int, device: str) -> Iterator[Row]:
    """All rows for one size of batch."""
    size_bytes = mib * MIB
    backend = open_backend(device)
    transfer = Transfer(backend)
    page_locked = {"x": backend.alloc_pinned((mib, MIB), torch.uint8).zero_()}
    pageable = {"x": torch.zeros((mib, MIB), dtype=torch.uint8)}
    shared = {"x": shared_batch(mib)}

    def row(what: str, seconds: float, **more: float) -> Row:
        return Row(what, mib, seconds, size_bytes / seconds / 1e9, **more)

    def to_device(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"].to(backend.device, non_blocking=batch is page_locked)

    def pinned_to_device(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"].pin_memory().to(backend.device, non_blocking=True)

    def through(batch: dict[str, torch.Tensor]) -> Any:
        return transfer.receive(transfer.send(batch))

    # What the consumer calls for each batch.
    direct: list[tuple[str, Callable[[Any], object], Any]] = [
        ("tensor.to(device), page-locked", to_device, page_locked),
        ("tensor.to(device), pageable", to_device, pageable),
        ("pin_memory().to(device), pageable", pinned_to_device, pageable),
    ]
    # What is called in a thread ahead of the consumer, and what the consumer then calls.
    ahead: list[tuple[str, Callable[[Any], Any], Callable[[Any], object], Any]] = [
        ("Transfer, page-locked", transfer.send, transfer.receive, page_locked),
        ("Transfer, pageable", transfer.send, transfer.receive, pageable),
        ("Transfer, shared", transfer.send, transfer.receive, shared),
    ]
    if (spdl := spdl_transfer()) is not None:
        ahead.append(("SPDL, pageable", spdl, lambda batch: batch, pageable))

    target = torch.empty((mib, MIB), dtype=torch.uint8, device=backend.device)
    bare = per_batch(lambda: target.copy_(page_locked["x"], non_blocking=True), batches, rounds)
    yield row("bare copy, page-locked", bare, share=1.0)
    alone = {}
    for name, _, _, batch in ahead[:3]:
        alone[name] = per_batch(partial(through, batch), batches, rounds)
        yield row(name, alone[name], share=bare / alone[name])
    yield Row("page-locking, shared", mib, page_locking(backend, mib, rounds), None)
    for name, one, batch in direct:
        alone[name] = per_batch(partial(one, batch), batches, rounds)
        yield row(name, alone[name], share=bare / alone[name])
    if spdl is not None:
        alone["SPDL, pageable"] = per_batch(partial(spdl, pageable), batches, rounds)
        yield row("SPDL, pageable", alone["SPDL, pageable"], share=bare / alone["SPDL, pageable"])

    # Kernels that take a little longer than a bare copy, and half a millisecond at least: all of it can be hidden.
    cycles = cycles_for(max(bare * 1.2, 5e-4))
    compute = per_batch(lambda: None, batches, rounds, cycles)
    yield Row("kernels alone", mib, compute, None)
    for name, send, take, batch in ahead:
        costs: list[float] = []
        both = per_epoch(
            partial(on_its_own_thread, backend, send, take, batch, batches, cycles, costs), batches, rounds
        )
        overlap = 1 - (both - compute) / alone[name]
        yield row(f"kernels + {name}", both, overlap=overlap, consumer_us=statistics.median(costs) * 1e6)
    for name, one, batch in direct:
        costs = []
        both = per_batch(partial(timed, costs, one, batch), batches, rounds, cycles)
        overlap = 1 - (both - compute) / alone[name]
        yield row(f"kernels + {name}", both, overlap=overlap, consumer_us=statistics.median(costs) * 1e6)
    transfer.close()
    backend.close()


def shared_batch(mib: int) -> torch.Tensor:
    """A batch of zeros, uint8 [mib, 2**20], as it comes from a worker process."""
    fd = create_file(mib * MIB)
    memory = Mapping(fd, mib * MIB, lockable=True).memory()
    os.close(fd)
    return tensor_over(memory, (mib, MIB), torch.uint8).zero_()


def page_locking(backend: Backend, mib: int, rounds: int) -> float:
    """Seconds that it takes to page-lock shared memory, the median."""
    seconds: list[float] = []
    for _ in range(rounds):
        batch = shared_batch(mib)
        mapping = mapping_of(batch)
        assert mapping is not None
        timed(seconds, backend.page_lock, mapping)
    return statistics.median(seconds)


def spdl_transfer() -> Callable[[Any], Any] | None:
    """SPDL's function that page-locks a batch, copies it on a stream of its own and waits for that; None without SPDL.

    It takes the device that the environment variable LOCAL_RANK names, the first one without it.
    """
    try:
        io: Any = importlib.import_module("spdl.io")
    except ImportError:
        return None
    found: Callable[[Any], Any] | None = getattr(io, "transfer_tensor_h2d", None) or getattr(
        io, "transfer_tensor", None
    )
    return found


def timed(costs: list[float], function: Callable[[Any], object], argument: Any) -> object:
    """`function(argument)`; the seconds of it are appended to `costs`."""
    begin = time.perf_counter()
    result = function(argument)
    costs.append(time.perf_counter() - begin)
    return result


class Consumer:
    """A training loop: kernels that read each batch, and a host that is never more than `AHEAD` steps before them.

    Real loops are held back by what they read from the device, as the loss. Without it all steps would be queued at
    once, and their batches would need memory all at once.
    """

    def __init__(self) -> None:
        self._steps: deque[torch.cuda.Event] = deque()

    def step(self, cycles: int = 0) -> None:
        """Queue kernels of so many cycles, and wait for those of some steps ago."""
        if cycles:
            torch.cuda._sleep(cycles)
        self._steps.append(torch.cuda.Event(blocking=True))
        self._steps[-1].record()
        if len(self._steps) > AHEAD:
            self._steps.popleft().synchronize()


def on_its_own_thread(
    backend: Backend,
    send_one: Callable[[Any], Any],
    take: Callable[[Any], object],
    batch: Any,
    batches: int,
    cycles: int,
    costs: list[float],
) -> None:
    """One epoch as in a loader: a device thread sends, at most `AHEAD` batches ahead, and the consumer takes.

    How many seconds each `take` takes is appended to `costs`. The wait for the device thread is no part of that: it
    shows in the time of the epoch.
    """
    ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(AHEAD)

    def send() -> None:
        backend.init_thread()
        for _ in range(batches):
            room.acquire()
            try:
                ready.put(send_one(batch))
            except BaseException as error:  # raised again by the consumer
                ready.put(error)
                return

    thread = threading.Thread(target=send, name="bench-device", daemon=True)
    thread.start()
    consumer = Consumer()
    for _ in range(batches):
        got = ready.get()
        if isinstance(got, BaseException):
            raise got
        taken = timed(costs, take, got)
        room.release()
        consumer.step(cycles)
        del got, taken
    thread.join()


def per_batch(one: Callable[[], object], batches: int, rounds: int, cycles: int = 0) -> float:
    """Seconds per call of `one` with kernels of so many cycles behind it, device included."""

    def epoch() -> None:
        consumer = Consumer()
        for _ in range(batches):
            batch = one()
            consumer.step(cycles)
            del batch

    return per_epoch(epoch, batches, rounds)


def per_epoch(epoch: Callable[[], object], batches: int, rounds: int) -> float:
    """Seconds per batch of `epoch`, device included; the first round only warms up."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        epoch()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / batches)
    return statistics.median(times[1:])


def cycles_for(seconds: float) -> int:
    """The argument of `torch.cuda._sleep` that keeps this device busy for so long."""
    trial = 20_000_000
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(2):  # the first one starts the clocks up
        begin.record()
        torch.cuda._sleep(trial)
        end.record()
        end.synchronize()
    return max(1, int(trial * seconds / (begin.elapsed_time(end) / 1e3)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
