"""`batch` and `unbatch`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aioloader.core.checks import callable_name
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry, annotate, places_of
from aioloader.core.keys import PartKey
from aioloader.core.safe_text import add_note, safe_repr
from aioloader.engine.node import Fold
from aioloader.engine.source import is_async_callable
from aioloader.stages.base import FoldStage, Pass, UnknownLengthError
from aioloader.stages.flow import Flow, Shared

__all__ = ["Batch", "BatchFold", "CollateWith", "Group", "Unbatch", "group_entries"]


class Group:
    """The samples of one batch, before collate.

    Attributes:
        samples: In order.
        keys: What each was loaded by, None where nothing names it.
        places: Where each stands in its source, see `Entry.places`.
        left_over: There are too few of them: they are only loaded, since that may fail, and no batch is made of them.
    """

    __slots__ = ("keys", "left_over", "places", "samples")

    def __init__(self, samples: list[Any], keys: list[Any], places: list[int | None] | None = None) -> None:
        self.samples = samples
        self.keys = keys
        self.places = [] if places is None else places
        self.left_over = False

    def skipped_steps(self, out: list[bool]) -> None:
        """Forget the samples for which `out` is true; the batch's entry shares `keys` and `places`."""
        self.samples = [sample for sample, gone in zip(self.samples, out, strict=True) if not gone]
        self.keys[:] = [key for key, gone in zip(self.keys, out, strict=True) if not gone]
        self.places[:] = [place for place, gone in zip(self.places, out, strict=True) if not gone]


@dataclass(frozen=True)
class CollateWith:
    """How groups become batches, in the window behind their fold.

    Args:
        fn: From a list of samples to a batch, sync or async; None: torch's default collate.
        workers: Batches collated side by side; None: as many as usable cores.
        initializer: Called in each thread with its number.
    """

    fn: Callable[[list[Any]], Any] | None = None
    workers: int | None = None
    initializer: Callable[[int], None] | None = None

    @property
    def is_async(self) -> bool:
        """Whether `fn` is awaited on the loop."""
        return self.fn is not None and is_async_callable(self.fn)

    @property
    def label(self) -> str:
        """The name of the step."""
        return f"collate({callable_name(self.fn)})" if self.fn is not None else "collate"


@dataclass(frozen=True)
class Batch(FoldStage):
    """Groups of `batch_size` samples, which a window then collates.

    Cursor: that of the last sample. A group with a failed sample fails with that sample's error, and the next group
    begins where it would have begun: batches do not shift.

    Args:
        batch_size: Samples.
        drop_last: Leave out a shorter one at the end of the source.
        collate: How a group becomes a batch.
        max_wait: Seconds after which a group is given as it is, counted from its first sample; None: when it is full.
    """

    batch_size: int
    drop_last: bool = False
    collate: CollateWith = field(default_factory=CollateWith)
    max_wait: float | None = None

    exact_in_any_order = True

    @property
    def same_each_epoch(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.max_wait is None

    @property
    def label(self) -> str:
        return f"batch({self.batch_size}{'' if self.max_wait is None else f', max_wait={self.max_wait:g}'})"

    def length(self, upstream: int) -> int:
        if self.max_wait is not None:
            raise UnknownLengthError(f"{self.label} gives as many batches as the time between samples makes of them")
        return upstream // self.batch_size if self.drop_last else -(-upstream // self.batch_size)

    def shape(self) -> dict[str, Any]:
        return {"stage": "batch", "batch_size": self.batch_size, "drop_last": self.drop_last}

    def flow(self, before: Flow) -> Flow:
        after = before.closed()
        if self.max_wait is not None:
            after = replace(
                after.limited(Shared.SAME_RANK, self.label),
                timed=after.timed or self.label,
                rank_order=after.rank_order or self.label,
            )
        batch_size = (after.batch_size or 1) * self.batch_size
        return replace(after, batch_size=batch_size, steady=after.steady and not self.drop_last)

    def fold(self, this_pass: Pass) -> "BatchFold":
        return BatchFold(self.batch_size, drop_last=self.drop_last)


class BatchFold:
    """Groups a fixed number of samples.

    Args:
        batch_size: How many.
        drop_last: Leave out a shorter group at the end.
        of_keys: The samples are not loaded yet: such a group is given all the same, see `Group.left_over`.
    """

    full = False

    def __init__(self, batch_size: int, *, drop_last: bool, of_keys: bool = False) -> None:
        self._size = batch_size
        self._drop_last = drop_last
        self._of_keys = of_keys
        self._pending: list[Entry] = []
        self._count = 0
        self._after: Any = None  # the cursor of the last group

    def resume(self, cursor: Any) -> Any:
        self._after = cursor
        return cursor

    def failed_at(self, cursor: Any) -> Any:
        return self._after if self._drop_last else cursor  # what was dropped would belong to the next group

    def wants(self, limit: int) -> int:
        return limit * self._size - len(self._pending)

    def feed(self, run: list[Entry]) -> list[Entry]:
        pending, size = self._pending, self._size
        pending.extend(run)
        groups = []
        start = 0
        while len(pending) - start >= size:
            groups.append(self._group(pending[start : start + size]))
            start += size
        del pending[:start]
        return groups

    def flush(self) -> list[Entry]:
        pending, self._pending = self._pending, []
        if not pending:
            return []
        left_over = self._drop_last and all(entry.error is None for entry in pending)  # no error is dropped in silence
        if left_over and not self._of_keys:
            return []
        group = self._group(pending)
        if left_over:
            group.value.left_over = True
        return [group]

    def interrupt(self) -> list[Entry]:
        return [] if self._drop_last else self.cut()  # all are to be full: these wait for more

    @property
    def waiting(self) -> int | None:
        """The number of the group that waits for more samples."""
        return self._count if self._pending else None

    def cut(self) -> list[Entry]:
        """The group that waits, as it is."""
        pending, self._pending = self._pending, []
        return [self._group(pending)] if pending else []

    def _group(self, entries: list[Entry]) -> Entry:
        group = group_entries(entries)
        self._count += 1
        self._after = group.cursor
        return group


def group_entries(entries: list[Entry]) -> Entry:
    """One entry of many. The first error among them is its error; the note names how many others there are."""
    samples = [entry.value for entry in entries]
    keys = [entry.key for entry in entries]
    places = [entry.position for entry in entries]
    group = Entry(Group(samples, keys, places), entries[-1].cursor, keys, entries[0].position)
    group.places = places
    if attempts := [entry.attempts for entry in entries if entry.attempts > 1]:
        group.attempts = max(attempts)
    failed = [entry for entry in entries if entry.error is not None]
    if failed:
        group.value = None
        group.error = first = failed[0].error
        others = [entry for entry in failed if entry.error is not first]
        if first is not None and others:
            named = "; ".join(f"key {safe_repr(entry.key)}: {safe_repr(entry.error)}" for entry in others[:3])
            add_note(first, f"aioloader: {len(others)} more samples of this batch failed: {named}")
        for entry in failed:  # the traceback of an error may lead back to its entry
            entry.error = None
        del entry, first, others
    return group


@dataclass(frozen=True)
class Unbatch(FoldStage):
    """The samples of each batch, one by one. Cursor: that *before* the batch, and how many of its samples are out.

    A tensor or array gives its rows, a tuple or mapping of them gives tuples and mappings of rows, a list gives its
    items; but behind a default collate, which makes lists of tuples, a list is taken apart as a tuple is.

    Args:
        collated: The batches come from the default collate.
    """

    collated: bool

    same_each_epoch = True

    @property
    def label(self) -> str:
        return "unbatch()"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError("unbatch() gives as many samples as the batches turn out to hold")

    def shape(self) -> dict[str, Any]:
        return {"stage": "unbatch"}

    def flow(self, before: Flow) -> Flow:
        # A batch that the default collate has made has as many rows as samples; others may have any number.
        shared = Shared.SAME_WORLD if self.collated else Shared.SAME_RANK
        return replace(before.counted().limited(shared, self.label).closed(), batch_size=None)

    def fold(self, this_pass: Pass) -> Fold:
        return _UnbatchFold(self.collated, this_pass.epoch)


class _UnbatchFold:
    full = False

    def __init__(self, collated: bool, epoch: int) -> None:
        self._collated = collated
        self._epoch = epoch
        self._before: Any = None
        self._skipped = 0  # samples of the first batch that were delivered before a resume

    def resume(self, cursor: Any) -> Any:
        self._before, skipped = cursor_parts(cursor, 2)
        self._skipped = as_count(skipped)
        return self._before

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, 0)

    def wants(self, limit: int) -> int:
        return 1  # a batch holds more than one sample, as a rule

    def feed(self, run: list[Entry]) -> list[Entry]:
        out: list[Entry] = []
        for entry in run:
            after = entry.cursor
            samples: Sequence[Any] = ()
            if entry.error is None:
                try:
                    samples = _rows(entry.value, self._collated)
                except (TypeError, ValueError) as error:
                    annotate(error, "unbatch()", entry, self._epoch)
                    entry.error = error
                    entry.value = None
            if entry.error is not None:
                entry.cursor = (after, 0)  # nothing of what comes after it
                out.append(entry)
            elif samples:
                names = _names_of_rows(entry, len(samples))
                for number in range(self._skipped, len(samples)):
                    key, position = names[number]
                    out.append(entry.derived(samples[number], (self._before, number + 1), key, position))
            self._before = after
            self._skipped = 0
        return out

    def flush(self) -> list[Entry]:
        return []


def _names_of_rows(batch: Entry, count: int) -> list[tuple[Any, int | None]]:
    """Key and position of each of `count` samples: those that were put into the batch, if it still has as many."""
    key = batch.key
    if type(key) is list and len(key) == count:
        return list(zip(key, places_of(batch) or [batch.position] * count, strict=True))
    while type(key) is list and key:
        key = key[0]  # a batch is named by its first sample
    return [(PartKey(key, number), batch.position) for number in range(1, count + 1)]


def _rows(batch: Any, collated: bool) -> Sequence[Any]:
    """The samples of `batch`."""
    if isinstance(batch, torch.Tensor):
        if batch.ndim == 0:
            raise ValueError("unbatch() needs a batch dimension, got a tensor without dimensions")
        return list(batch.unbind(0))
    if isinstance(batch, Mapping):
        columns = {key: _rows(column, collated) for key, column in batch.items()}
        return [dict(zip(columns, row, strict=True)) for row in _across(list(columns.values()))]
    if isinstance(batch, tuple) or (collated and isinstance(batch, list) and not _leaf(batch)):
        rows = _across([_rows(column, collated) for column in batch])
        if hasattr(batch, "_fields"):
            return [type(batch)(*row) for row in rows]
        return rows
    if isinstance(batch, str | bytes) or not (isinstance(batch, Sequence) or hasattr(batch, "__array__")):
        raise TypeError(
            f"unbatch() takes tensors, arrays, lists, and tuples and mappings of them, got {type(batch).__name__}; "
            f"use flat_map(fn) with a function that gives the samples"
        )
    return list(batch)


def _leaf(batch: list[Any]) -> bool:
    """A list of strings is a column as the default collate leaves it, not a structure of columns."""
    return not batch or isinstance(batch[0], str | bytes)


def _across(columns: list[Sequence[Any]]) -> list[tuple[Any, ...]]:
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise ValueError(f"unbatch() needs columns of one length, got {[len(column) for column in columns]}")
    return list(zip(*columns, strict=True))
