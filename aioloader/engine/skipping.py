"""Errors that are left out: the rule, and the node that runs it where there is no window to do so.

The rule is a fold that nothing comes out of for an entry that failed. It is the window's own last act where there is
one (`Window.rule`), so that it costs neither a place nor a buffer; after a fold or a source it is a node.
"""

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import LAST, ONE_LOST, Entry, annotate, failed_in, places_of, presentable
from aioloader.core.safe_text import safe_repr
from aioloader.core.skip import Skip
from aioloader.engine.node import Fold, FoldNode, Kick, Node
from aioloader.errors import NothingPassesError, TooManySkippedError
from aioloader.executors.partial import NO_SAMPLES, LeftOut, Partial
from aioloader.executors.threads import Threads, call_loop
from aioloader.insight.meters import StageMeter
from aioloader.insight.skip_report import SkippedError, append

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["SkipNode", "SkipRule", "SkipSamplesRule"]

SHARE_OF: Final = 1000  # samples, the latest, of which `max_share` is a share
SHARE_FROM: Final = 20  # samples: of fewer, one error would be too large a share
_ALL: Final = (1 << SHARE_OF) - 1


class SkipRule(Fold):
    """Leaves failed entries out, up to limits.

    Cursor: that of the entry; how many errors have been left out in this epoch; how many entries came, up to
    `SHARE_OF`; and a number whose bits say which of these failed, the newest one lowest. All errors that came before an
    entry are in its cursor: so they are not tried again after a resume, and the limits go on where they were.

    In an order that is another one each time these numbers are still right, since they are about all that came before,
    whatever it was.

    Args:
        skip: Which errors, and how many.
        epoch: Its number.
        rank: Of this process, for the report; None: there is only one.

    Attributes:
        gaps: See `Node`: something was left out that in another epoch may be there.
        meter: Counts.
    """

    full = False

    def __init__(self, skip: Skip, epoch: int, rank: int | None = None) -> None:
        self._skip = skip
        self._epoch = epoch
        self._rank = rank
        self._skipped = 0
        self._seen = 0
        self._failed = 0  # bits
        self._report = None if skip.path is None else _Report(skip)
        self.gaps = False
        self.meter = StageMeter(skip.label, "fold")

    # -- the fold ----------------------------------------------------------------------------------------------------

    def resume(self, cursor: Any) -> Any:
        upstream, skipped, seen, failed = cursor_parts(cursor, 4)
        self._skipped = as_count(skipped)
        self._seen = as_count(seen, SHARE_OF)
        self._failed = as_count(failed, _ALL)
        return upstream

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, self._skipped, self._seen, self._failed)

    def wants(self, limit: int) -> int:
        return limit

    def feed(self, run: list[Entry]) -> list[Entry]:
        if not [True for entry in run if entry.error is not None]:  # as it mostly is
            return self._all_kept(run)
        return self._some_kept(run)

    def _all_kept(self, run: list[Entry]) -> list[Entry]:
        """The same for samples none of which has failed, at a third of the cost."""
        skipped, seen, failed = self._skipped, self._seen, self._failed
        if seen == SHARE_OF and not failed:
            for entry in run:
                entry.cursor = (entry.cursor, skipped, SHARE_OF, 0)
        else:
            for entry in run:
                if seen < SHARE_OF:
                    seen += 1
                if failed:
                    failed = failed << 1 & _ALL
                entry.cursor = (entry.cursor, skipped, seen, failed)
            self._seen, self._failed = seen, failed
        self.meter.samples += len(run)
        return run

    def _some_kept(self, run: list[Entry]) -> list[Entry]:
        kept = []
        for entry in run:
            if self._keeps(entry):
                entry.cursor = (entry.cursor, self._skipped, self._seen, self._failed)
                kept.append(entry)
        self.meter.samples += len(kept)
        return kept

    def flush(self) -> list[Entry]:
        return []

    # -- in a window -------------------------------------------------------------------------------------------------

    def start(self, run: "Run") -> None:
        """Join a run."""
        self.meter = run.adopt(self.meter)
        if self._report is not None:
            self._report.start(run)

    def leaving(self, run: list[Entry]) -> list[Entry]:
        """What is left of the entries that leave a window; a source that failed is no sample."""
        if not [True for entry in run if entry.state in (LAST, ONE_LOST)]:
            return self.feed(run)
        kept: list[Entry] = []
        samples: list[Entry] = []
        for entry in run:
            if entry.state in (LAST, ONE_LOST):
                kept += self.feed(samples)
                samples = []
                entry.cursor = self.failed_at(entry.cursor)
                kept.append(entry)
            else:
                samples.append(entry)
        return kept + self.feed(samples)

    def close(self) -> None:
        """Nothing comes any more."""
        self.meter.retired = True

    # -- what it decides ---------------------------------------------------------------------------------------------

    def _keeps(self, entry: Entry) -> bool:
        """Whether `entry` goes on: a sample, an error of another type, or an error past a limit."""
        error = entry.error
        if error is None:
            self._came(1)
            return True
        if not self._is_meant(error):
            self._came(1)
            return True
        left_out = LeftOut(0, error, getattr(entry, "seconds", None), entry.attempts)
        too_many = self._leave_out(left_out, entry, entry.key, entry.position, failed_in(entry))
        entry.value = None
        entry.error = too_many  # None, or the traceback would lead from the error to its entry and back
        return too_many is not None

    def _is_meant(self, error: BaseException) -> bool:
        """Whether the consumer would get an error of the kind: never a `KeyboardInterrupt` or `SystemExit`.

        Nor what says that an epoch makes no sense any more: without it, that would go on for ever.
        """
        if isinstance(error, NothingPassesError | TooManySkippedError):
            return False
        return isinstance(error, self._skip.on) or isinstance(presentable(error), self._skip.on)

    def _came(self, good: int) -> None:
        """So many that are no errors of the kind."""
        if self._seen < SHARE_OF:
            self._seen = min(SHARE_OF, self._seen + good)
        if self._failed:
            self._failed = (self._failed << good) & _ALL

    def _leave_out(
        self, left_out: LeftOut, entry: Entry, key: Any, position: int | None, stage: str
    ) -> TooManySkippedError | None:
        """Count an error, and report it; past a limit, the error that takes its place."""
        self._came(1)
        self._failed |= 1
        if (limit := self._passed_limit()) is not None:
            self.meter.errors += 1
            return self._too_many(left_out.error, entry, key, limit)
        self._skipped += 1
        self.meter.skipped += 1
        self.gaps = self.meter.gaps = True
        if self._report is not None:
            self._report.add(
                SkippedError(
                    key=key,
                    epoch=self._epoch,
                    position=position,
                    stage=stage,
                    attempts=left_out.attempts,
                    seconds=left_out.seconds,
                    error=left_out.error,
                    rank=self._rank,
                    when=time.time(),
                )
            )
        return None

    def _passed_limit(self) -> str | None:
        """Which limit another error would pass."""
        skip = self._skip
        if skip.max_errors is not None and self._skipped >= skip.max_errors:
            return f"max_errors={skip.max_errors} have been left out in this epoch already"
        failed = self._failed.bit_count()
        if skip.max_share is not None and self._seen >= SHARE_FROM and failed > skip.max_share * self._seen:
            return f"{failed} of the last {self._seen} samples failed, which is more than max_share={skip.max_share:g}"
        return None

    def _too_many(self, cause: BaseException, entry: Entry, key: Any, limit: str) -> TooManySkippedError:
        error = TooManySkippedError(
            f"{self._skip.label} leaves no more errors out: {limit}; the newest, {safe_repr(cause)} of key "
            f"{safe_repr(key)}, is the cause of this one: mend what it says, or raise the limit; the iterator goes on "
            f"with the samples after it"
        )
        error.__cause__ = cause
        annotate(error, self._skip.label, entry, self._epoch)
        return error


class SkipSamplesRule(SkipRule):
    """The same for batches: samples that could not be loaded are missing in them already, see `Partial`.

    A batch of which nothing is left is left out. A batch that fails as a whole (its samples do not fit together, its
    worker died) is raised in its place: it is no sample.

    Args:
        skip: See `SkipRule`.
        epoch: See there.
        rank: See there.
        batch_size: Of a sampler that gives whole batches, all of this size but the last; None: of any size.
    """

    def __init__(self, skip: Skip, epoch: int, rank: int | None = None, *, batch_size: int | None = None) -> None:
        super().__init__(skip, epoch, rank)
        self._batch_size = batch_size

    def feed(self, run: list[Entry]) -> list[Entry]:
        return self._some_kept(run)

    def _keeps(self, entry: Entry) -> bool:
        if type(entry.value) is not Partial:
            self._came(len(_keys_of(entry)))
            return True
        partial, entry.value = entry.value, None
        keys = _keys_of(entry)
        count = len(keys)
        places = self._places(entry, count)
        after = 0  # the number of the sample that comes next
        for left_out in partial.left_out:
            at = left_out.at
            self._came(at - after)
            after = at + 1
            too_many = self._leave_out(left_out, entry, keys[at], places[at], partial.stage)
            if too_many is not None:
                entry.error = too_many
                return True
        self._came(count - after)
        if partial.batch is NO_SAMPLES:
            return False
        out = {left_out.at for left_out in partial.left_out}
        entry.value = partial.batch
        entry.key = [key for at, key in enumerate(keys) if at not in out]
        entry.places = [place for at, place in enumerate(places) if at not in out]
        if (each := getattr(entry, "begun_each", None)) is not None and len(each) == count:
            entry.begun_each = [begun for at, begun in enumerate(each) if at not in out]
        return True

    def _places(self, entry: Entry, count: int) -> list[int | None]:
        """The positions of the samples of a batch."""
        if (places := places_of(entry)) is not None:
            return list(places)
        if self._batch_size is None or entry.position is None:
            return [None] * count
        first = entry.position * self._batch_size
        return list(range(first, first + count))


def _keys_of(batch: Entry) -> list[Any]:
    """The keys of a batch's samples: a sampler may give them as a list, a range, a tensor."""
    key = batch.key
    return list(key) if isinstance(key, Iterable) and not isinstance(key, str | bytes) else [key]


class SkipNode(FoldNode):
    """Runs the rule over an upstream that is no window."""

    def __init__(self, upstream: Node, rule: SkipRule) -> None:
        super().__init__(upstream, rule)
        self._rule = rule

    @property
    def gaps(self) -> bool:
        return self._rule.gaps or super().gaps

    def start(self, run: "Run", kick: Kick) -> None:
        super().start(run, kick)
        self._rule.start(run)

    def close(self) -> None:
        self._rule.close()
        super().close()


class _Report:
    """Writes lines, in order, in a thread of the run, since a disk may be slow.

    The thread takes all that waits at once, so what waits is no more than comes while one write goes on. Without a
    run, in the consumer's own thread, and once the run is about to end, lines are written at once.
    """

    def __init__(self, skip: Skip) -> None:
        assert skip.path is not None
        self._path = skip.path
        self._waiting: deque[SkippedError] = deque()
        self._writing = threading.Lock()
        self._scheduled = False
        self._warned = False
        self._run: Run | None = None
        self._threads: Threads | None = None

    def start(self, run: "Run") -> None:
        self._run = run

    def add(self, skipped: SkippedError) -> None:
        self._waiting.append(skipped)
        run = self._run
        if run is None:
            self._warn(self._write())
        elif run.stopping:  # its threads may have ended
            self._failed(self._write())
        elif not self._scheduled:
            self._scheduled = True
            if self._threads is None:
                self._threads = run.threads(1, "aioloader-report", computes=False)
            self._threads.submit(self._job)

    def _job(self, broken: BaseException | None) -> None:
        """In the thread. What is added from here on, when it may be too late for this job, begins another one."""
        self._scheduled = False
        failure = self._write()
        run = self._run
        if failure is not None and run is not None:
            call_loop(run.loop, run.guarded, self._failed, failure)

    def _write(self) -> Exception | None:
        """Write all that waits; returns why it could not be."""
        with self._writing:
            skipped = []
            while self._waiting:
                skipped.append(self._waiting.popleft())
            try:
                if skipped:
                    append(self._path, skipped)
            except Exception as error:
                return error
            finally:
                del skipped
        return None

    def _failed(self, failure: Exception | None) -> None:
        """On the loop."""
        self._warn(failure)

    def _warn(self, failure: Exception | None) -> None:
        """Once: an epoch need not end because a disk is full, but nobody shall believe that nothing was left out."""
        if failure is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"skip_errors cannot write its report {str(self._path)!r}: {failure!r}; stats() still counts what is "
                f"left out",
                RuntimeWarning,
                stacklevel=2,
            )
