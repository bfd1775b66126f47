"""Deliveries: how the batches of one epoch reach the iterator that asks for them; and the one without any loop."""

from collections.abc import Callable
from time import perf_counter
from typing import Any
from weakref import finalize

from aioloader.core.entry import LAST, Entry, presentable
from aioloader.engine.node import Node
from aioloader.engine.progress import Progress
from aioloader.engine.run import Run
from aioloader.engine.run_protocols import Output, RunTuner
from aioloader.errors import LoaderClosedError

__all__ = ["Delivery", "InlineDelivery", "Receive", "RunDelivery"]

Receive = Callable[[Any], Any]
"""Takes a batch over in the consumer's thread."""


class Delivery:
    """Hands one epoch's batches to one iterator.

    Args:
        progress: Of the epoch.
        receive: Called with each batch in the consumer's thread, if anything must be done there.
    """

    def __init__(self, progress: Progress, receive: Receive | None) -> None:
        self.progress = progress
        self._receive = receive
        self._output: Output | None = None  # where entries wait until they are handed out, if that is measured
        self._in_hand = 0  # batches that `take_ready` took, and nobody has used yet

    def ends_with(self, iterator: object) -> None:
        """Leave nothing behind when `iterator`, which holds this delivery, is dropped without `close`."""

    def start(self) -> None:
        """Begin, once it is known to those who may close it."""

    def tune(self, tuner: RunTuner) -> None:
        """Let `tuner` find better values from now on, if there is anything to change. From any thread."""

    def _hand_out(self, entry: Entry, asked: float) -> Any:
        """The batch of `entry`, or its error, raised."""
        now = asked + self.progress.hand_out(entry, asked)
        if self._output is not None:
            self._output.handed_out(entry, now)
        error, value = entry.error, entry.value
        entry.error = entry.value = None  # an error keeps this frame: it must not keep the error
        if error is None:
            return value if self._receive is None else self._receive(value)
        if entry.state == LAST:
            self.progress.length = None  # a resume tries the source again, so this was no full epoch
        try:
            raise presentable(error)
        finally:
            del error


class InlineDelivery(Delivery):
    """Makes each batch in the consumer's own thread, inside `next`; nothing runs in between.

    Its nodes belong to no run. So it needs no finalizer, and works in a forked child too.
    """

    def __init__(self, node: Node, progress: Progress, receive: Receive | None) -> None:
        super().__init__(progress, receive)
        self._node = node

    def next(self, timeout: float | None, timeout_message: str) -> Any:
        """Make the next batch; no timeout can interrupt that.

        Raises:
            StopIteration: The epoch is over.
        """
        asked = perf_counter()
        progress, me = self.progress, object()
        asking = progress.meter.asking
        asking[me] = asked
        try:
            run = [] if progress.over else self._node.poll(1)
            while run and progress.skipped_steps and progress.is_skipped(run[0]):
                run = self._node.poll(1)
        finally:
            del asking[me]
        if not run:
            progress.over = True
            progress.meter.finish()
            raise StopIteration
        run[0].begun = progress.meter.batches  # all of it happened in here
        return self._hand_out(run[0], asked)

    def close(self) -> None:
        self._node.close()
        self.progress.meter.finish()


class RunDelivery(Delivery):
    """Hands out what a run makes on its event loop."""

    def __init__(self, run: Run, receive: Receive | None) -> None:
        super().__init__(run.progress, receive)
        self.run = run
        self._output = run.output if run.output.measures else None
        run.output.hands_out = True
        self.closed = False
        self._failure_told = False

    def ends_with(self, iterator: object) -> None:
        finalize(iterator, self.run.leave).atexit = False  # the exit hook of `loop_thread` also waits

    def tune(self, tuner: RunTuner) -> None:
        self.run.be_tuned(tuner)

    def _take_failure(self, end: BaseException) -> BaseException:
        """The failure of the run, once; then `end`, so that catching errors and going on comes to an end."""
        if self._failure_told or self.run.failure is None:
            return end
        self._failure_told = True
        return self.run.failure

    def _left_behind(self) -> RuntimeError:
        """The error for a forked child: what it would wait for happens in another process."""
        return RuntimeError(
            "this iterator was begun before a fork and belongs to the parent process: its threads are not here; "
            "iterate the loader again, which begins an epoch of this process"
        )

    def _cut_short(self) -> LoaderClosedError:
        """The error for an epoch that something else ended: it must not look like one that is over."""
        return LoaderClosedError("the loader was closed before this epoch was over; iterate it again for a new one")
