"""Samples that a filter refuses one after the other: where they are too many, the epoch would never end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aioloader.core.address import Address
from aioloader.core.cursors import as_count
from aioloader.core.entry import DONE, DROPPED, Entry, annotate, stop_of
from aioloader.core.safe_text import safe_repr
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.step_protocols import StepWindow
from aioloader.errors import NothingPassesError
from aioloader.executors.chunk import Stop
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.ops import Op
    from aioloader.engine.run import Run

__all__ = ["InARow", "counted"]


class InARow:
    """Counts, for filters of one window, what each has refused in a row; the sample that is one too many fails.

    Counted is in the order in which samples leave the window, so that it does not depend on which of them was looked at
    first. A filter's count begins anew when a sample passes it, whatever happens to that sample later, and when it has
    failed one. Samples that fail before they come to it say nothing about it.

    A resume goes on after a sample that was kept, where all counts are 0, or after one that failed, where they may be
    anything: the cursor of such a one holds them. In completion order it does not, since other samples would be in a
    row then.

    Args:
        filters: In the order of the steps.
        in_cursors: Cursors hold the counts.
    """

    def __init__(self, filters: "Sequence[Op]", *, in_cursors: bool) -> None:
        self._filters = filters
        self._in_cursors = in_cursors
        self._row = filters[0].address
        self._mark = "in a row " + ".".join(map(str, self._row))
        self._counts = [0] * len(filters)
        self._most = [op.max_dropped_in_a_row or 0 for op in filters]

    def resume(self, cursor: Any) -> Any:
        """Go on after the sample with `cursor`; returns the cursor for the nodes before."""
        size = len(self._counts)
        held = isinstance(cursor, list | tuple) and len(cursor) == 2 + size and cursor[0] == self._mark
        if not held:
            return cursor
        self._counts = [as_count(count) for count in cursor[2:]]
        return cursor[1]

    def start(self, run: "Run", window: StepWindow, meters: Sequence[StageMeter]) -> None:
        """Begin.

        Args:
            run: What the window is part of.
            window: It.
            meters: Of its steps.
        """
        self._run = run
        self._window = window
        self._meters = meters

    def leave(self, entries: list[Entry]) -> int:
        """Count `entries`, which leave in this order; returns how many of those that were dropped fail instead."""
        counts, most, row = self._counts, self._most, self._row
        none = [0] * len(counts)
        failed = 0
        for entry in entries:
            if entry.error is None and entry.state != DROPPED:
                counts[:] = none
                continue
            stop: Stop | None = stop_of(entry)
            if stop is not None and stop.row == row:
                _, passed, refuses = stop
                if passed:
                    counts[:passed] = none[:passed]
                if refuses and entry.state == DROPPED:
                    counts[passed] += 1
                    if counts[passed] > most[passed]:
                        self._fail(entry, passed)
                        failed += 1
            if entry.error is not None and self._in_cursors and any(counts):
                entry.cursor = (self._mark, entry.cursor, *counts)
        return failed

    def _fail(self, entry: Entry, number: int) -> None:
        """`entry` is one too many for filter `number`."""
        op, count = self._filters[number], self._counts[number]
        error = NothingPassesError(
            f"{op.label} has refused {count:,} samples in a row, the last one with key {safe_repr(entry.key)}, and "
            f"max_dropped_in_a_row={self._most[number]} allows no more; look at what it gets and why it refuses that, "
            f"or allow more"
        )
        self._counts[number] = 0
        annotate(error, op.label, entry, self._run.epoch)
        entry.error = error
        entry.state = DONE
        entry.since = self._window.now
        meter = max((meter for meter in self._meters if meter.address <= op.address), key=_address)
        meter.errors += 1
        self._window.failed()


def _address(meter: StageMeter) -> Address:
    return meter.address


def counted(ops: "list[Op | CacheOp]", *, in_cursors: bool) -> "tuple[list[Op | CacheOp], InARow | None]":
    """`ops`, with what they say of samples that end there, and who counts; as they are where no filter has a limit.

    A cache does not remember which of the filters before it had refused a sample. Where there is one, it was that;
    where there are several, what was found to be refused counts for none of them.
    """
    filters = [op for op in ops if not isinstance(op, CacheOp) and op.max_dropped_in_a_row is not None]
    if not filters:
        return ops, None
    row = filters[0].address
    stops: list[Stop] = []
    refusing: list[Stop] = []
    passed = 0
    for op in ops:
        if isinstance(op, CacheOp):
            stops.append(refusing[0] if len(refusing) == 1 else Stop(row, 0, counts=False))
            continue
        stops.append(Stop(row, passed, counts=op.max_dropped_in_a_row is not None))
        passed += stops[-1].counts
        if op.predicate:
            refusing.append(stops[-1])
    return [replace(op, stop=stop) for op, stop in zip(ops, stops, strict=True)], InARow(filters, in_cursors=in_cursors)
