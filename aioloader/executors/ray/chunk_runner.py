"""What runs chunks inside of actors: one for sync functions, and one for async ones, on the event loop of its actor.

These are no actors themselves: Ray wraps each method of an actor's class, which costs time and shows in tracebacks.
"""

import asyncio
import os
import random
import sys
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import cache
from time import perf_counter
from typing import Any, Final, TypeVar

import torch

from aioloader.core.keys import key_text
from aioloader.core.memory import Alloc
from aioloader.core.seeds import derive_seed
from aioloader.errors import SampleCancelledError
from aioloader.executors.chunk import DROP, NOTHING, Call, ChunkResult, Failed, Refusal, apply_chunk
from aioloader.executors.current_sample import KeyOnly, SampleContext, current_sample
from aioloader.executors.epochs import Copies
from aioloader.executors.processes.failures import BY_VALUE, cannot_travel, portable
from aioloader.executors.processes.segments import use_arena
from aioloader.executors.processes.stacked import stacked
from aioloader.executors.processes.wire import can_pickle_by_value, encode
from aioloader.executors.ray.actors import Place
from aioloader.executors.ray.line import call_back
from aioloader.executors.ray.line_server import is_end, serve_line
from aioloader.executors.ray.program import RayProgram
from aioloader.executors.ray.same_host import Answer, Outbox, Told
from aioloader.executors.ray.values import Packed, pack, unpack
from aioloader.memory.pool import BatchMemory

__all__ = ["AsyncChunkRunner", "ChunkRunner"]

T = TypeVar("T")

NOT_THERE: Final = (
    "the modules of a function must be there on all nodes: install them, or pass "
    "RayWorkers(runtime_env={'py_modules': [...]}), or 'working_dir'"
)


class ChunkRunner:
    """Runs chunks, in the order in which they come.

    Args:
        slot: The number of its actor in its pool.
        place: Where that is.
    """

    def __init__(self, slot: int, place: Place) -> None:
        self._slot = slot
        self._place = place
        self._memory = BatchMemory()
        use_arena(self._memory)
        self._outbox: Outbox | None = None
        self._broken: BaseException | None = None  # raised for the first sample, as in torch
        self._program: RayProgram
        self._copies: Copies

    @property
    def where(self) -> str:
        """It, for texts."""
        return f"Ray worker {self._slot} ({self._place})"

    def load(self, packed: Packed) -> Packed | None:
        """Get ready for the program; returns the error if it cannot be loaded.

        What is in the object store is shared by all of a node, so its tensors are copied: a function may write to them.
        """
        try:
            program: RayProgram = unpack(packed)
        except BaseException as error:
            if not can_pickle_by_value():
                error.add_note(f"aioloader: {BY_VALUE}")
            if isinstance(error, ImportError):
                error.add_note(f"aioloader: {NOT_THERE}")
            return pack(portable(error, f"{self.where}, which loads its functions"))
        torch.set_num_threads(program.threads)
        torch.set_default_dtype(getattr(torch, program.dtype))
        _seed(int.from_bytes(os.urandom(8), "little"))
        self._program = program
        self._copies = Copies([call.fn for call in program.calls], program.epochs)
        if program.prepare is not None:
            try:
                program.prepare(self._slot)
            except BaseException as error:
                self._broken = error
        return None

    def run(self, payload: Packed, told: Told | None = None) -> tuple[Any, ...]:
        """The outcomes of a chunk: `("done", outcomes, busy_seconds, cpu_seconds, timeouts)`, or `("lost", error)`.

        Args:
            payload: The chunk.
            told: From a process on this host, to which results go in segments.
        """
        self._hear(told)
        try:
            chunk = unpack(payload, self._memory.alloc)
        except BaseException as error:
            return "lost", pack(self.refused(error))
        result = self.made(chunk)
        return "done", self._packed(result.outcomes, chunk[-1]), result.busy_seconds, result.cpu_seconds, 0

    def serve(self, name: bytes) -> bool:
        """Run chunks that come over a line, until the process there hangs up; False: it cannot be reached.

        Args:
            name: Of the line.
        """
        try:
            connection = call_back(name)
        except OSError:
            return False
        serve_line(connection, self)
        return True

    def made(self, payload: Any) -> ChunkResult:
        """See `RunsChunks`.

        Raises:
            SystemExit: Ray ends this process. It is no outcome of the sample at hand.
        """
        calls, keys, values = self._open(payload)
        if self._broken is not None:
            return ChunkResult(self._all_broken(), 0.0, 0.0)
        sample = SampleContext()
        seed = calls[0].seed if self._program.seeds_each else None
        named = _named(keys, values, sample, seed)
        result = apply_chunk(calls, named, self._program.budget_seconds, sample=sample)
        for outcome in result.outcomes:
            if type(outcome) is Failed and is_end(outcome.error):
                raise outcome.error
        return result

    def _hear(self, told: Told | None) -> None:
        if told is None:
            return
        if self._outbox is None:
            self._outbox = self._begin_outbox()
        self._outbox.hear(told)

    def _begin_outbox(self) -> Outbox:
        outbox = Outbox()
        use_arena(outbox.arena)  # results are made one at a time: a batch is collated where it is sent from
        return outbox

    def _open(self, payload: Any) -> tuple[list[Call], Sequence[Any], Sequence[Any]]:
        seeds, epochs, keys, values, _ = payload
        try:
            self._copies.tell(epochs)
        except BaseException as error:
            self._broken = self._broken or error
        calls = [replace(call, seed=seed) for call, seed in zip(self._program.calls, seeds, strict=True)]
        return calls, values if keys is None else keys, values

    def refused(self, error: BaseException) -> BaseException:
        """See `RunsChunks`."""
        return portable(error, f"{self.where}, which unpickles samples")

    def _all_broken(self) -> list[Any]:
        broken, self._broken = self._broken, None
        assert broken is not None
        return [Failed(broken, self._program.calls[0].label)]

    def _packed(self, outcomes: list[Any], batch: int) -> Answer:
        if self._outbox is None:
            return self.sent(pack, outcomes, batch, self._memory.alloc)
        return self.sent(self._outbox.pack, outcomes, batch, self._outbox.arena.alloc)

    def sent(self, send: Callable[[Any], T], outcomes: list[Any], batch: int, alloc: Alloc) -> T:
        """See `RunsChunks`."""
        for outcome in outcomes:
            if type(outcome) is Failed:
                outcome.error = portable(outcome.error, self.where)
        try:
            return send(stacked(outcomes, batch, alloc))
        except BaseException as error:
            if is_end(error):
                raise
            return send([self._portable_outcome(outcome) for outcome in outcomes])

    def _portable_outcome(self, outcome: Any) -> Any:
        try:
            encode(outcome)
        except BaseException as error:
            if is_end(error):
                raise
            label = self._program.calls[-1].label
            refused = cannot_travel(f"what {label} returned", error, by_value=can_pickle_by_value())
            return Failed(portable(refused, self.where), label)
        return outcome


class AsyncChunkRunner(ChunkRunner):
    """Awaits chunks on the event loop, several side by side, the samples of each one after the other.

    Ray begins the calls of such an actor in any order; chunks do not depend on each other.
    """

    async def run(self, payload: Packed, told: Told | None = None) -> tuple[Any, ...]:  # type: ignore[override]  # an async one
        """See `ChunkRunner.run`."""
        self._hear(told)
        try:
            chunk = unpack(payload, self._memory.alloc)
        except BaseException as error:
            return "lost", pack(self.refused(error))
        calls, keys, values = self._open(chunk)
        if self._broken is not None:
            return "done", self._packed(self._all_broken(), 0), 0.0, 0.0, 0
        outcomes: list[Any] = []
        timeouts: list[None] = []
        began = perf_counter()
        for key, value in zip(keys, values, strict=True):
            outcomes.append(await self._journey(calls, key, value, timeouts))
            if perf_counter() - began > self._program.budget_seconds:
                break
        return "done", self._packed(outcomes, chunk[-1]), perf_counter() - began, 0.0, len(timeouts)

    def _begin_outbox(self) -> Outbox:
        return Outbox()  # chunks are made side by side: what they make is copied there

    async def _journey(self, calls: Sequence[Call], key: Any, value: Any, timeouts: list[None]) -> Any:
        """The outcome of one sample, in a task of its own: its context variables are, too."""
        context = copy_context()
        sample = SampleContext()
        sample.name = KeyOnly(key)
        context.run(current_sample.set, sample)
        return await asyncio.create_task(self._calls(calls, value, sample, timeouts), context=context)

    async def _calls(self, calls: Sequence[Call], value: Any, sample: SampleContext, timeouts: list[None]) -> Any:
        began = perf_counter()
        for call in calls:
            sample.seed = call.seed
            try:
                result = await self._awaited(call, value, timeouts)
            except (
                BaseException
            ) as error:  # also what ends a program: it is raised in the consumer, and not on the loop
                failure = error
                if isinstance(error, CancelledError):
                    failure = SampleCancelledError(f"{call.label} was cancelled from inside, not by the loader")
                    failure.__cause__ = error
                return Failed(failure, call.label, call.stop, perf_counter() - began)
            if not call.predicate:
                value = result
            elif not result:
                if call.stop is not None:
                    return Refusal(value is None, call.stop)
                return DROP if value is not None else NOTHING
        return value

    async def _awaited(self, call: Call, value: Any, timeouts: list[None]) -> Any:
        timeout = self._program.timeout
        if timeout is None:
            return await call.fn(value)
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await call.fn(value)
        except TimeoutError as error:
            if not limit.expired():
                raise
            timeouts.append(None)
            text = f"{call.label} took longer than {self._program.timeout_name}={timeout:g} s; it was cancelled"
            raise TimeoutError(text) from error


def _named(keys: Sequence[Any], values: Sequence[Any], sample: SampleContext, seed: int | None) -> Iterator[Any]:
    """`values`; each is named in `sample` when it is taken. With a `seed`, the global generators follow from it."""
    for key, value in zip(keys, values, strict=True):
        sample.name = KeyOnly(key)
        if seed is not None:
            _seed(derive_seed(seed, "global", key_text(key)))
        yield value


@cache
def _has_devices() -> bool:
    """Whether torch has an accelerator here."""
    return torch.accelerator.is_available()


def _seed(seed: int) -> None:
    """Seed the global generators.

    Those of devices only where there may be some: for each kind of them `torch.manual_seed` notes who called, which
    takes half a millisecond in all, and this comes before every batch.
    """
    for_torch = torch if _has_devices() else torch.default_generator
    for_torch.manual_seed(seed & (1 << 63) - 1)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & (1 << 32) - 1)
