"""Runs contenders: epochs by turns, each in the script's own process or in a process of its own, and their memory."""

import gc
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any, Final, Protocol

from aioloader.demo.memory import tree_memory_bytes

__all__ = ["Contender", "Epoch", "Tick", "Timing", "race", "server"]

Tick = Callable[[int], None]
"""Called by an epoch at each batch that came, with the number of its samples."""

Epoch = Callable[[Tick], float | None]
"""One epoch. It calls its argument at each batch; when it returns a number, these are the seconds that count."""

PATIENCE_SECONDS: Final = 300.0
MEMORY_EVERY_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        name: As printed, and as targets name it.
        open: Makes what runs the epochs, once, where they are measured: in a process of its own it is sent there by
            pickle, so it is then a function of a module, or a `functools.partial` of one. Costs that come once in the
            life of a loader (data, processes that stay) belong here, and so do imports of rivals.
        samples: What an epoch must give; one that loses samples is no figure. None: not checked.
        skip: So many samples at the beginning of an epoch do not count as steady: as many as are under way at once,
            where that is much beside an epoch. At least the first batch never counts.
        limit: The bare loop that the others are compared with in the table.
        ours: Not a rival, though neither its name nor a target says so.
        needs: Modules without which it is left out.
    """

    name: str
    open: Callable[[], Epoch]
    samples: int | None = None
    skip: int = 0
    limit: bool = False
    ours: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """One epoch of one contender.

    Attributes:
        first_seconds: Until the first batch.
        epoch_seconds: Of all of it, its end included.
        steady_seconds: Per sample, from the batch that `Contender.skip` says to the last one; of an epoch of a single
            batch, or one that gives its own seconds: those of all of it.
        samples: How many came.
    """

    first_seconds: float
    epoch_seconds: float
    steady_seconds: float
    samples: int


def time_epoch(epoch: Epoch, contender: Contender) -> Timing:
    """Run one epoch. Garbage collection is on, and begins with nothing to do."""
    gc.collect()
    skip = max(1, contender.skip)
    count = counted = 0
    first = start = last = 0.0

    def tick(samples: int) -> None:
        nonlocal count, counted, first, start, last
        last = perf_counter()
        if not count:
            first = last
        if count < skip <= count + samples:
            start, counted = last, -count - samples
        count += samples

    began = perf_counter()
    own = epoch(tick)
    whole = perf_counter() - began
    if contender.samples is not None and count != contender.samples:
        raise RuntimeError(f"{contender.name}: an epoch must give {contender.samples} samples, got {count}")
    counted += count
    if own is not None:
        steady = own / max(1, count)
    elif start and counted > 0:
        steady = (last - start) / counted
    else:
        steady = whole / max(1, count)
    return Timing(first - began if first else whole, whole, steady, count)


def server() -> Any:
    """Starts processes by a server that has imported torch and done nothing else; there is one, whoever asks."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.utils.data", "aioloader", "bench._harness"])
    return context


class Place(Protocol):
    """Where a contender runs."""

    def epoch(self) -> Timing: ...

    def peak_memory(self) -> int | None:
        """Bytes of its process tree at their highest, over one more epoch."""


class Here:
    """In this process."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._epoch: Epoch | None = None

    def epoch(self) -> Timing:
        if self._epoch is None:
            self._epoch = self._contender.open()
        return time_epoch(self._epoch, self._contender)

    def peak_memory(self) -> int | None:
        return None

    def close(self) -> None:
        self._epoch = None
        gc.collect()


class Apart:
    """In a process of its own: what one contender leaves behind (threads, heap, allocator settings) is no other's.

    Args:
        contender: What to run.
        memory: Memory will be asked for: then the process shares no page with others but mapped files.
    """

    def __init__(self, contender: Contender, *, memory: bool) -> None:
        self._name = contender.name
        # A process comes from the server at once; but they share pages.
        context: Any = multiprocessing.get_context("spawn") if memory or sys.platform == "win32" else server()
        self._connection, theirs = context.Pipe()
        usual = multiprocessing.get_start_method()
        self._process = context.Process(target=_serve, args=(theirs, contender, usual), name=f"bench {contender.name}")
        self._process.start()
        theirs.close()

    def epoch(self) -> Timing:
        self._connection.send("epoch")
        if not self._connection.poll(PATIENCE_SECONDS):
            raise RuntimeError(f"{self._name}: no end of an epoch within {PATIENCE_SECONDS:g} s")
        return self._answer()

    def peak_memory(self) -> int | None:
        self._connection.send("epoch")
        peak = 0
        pid = self._process.pid
        while not self._connection.poll(MEMORY_EVERY_SECONDS):
            peak = max(peak, tree_memory_bytes(pid))
        self._answer()
        return max(peak, tree_memory_bytes(pid))

    def _answer(self) -> Timing:
        try:
            answer: Timing | str = self._connection.recv()
        except EOFError:
            self._process.join(5)
            message = f"{self._name}: its process ended with status {self._process.exitcode}"
            raise RuntimeError(message) from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self._name}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _serve(connection: "Connection[Any, Any]", contender: Contender, start_method: str) -> None:
    """In the contender's process: an epoch for each message, until the connection is closed.

    A process that multiprocessing has started takes its own start method for its default, and torch's workers would be
    spawned: seconds to the first batch, and a copy of torch in each. They are to be started as in a user's program.
    """
    multiprocessing.set_start_method(start_method, force=True)
    place = Here(contender)
    while True:
        try:
            connection.recv()
        except EOFError:
            break
        try:
            answer: Timing | str = place.epoch()
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)
    place.close()


@contextmanager
def _open(contenders: Sequence[Contender], *, apart: bool, memory: bool) -> Iterator[dict[str, Place]]:
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        for contender in contenders:
            place = Apart(contender, memory=memory) if apart else Here(contender)
            stack.callback(place.close)
            places[contender.name] = place
        yield places


def race(
    contenders: Sequence[Contender], rounds: int, *, warm_up: int = 1, apart: bool = False, memory: bool = False
) -> tuple[dict[str, list[Timing]], dict[str, int]]:
    """Epochs by turns: A B C, B C A, C A B, ...; a machine that gets slower meanwhile does so for all.

    Returns:
        The timings of each contender, one per round; and the peak memory in bytes of each, when it was asked for.
    """
    names = [contender.name for contender in contenders]
    with _open(contenders, apart=apart, memory=memory) as places:
        for _ in range(warm_up):
            for name in reversed(names):  # as a rule those with processes come last: forking is safest before threads
                places[name].epoch()
        timings: dict[str, list[Timing]] = {name: [] for name in names}
        for number in range(rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:
                timings[name].append(places[name].epoch())
        peaks: dict[str, int] = {}
        if memory:
            for name in names:
                peak = places[name].peak_memory()
                if peak is not None:
                    peaks[name] = peak
    return timings, peaks
