"""Pauses: while a loader is paused no sample begins, and those that are under way go on.

    Paused     one block of the user's, in any thread, on any loop
    Pauses     a loader's: who is in a block, and which runs there are
    RunPause   a run's, on its loop: what pauses in it, and who waits for that
    Pausable   windows in which samples begin, sources, and what stands for another process

A sample has begun when the first step of its window has taken it. What waits for that step has not, and is set aside
(`Step.hold`). What is past it goes on through the later steps, or a run would never come to rest.

The story of a block. It is noted in `Pauses` first, then each run that there is by then is asked on its own loop, which
answers when it is *quiet* (no sample begins any more) or *still* (none is under way either). A run that begins later
finds the note before it starts a node. One that is ending is still when it has ended: calls that were cancelled clean
up, and those in threads go on. A run answers at once if it is over, and also when it is lost: what is to answer does so
when it is thrown away, as it is when a loop is closed or a run is collected.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol
from weakref import WeakSet

from aioloader.core.forks import tell_of_fork
from aioloader.executors.threads import call_loop

__all__ = ["Pausable", "Paused", "Pauses", "RunPause", "Told"]


class Pausable(Protocol):
    """What pauses with its run."""

    @property
    def closed(self) -> bool:
        """Whether it is over: no sample begins any more. It counts until it is `still`."""

    @property
    def quiet(self) -> bool:
        """Paused: whether no sample begins any more. `RunPause.look` is to be called when this changes."""

    @property
    def still(self) -> bool:
        """Paused and quiet, or closed: whether none is under way either."""

    def pause(self) -> None:
        """Begin no sample."""

    def go_on(self) -> None:
        """Begin samples again."""


class PausableRun(Protocol):
    """A run, as far as a pause needs it; see `Run`."""

    loop: asyncio.AbstractEventLoop
    pausing: "RunPause"
    stopping: bool
    foreign: bool

    def guarded(self, callback: Callable[..., None], *args: Any) -> None: ...


class Told:
    """Calls `fn` once: when it is called, or when nobody is left to call it. In any thread."""

    def __init__(self, fn: Callable[[], None]) -> None:
        self._fn: Callable[[], None] | None = fn

    def __call__(self) -> None:
        fn, self._fn = self._fn, None
        if fn is not None:
            fn()

    @property
    def done(self) -> bool:
        """Whether it has been called."""
        return self._fn is None

    def __del__(self) -> None:
        self()


class Pauses:
    """The blocks in which one loader is paused, and its runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may pause, too
        self._blocks: dict[object, int] = {}  # with the thread that entered each
        self._runs: WeakSet[PausableRun] = WeakSet()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: of the blocks, only those of the thread that forked will be left here."""
        self._lock = threading.RLock()
        self._runs = WeakSet()
        self._blocks = {block: thread for block, thread in self._blocks.items() if thread == threading.get_ident()}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def watch(self, run: PausableRun) -> None:
        """Pause `run`, too."""
        with self._lock:
            self._runs.add(run)

    def enter(self) -> tuple[object, list[PausableRun]]:
        """Begin a block; returns it, and the runs that are to be asked."""
        block = object()
        with self._lock:
            self._blocks[block] = threading.get_ident()
            return block, list(self._runs)

    def leave(self, block: object) -> None:
        """End it."""
        with self._lock:
            self._blocks.pop(block, None)
            runs = [] if self._blocks else list(self._runs)
        for run in runs:
            run.pausing.blocks_changed()


class RunPause:
    """Whether samples of a run begin. On its loop, unless something else is said.

    Args:
        run: It.
        pauses: Those of its loader.

    Attributes:
        paused: No sample begins.
    """

    def __init__(self, run: PausableRun, pauses: Pauses) -> None:
        self.paused = False
        self._run = run
        self._pauses = pauses
        self._members: list[Pausable] = []
        self._waiting: list[tuple[bool, Told]] = []  # who asked, and whether for all to be still
        self._thread: int | None = None  # that of its loop
        self._attached = False
        self._over = False
        self._exempts = False
        pauses.watch(run)

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def here(self) -> bool:
        """Whether this is the thread of the run's loop, which cannot be waited for here."""
        if not self._attached or self._over:
            return False
        loop = self._run.loop
        if asyncio._get_running_loop() is loop:
            return True
        return self._thread == threading.get_ident() and not loop.is_running()

    def ask(self, told: Told, *, drain: bool) -> None:
        """Call `told` when no sample begins in this run any more, since there is a block.

        Args:
            told: In any thread; maybe at once.
            drain: Not before none is under way either.
        """
        if not self._attached or self._over or self._run.foreign:  # not yet: it will begin paused
            told()
        else:
            self._on_loop(partial(self._asked, told, drain))

    def blocks_changed(self) -> None:
        """A block has ended."""
        if self._attached and not (self._over or self._run.foreign):
            self._on_loop(self.settle)

    def _on_loop(self, callback: Callable[[], None]) -> None:
        """Call it there: now, if this is the thread of that loop, even if it stands still."""
        loop = self._run.loop
        if loop.is_closed():
            return
        if self.here:
            self._run.guarded(callback)
        else:
            call_loop(loop, self._run.guarded, callback)

    # -- the life of the run -----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """The run has a loop; in the consumer's thread."""
        self._attached = True
        if asyncio._get_running_loop() is self._run.loop:
            self._thread = threading.get_ident()

    def begin(self) -> None:
        """The run begins, paused if there is a block."""
        self._thread = threading.get_ident()
        self.settle()

    def stop(self) -> None:
        """It ends: nothing begins any more, and what is under way is cancelled, or waited for."""
        self._answer(quiet=True, still=False)

    def end(self) -> None:
        """It has ended."""
        self._over = True
        self._members.clear()
        self._answer(quiet=True, still=True)

    def join(self, member: Pausable) -> None:
        """`member` is a part of the run that pauses."""
        if self._exempts or self._over:
            return
        # An endless `repeat` comes here for ever.
        self._members = [one for one in self._members if not (one.closed and one.still)]
        self._members.append(member)
        if self.paused:
            member.pause()

    @contextmanager
    def exempt(self) -> Iterator[None]:
        """What joins in this block works for samples that are under way: it does not pause."""
        self._exempts, before = True, self._exempts
        try:
            yield
        finally:
            self._exempts = before

    # -- pauses ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Pause or go on, as the blocks say."""
        wanted = bool(self._pauses)
        if self._over or self._run.stopping or wanted == self.paused:
            return
        self.paused = wanted
        if not wanted:
            self._answer(quiet=True, still=True)  # they have left their blocks
        for member in list(self._members):
            if wanted:
                member.pause()
            else:
                member.go_on()

    def _asked(self, told: Told, drain: bool) -> None:
        if self._over or (self._run.stopping and not drain):
            told()
            return
        self._waiting.append((drain, told))
        self.settle()
        self.look()

    def look(self) -> None:
        """Something may have come to rest."""
        if self._waiting and self.paused and not self._run.stopping:  # `end` will say so
            quiet = all(member.closed or member.quiet for member in self._members)
            self._answer(quiet=quiet, still=quiet and all(member.still for member in self._members))

    def _answer(self, *, quiet: bool, still: bool) -> None:
        waiting, self._waiting = self._waiting, []
        for drain, told in waiting:
            if still or (quiet and not drain):
                told()
            else:
                self._waiting.append((drain, told))


class Paused:
    """The block that `Loader.paused` gives, for `with` and for `async with`; may be entered more than once.

    Args:
        pauses: Those of the loader.
        drain: Wait until no sample is under way.
    """

    def __init__(self, pauses: Pauses, *, drain: bool) -> None:
        self._pauses = pauses
        self._drain = drain
        self._entered: list[object] = []

    def __enter__(self) -> "Paused":
        runs = self._enter()
        arrived: SimpleQueue[None] = SimpleQueue()
        try:
            count = len(runs)
            while runs:
                self._ask(runs.pop().pausing, Told(partial(arrived.put, None)))
            for _ in range(count):
                arrived.get()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave()

    async def __aenter__(self) -> "Paused":
        loop = asyncio.get_running_loop()
        runs = self._enter()
        try:
            arrivals = [loop.create_future() for _ in runs]
            for arrival in arrivals:
                runs.pop().pausing.ask(Told(partial(call_loop, loop, _complete, arrival)), drain=self._drain)
            for arrival in arrivals:
                await arrival
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._leave()

    def _ask(self, pausing: RunPause, told: Told) -> None:
        """Ask a run from a thread that is going to wait; keeps no hold of it: if it is lost, it answers by that.

        Raises:
            RuntimeError: The wait would be for this very thread.
        """
        here = pausing.here
        if not (here and self._drain):
            pausing.ask(told, drain=self._drain)
        if here and not told.done:
            call = f"loader.paused({'drain=True' if self._drain else ''})"
            raise RuntimeError(
                f"`with {call}` waits for samples that are under way on the event loop of this very thread, or for "
                f"processes that answer there, and neither could go on meanwhile; write `async with {call}`"
            )

    def _enter(self) -> list[PausableRun]:
        block, runs = self._pauses.enter()
        self._entered.append(block)
        return runs

    def _leave(self) -> None:
        self._pauses.leave(self._entered.pop())


def _complete(arrival: "asyncio.Future[None]") -> None:
    if not arrival.done():
        arrival.set_result(None)
