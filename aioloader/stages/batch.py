"""`batch` and `unbatch`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aioloader.core.checks import callable_name, is_async_callable
from aioloader.core.cores import usable_cores
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry, annotate, begun_each_of, places_of
from aioloader.core.keys import PartKey
from aioloader.core.memory import Alloc
from aioloader.engine.fuse import FusedOps
from aioloader.engine.node import Fold, FoldNode, TimedFoldNode
from aioloader.engine.ops import Op
from aioloader.executors.partial import over_partial, over_partial_async
from aioloader.stages.base import Builder, Evenness, FoldStage, Pass, UnknownLengthError
from aioloader.stages.collate import Collate, torchs_alone
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.group import group_entries
from aioloader.stages.load import CollateAny, CollateAsync, FetchBatch, FetchGroup, is_light
from aioloader.stages.packed import Packed, unpack

__all__ = ["Batch", "BatchFold", "CollateWith", "Unbatch"]


@dataclass(frozen=True)
class CollateWith:
    """How groups become batches, in the window after their fold.

    Args:
        fn: From a list of samples to a batch, sync or async; None: torch's default collate.
        workers: Batches collated side by side; None: as many as usable cores.
        initializer: Called in each thread with its number.
        partial: Some samples of a group may be left out, see `Partial`.
    """

    fn: Callable[[list[Any]], Any] | None = None
    workers: int | None = None
    initializer: Callable[[int], None] | None = None
    partial: bool = False

    @property
    def is_async(self) -> bool:
        """Whether `fn` is awaited on the loop."""
        return self.fn is not None and is_async_callable(self.fn)

    @property
    def label(self) -> str:
        """The name of the step."""
        return f"collate({callable_name(self.fn)})" if self.fn is not None else "collate"

    def op(self, alloc: Alloc | None, *, sole: bool = False) -> Op:
        """What does it; for `alloc` and `sole` see `Collate`."""
        fn: Callable[[Any], Any]
        if self.fn is None:
            fn = CollateAny(None, Collate(alloc, sole=sole))
        else:
            fn = CollateAsync(self.fn) if self.is_async else CollateAny(self.fn)
        if self.partial:
            fn = over_partial_async(fn) if self.is_async else over_partial(fn)
        if self.fn in (list, tuple):
            return Op(fn, self.label, concurrency=1, in_place=True)
        return Op(
            fn,
            self.label,
            self.is_async,
            self.workers or usable_cores(),
            light=is_light if self.fn is None and self.initializer is None and torchs_alone() else None,
            initializer=self.initializer,
            thread_name="aioloader-collate",
        )

    def build(self, builder: Builder, checks: Sequence[Op], *, sole: bool = False) -> None:
        """Collate the groups that `builder.node` gives, after `checks` of `FusedOps`; for `sole` see `Collate`."""
        builder.fused = FusedOps(batches=True)
        for op in (*checks, self.op(builder.alloc, sole=sole)):
            builder.fused.add(op)


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
    passes = True
    batches = True
    part_by_part = True

    @property
    def gathers(self) -> int:  # type: ignore[override]  # a plain attribute where it is always one
        return self.batch_size

    @property
    def same_each_epoch(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.max_wait is None

    @property
    def only_reads(self) -> bool:  # type: ignore[override]
        return self.collate.fn is None  # the default puts samples straight into the batch

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.collate.fn,)

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
        steady = after.steady and not self.drop_last
        return replace(after, batch_size=batch_size, steady=steady, collated=self.collate.fn is None)

    def keeping_last(self) -> "Batch":
        return replace(self, drop_last=False) if self.drop_last else self

    def fold(self, this_pass: Pass) -> "BatchFold":
        return BatchFold(self.batch_size, drop_last=self.drop_last)

    def build(self, builder: Builder) -> None:
        if self._build_of_keys(builder):
            return
        checks = builder.fused.checks
        node, fold = builder.close(), self.fold(builder.this_pass)
        sole = False
        if self.max_wait is None:
            builder.node = FoldNode(node, fold)
            # A device takes batches from page-locked memory, and a user's function expects samples.
            default = self.collate.fn is None and torchs_alone()
            sole = default and builder.transfer is None and node.feeds_batches(self.batch_size)
        else:
            builder.node = TimedFoldNode(node, fold, self.max_wait, self.label)
        self.collate.build(builder, checks, sole=sole)

    def _build_of_keys(self, builder: Builder) -> bool:
        """Of a dataset that loads many samples at once: batch the keys, and load and collate a batch in one step.

        Cursors are as they would be otherwise. False: something else is done to single samples before, or the batch
        cannot be made that way.
        """
        ops, collate = builder.fused.ops, self.collate
        load = ops[0] if builder.flow.by_key and len(ops) == 1 else None
        if not isinstance(load, Op) or load.many is None or load.bounded:
            return False
        if collate.is_async or self.max_wait is not None:
            return False
        fold = BatchFold(self.batch_size, drop_last=self.drop_last, of_keys=True)
        builder.node = FoldNode(builder.node, fold)
        fetch = FetchGroup(FetchBatch(load.dataset, collate.fn, Collate(builder.alloc)))
        width = collate.workers or (usable_cores() if load.flexible else load.concurrency)
        builder.fused = FusedOps(batches=True)
        builder.fused.add(
            replace(load, fn=fetch, concurrency=width, thread_name="aioloader-fetch", many=None, flexible=False)
        )
        return True


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

    def resume(self, cursor: object) -> Any:
        self._after = cursor
        return cursor

    def failed_at(self, cursor: object) -> Any:
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

    def gathers(self, size: int) -> tuple[int, int]:
        """See `Gathers`."""
        each = size // self._size
        return each, each * len(self._pending)

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


@dataclass(frozen=True)
class Unbatch(FoldStage):
    """The samples of each batch, one by one. Cursor: that *before* the batch, and how many of its samples are out.

    A tensor or array gives its rows, a tuple or mapping of them gives tuples and mappings of rows, a list gives its
    items; but after a default collate, which makes lists of tuples, a list is taken apart as a tuple is. A batch of
    `Packed` rows gives the rows, and a row its documents.

    Args:
        collated: The batches come from the default collate.
    """

    collated: bool

    same_each_epoch = True
    part_by_part = True

    @property
    def label(self) -> str:
        return "unbatch()"

    @property
    def evenness(self) -> Evenness:
        return "kept" if self.collated else "lost"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError("unbatch() gives as many samples as the batches turn out to hold")

    def shape(self) -> dict[str, Any]:
        return {"stage": "unbatch"}

    def flow(self, before: Flow) -> Flow:
        # A batch that the default collate has made has as many rows as samples; others may have any number.
        shared = Shared.SAME_WORLD if self.collated else Shared.SAME_RANK
        return replace(before.counted().limited(shared, self.label).closed(), batch_size=None, one_a_step=False)

    def fold(self, this_pass: Pass) -> Fold:
        return _UnbatchFold(self.collated, this_pass.epoch)


class _UnbatchFold:
    full = False

    def __init__(self, collated: bool, epoch: int) -> None:
        self._collated = collated
        self._epoch = epoch
        self._before: Any = None
        self._skipped = 0  # samples of the first batch that were delivered before a resume

    def resume(self, cursor: object) -> Any:
        self._before, skipped = cursor_parts(cursor, 2)
        self._skipped = as_count(skipped)
        return self._before

    def failed_at(self, cursor: object) -> Any:
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
                each = begun_each_of(entry) or ()
                for number in range(self._skipped, len(samples)):
                    key, position = names[number]
                    row = entry.derived(samples[number], (self._before, number + 1), key, position)
                    if len(each) == len(samples):
                        row.begun = each[number]
                    out.append(row)
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
    if isinstance(batch, Packed):
        return unpack(batch)
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
