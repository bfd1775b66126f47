"""Measures a training loop from inside, and shows its progress."""

import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Protocol


class EpochProgress(Protocol):
    """The progress of one epoch; a tqdm bar has this method."""

    def update(self, batches: int) -> object:
        """Count further batches as done."""


class Meter:
    """Wrap each epoch in `epoch()` and each training step in `step()`; the time between steps is waiting for data.

    Args:
        name: The title of the progress bar.
        epochs: How many epochs there will be.
        samples_per_epoch: How many samples each has.
        batch_size: Samples in a batch; the last one may be smaller.
    """

    def __init__(self, name: str, epochs: int, samples_per_epoch: int, batch_size: int) -> None:
        self._name = name
        self._epochs = epochs
        self._batches = math.ceil(samples_per_epoch / batch_size)
        self._samples = 0
        self._total_s = 0.0
        self._waited_s = 0.0
        self._waiting_since = 0.0
        self._progress: EpochProgress
        self.first_batch_s: float | None = None
        """From the start of the first epoch to its first batch, in seconds."""

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[None]:
        """Measure one epoch, counted from 0."""
        title = f"{self._name}, epoch {epoch + 1}/{self._epochs}"
        with _open_progress(title, self._batches) as self._progress:
            self._waiting_since = started = perf_counter()
            yield
            ended = perf_counter()
            self._waited_s += ended - self._waiting_since
            self._total_s += ended - started

    @contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """Measure the work on one batch with this number of samples."""
        arrived = perf_counter()
        waited_s = arrived - self._waiting_since
        if self.first_batch_s is None:
            self.first_batch_s = waited_s
        self._waited_s += waited_s
        yield
        self._samples += samples
        self._progress.update(1)
        self._waiting_since = perf_counter()

    @property
    def samples_per_s(self) -> float:
        """Samples per second over whole epochs, waiting and training."""
        return self._samples / self._total_s

    @property
    def waited_share(self) -> float:
        """The fraction of all epochs' time, 0 to 1, in which the training loop waited for a batch."""
        return self._waited_s / self._total_s


def _open_progress(title: str, batches: int) -> AbstractContextManager[EpochProgress]:
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            return tqdm(desc=title, total=batches, unit="batch", dynamic_ncols=True)
    return nullcontext(_ProgressLines(title, batches))


class _ProgressLines:
    """Prints a line at each quarter of an epoch, for logs and where tqdm is not installed."""

    def __init__(self, title: str, batches: int) -> None:
        self._title = title
        self._batches = batches
        self._done = 0

    def update(self, batches: int) -> None:
        quarters_before = 4 * self._done // self._batches
        self._done += batches
        if 4 * self._done // self._batches > quarters_before:
            print(f"{self._title}: {self._done}/{self._batches} batches", file=sys.stderr, flush=True)
