"""What there is to see of a loader: figures, sentences, a progress bar, a trace and a report of its newest epoch."""

import threading
from abc import abstractmethod
from collections.abc import Callable
from os import PathLike
from textwrap import fill
from time import perf_counter
from typing import Generic

from aioloader.core.checks import check_count, check_positive
from aioloader.core.typevars import T_co
from aioloader.engine.faces import LoaderHooks
from aioloader.engine.pausing import Pauses
from aioloader.engine.progress import Progress
from aioloader.engine.trace import Trace
from aioloader.engine.tracing import Tracer
from aioloader.engine.tuner import Tuner
from aioloader.engine.tuning import Tuning, check_memory
from aioloader.insight.explain import explain
from aioloader.insight.meters import ConsumerMeter, StageMeter
from aioloader.insight.progress_bar import ProgressLoader, Style
from aioloader.insight.report import write_report
from aioloader.insight.stats import Stats, snapshot
from aioloader.insight.stats_table import WIDTH
from aioloader.insight.trace_file import MAX_BYTES

__all__ = ["Watched"]


class Watched(LoaderHooks, Generic[T_co]):
    """A loader as far as it can be looked at. All of it is about the newest epoch, running or over."""

    _kind = "Pipeline"
    _knob = "its concurrency"  # what `explain` advises to raise where threads are the limit

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may ask for the state, in the thread that it has stopped
        self._pauses = Pauses()
        self._meters: list[StageMeter] = []
        self._consumer: ConsumerMeter | None = None
        self._epoch: int | None = None  # of the newest run
        self._before_epochs: list[Callable[[Stats], None]] = []
        self._tracer: Tracer | None = None  # of epochs that begin from now on
        self._trace: Trace | None = None  # its file
        self._tuner: Tuner | None = None  # of epochs from now on

    def _watch(self, progress: Progress, meters: list[StageMeter]) -> None:
        """`stats` is about this epoch from now on."""
        for call in self._before_epochs:
            call(self.stats())
        self._epoch, self._meters, self._consumer = progress.epoch, meters, progress.meter
        progress.meter.began = perf_counter()

    def trace(self, path: str | PathLike[str], *, every: int = 100, max_bytes: int = MAX_BYTES) -> Trace:
        """Write what happens to one sample in `every` to a file for Perfetto, in epochs that begin from now on.

        Stages are tracks and samples slices; there are the waits of the consumer, and all retries, second calls and
        errors. Use it as a `with` (or `async with`) block, or close it; closing the loader closes it, too. The file is
        written as it goes, and complete JSON whenever it has been written. Open it at https://ui.perfetto.dev.

        Args:
            path: The file, which is replaced.
            every: 1: all samples.
            max_bytes: When the file is that large, the trace ends, with a warning.

        Raises:
            OSError: The file cannot be written.
            ValueError: `every` is less than 1.
        """
        hint = "trace(path, every=100) traces one sample in a hundred"
        tracing = Trace(self, path, check_count("every", every, least=1, hint=hint), max_bytes)
        with self._lock:
            before, self._trace = self._trace, tracing
            self._tracer = tracing.tracer
        if before is not None:
            before.close()
        return tracing

    def autotune(
        self,
        *,
        memory_bytes: int | None = None,
        seconds: float = 30.0,
        tell: Callable[[str], object] | None = print,
    ) -> Tuning:
        """Find better values for concurrency, `ahead` and `prefetch` while epochs run.

        It returns at once, and begins in the epoch that is under way, or else in the next one. The search happens in
        your own loop, `for` or `async for`, with the batches that you take at your pace: widths and rooms change while
        it runs, and nothing else. Samples, their order, errors and states are those without it. After `seconds` in
        which batches were taken or waited for, or earlier when no change helps, it says what to write; the loader keeps
        these values for its later epochs. Unless they are better than the values that were written beyond noise, those
        stay.

        ```python
        tuning = loader.autotune(memory_bytes=2 << 30)
        for batch in loader:
            train(batch)
        print(tuning)
        ```

        It changes stages that are awaited or run in threads of the loader. These are left as they are: stages with one
        place, with a `Limit` or an `executor`; what runs in other processes; rooms for which `ahead` or `ahead_bytes`
        was given, and no stage gets more places than these.

        Args:
            memory_bytes: Finished samples and batches take no more, by the running mean of what they weigh; of each
                window there is one in any case. It holds from now on, in all epochs to come, and after the search.
                Default: as without tuning.
            seconds: How long to search, at most.
            tell: Called once with the text at the end, on the event loop of the epoch; None: nobody is told.

        Raises:
            ValueError: `memory_bytes` is less than 1, `seconds` is not positive, or there is nothing to tune.
        """
        limit = check_memory(memory_bytes)
        if (why := self._nothing_to_tune()) is not None:
            raise ValueError(f"autotune changes stages that are awaited or run in threads, but {why}")
        duration = check_positive("seconds", seconds, "autotune(seconds=30) searches for half a minute")
        tuning = Tuning(self, duration, limit, bounded=self._bounded, tell=tell)
        with self._lock:
            before, self._tuner = self._tuner, tuning.tuner
        if before is not None:
            before.stop()
        self._tune_newest(tuning.tuner)
        return tuning

    def _tune_newest(self, tuner: Tuner) -> None:
        """Let `tuner` begin with the newest epoch, if that is under way."""

    def _nothing_to_tune(self) -> str | None:
        """Why `autotune` could change nothing, if that is known."""
        return None

    @property
    def _bounded(self) -> bool:
        """Whether the user has said how much may be ahead, of the whole loader."""
        return False

    def report(self, path: str | PathLike[str]) -> None:
        """Write a page on the newest epoch, running or over: HTML that opens without a network.

        It shows the pipeline with its rooms and rates, how long your loop waited for each of the latest batches, where
        the time of a sample goes, what limits and what to change, errors and what was left out.

        Args:
            path: The file, which is replaced.

        Raises:
            OSError: It cannot be written.
        """
        stats, consumer = self.stats(), self._consumer
        began = 0.0 if consumer is None or consumer.began is None else consumer.began
        waits = [] if consumer is None else [(asked - began, waited) for asked, waited in consumer.latest.copy()]
        write_report(path, repr(self), stats, explain(stats, self._knob), waits)

    @property
    def newest_epoch(self) -> object:
        """Identifies the epoch that `stats` is about; None before the first."""
        return self._consumer

    def before_epochs(self, call: Callable[[Stats], None]) -> None:
        """Call this when the next epochs begin, with the statistics of the one before. It must return at once."""
        self._before_epochs.append(call)

    def progress(self, description: str | None = None, *, style: Style | None = None) -> ProgressLoader[T_co]:
        """This loader with a progress bar: iterate what it returns, by `for` or by `async for`.

        The bar begins where a resumed epoch begins and ends at its end, whether or not its length was known. Batches
        that raise are steps, too.

        Args:
            description: What is written before the bar.
            style: `"tqdm"` or `"rich"`. Default: tqdm, or rich where tqdm is not installed.

        Raises:
            ModuleNotFoundError: Neither is installed; the extra `progress` brings tqdm.
        """
        return ProgressLoader(self, style, description)

    def stats(self) -> Stats:
        """A frozen snapshot of the newest epoch, running or over; zeros before the first."""
        return snapshot(self._epoch, self._meters, self._consumer, paused=bool(self._pauses))

    def explain(self) -> str:
        """What limits the loader, and the numbers that says it: a sentence or two, in lines of at most 100 columns."""
        return fill(explain(self.stats(), self._knob), WIDTH, break_long_words=False, break_on_hyphens=False)

    def _close_trace(self) -> None:
        if self._trace is not None:
            self._trace.close()

    def _forget_trace(self) -> None:
        """The trace, and what is tuned, are those of the parent of this process."""
        self._tracer = self._trace = self._tuner = None

    @property
    @abstractmethod
    def first_step(self) -> int:
        """The number of the batch that the next epoch begins with: 0, unless a state was loaded."""
