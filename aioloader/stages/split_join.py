"""Batches whose samples are loaded one by one: the keys of a batch sampler, taken apart and put together again.

For datasets with an async `__getitem__`: the sample is the unit of work, so that the requests of several batches are
under way at once and the first batch does not wait for the last.
"""

from dataclasses import dataclass
from typing import Any, Final

from aioloader.core.entry import Entry, failed_in, presentable
from aioloader.core.policies import Errors
from aioloader.core.safe_text import add_note, safe_repr
from aioloader.engine.node import Fold, FoldNode
from aioloader.executors.partial import NO_SAMPLES, LeftOut, Partial
from aioloader.stages.base import Builder, FoldStage, Pass, UnknownLengthError
from aioloader.stages.batch import CollateWith
from aioloader.stages.group import Group, group_entries

__all__ = ["INSIDE", "JoinBatches", "SplitBatches"]


class _Inside:
    def __repr__(self) -> str:
        return "INSIDE"


INSIDE: Final = _Inside()
"""The cursor of a key that is not the last of its batch: nobody goes on there, for only whole batches are given."""


@dataclass(frozen=True)
class SplitBatches(FoldStage):
    """The keys of each batch, one by one.

    Cursor: the last key of a batch carries the batch's own, those before it carry `INSIDE`. `JoinBatches` tells the end
    of a batch by that.

    Args:
        batch_size: Of all batches but the last; None: the sampler decides.
    """

    batch_size: int | None

    exact_in_any_order = True

    @property
    def label(self) -> str:
        return "split"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError("the batch sampler decides how many samples there are")

    def fold(self, this_pass: Pass) -> Fold:
        return _SplitFold(self.batch_size)


class _SplitFold:
    full = False

    def __init__(self, batch_size: int | None) -> None:
        self._batch_size = batch_size

    def resume(self, cursor: Any) -> Any:
        return cursor  # what `JoinBatches` gives are whole batches

    def failed_at(self, cursor: Any) -> Any:
        return cursor

    def wants(self, limit: int) -> int:
        return 1

    def feed(self, run: list[Entry]) -> list[Entry]:
        out: list[Entry] = []
        for entry in run:
            keys = self._keys(entry) if entry.error is None else []
            first = None if self._batch_size is None or entry.position is None else entry.position * self._batch_size
            if not keys:  # nothing to load, but it is a batch: as an error it passes by the loading stages
                entry.error = _EmptyBatchError() if entry.error is None else entry.error
                out.append(entry)
            for offset, key in enumerate(keys, 1):
                cursor = entry.cursor if offset == len(keys) else INSIDE
                out.append(Entry(key, cursor, key, None if first is None else first + offset - 1))
        return out

    @staticmethod
    def _keys(entry: Entry) -> list[Any]:
        """Those of a batch. What a sampler gave instead of a list of keys fails at its place, as where workers load."""
        try:
            return list(entry.value)
        except Exception as error:
            add_note(error, f"aioloader: the batch sampler gave {safe_repr(entry.value)} for the keys of a batch")
            entry.error = error
            return []

    def flush(self) -> list[Entry]:
        return []


@dataclass(frozen=True)
class JoinBatches(FoldStage):
    """The groups that `SplitBatches` took apart. Cursor: that of the batch.

    Args:
        collate: How a group becomes a batch.
        leaves_out: Samples that failed with such errors are left out of their group, which is a `Partial` then.
    """

    collate: CollateWith
    leaves_out: Errors = ()

    exact_in_any_order = True

    @property
    def label(self) -> str:
        return "join"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError("the batch sampler decides how many samples a batch has")

    def fold(self, this_pass: Pass) -> Fold:
        return _JoinFold(self.leaves_out)

    def build(self, builder: Builder) -> None:
        checks = builder.fused.checks
        builder.node = FoldNode(builder.close(), self.fold(builder.this_pass))
        self.collate.build(builder, checks)


class _JoinFold:
    full = False

    def __init__(self, leaves_out: Errors) -> None:
        self._leaves_out = leaves_out
        self._pending: list[Entry] = []
        self._size = 1  # of the batch before: most are as long

    def resume(self, cursor: Any) -> Any:
        return cursor

    def failed_at(self, cursor: Any) -> Any:
        return cursor

    def wants(self, limit: int) -> int:
        return max(1, limit * self._size - len(self._pending))  # or batches would pile up here, for which no room is

    def feed(self, run: list[Entry]) -> list[Entry]:
        groups = []
        for entry in run:
            self._pending.append(entry)
            if entry.cursor is not INSIDE:
                groups.append(self._group())
        return groups

    def flush(self) -> list[Entry]:
        return [self._group()] if self._pending else []

    def _group(self) -> Entry:
        if isinstance(self._pending[0].error, _EmptyBatchError):
            group = Entry(Group([], [], []), self._pending[0].cursor, [], self._pending[0].position)
        else:
            left_out = self._left_out()
            stage = failed_in(self._pending[left_out[0].at]) if left_out else ""
            for one in left_out:
                self._pending[one.at].error = None  # else all of them would fail with it
            group = group_entries(self._pending)
            if left_out and group.error is None:
                group.value = self._partial(group, left_out, stage)
            self._size = len(self._pending)
        self._pending = []
        return group

    def _left_out(self) -> list[LeftOut]:
        """The samples of a batch that are left out of it; none, where another one makes the whole batch fail."""
        found = []
        for at, entry in enumerate(self._pending):
            error = entry.error
            if error is not None and not isinstance(presentable(error), self._leaves_out):
                return []
            if error is not None:
                found.append(LeftOut(at, error, getattr(entry, "seconds", None), entry.attempts))
        return found

    @staticmethod
    def _partial(group: Entry, left_out: list[LeftOut], stage: str) -> Partial:
        out = {one.at for one in left_out}
        good = [at for at in range(len(group.value.samples)) if at not in out]
        samples, keys = group.value.samples, group.value.keys
        rest = Group([samples[at] for at in good], [keys[at] for at in good]) if good else NO_SAMPLES
        return Partial(rest, left_out, stage)


class _EmptyBatchError(Exception):
    """Stands for the samples of a batch that has none, between the two folds."""
