"""`take`, `skip`, `enumerate`: which entries go on."""

from dataclasses import dataclass
from typing import Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.engine.node import Fold
from aioloader.stages.base import FoldStage, Pass
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.key_order import KeyOrder

__all__ = ["Enumerate", "SkipFirst", "Take"]


class _EachFold:
    """A fold that looks at entries one by one and holds none."""

    full = False

    def wants(self, limit: int) -> int:
        return limit

    def flush(self) -> list[Entry]:
        return []


def _by_number(before: Flow, label: str) -> Flow:
    """After a stage that goes by the number of the entry: the ranks of one world, or of any if it counts steps."""
    return before if before.batch_size is not None else before.limited(Shared.SAME_WORLD, label)


@dataclass(frozen=True)
class Take(FoldStage):
    """The first `n` entries, failed ones included. Cursor: that of the entry, and the count."""

    n: int

    exact_in_any_order = True
    passes = True
    keeps_samples = True
    same_each_epoch = True
    reorders = True
    evenness = "given"

    @property
    def label(self) -> str:
        return f"take({self.n})"

    def length(self, upstream: int) -> int:
        return min(self.n, upstream)

    def shape(self) -> dict[str, Any]:
        return {"stage": "take", "n": self.n}

    def flow(self, before: Flow) -> Flow:
        after = _by_number(before.cut(), self.label)
        return after if before.by_key else after.closed()

    def fold(self, this_pass: Pass) -> Fold:
        return _TakeFold(self.n)

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        return order.cut(0, self.n)


class _TakeFold(_EachFold):
    def __init__(self, n: int) -> None:
        self._n = n
        self._count = 0

    def resume(self, cursor: object) -> Any:
        upstream, count = cursor_parts(cursor, 2)
        self._count = as_count(count, self._n)
        return upstream

    def failed_at(self, cursor: object) -> Any:
        return (cursor, self._count)

    @property
    def full(self) -> bool:  # type: ignore[override]  # a plain attribute in folds that are never full
        return self._count >= self._n

    def wants(self, limit: int) -> int:
        return min(limit, self._n - self._count)

    def feed(self, run: list[Entry]) -> list[Entry]:
        for entry in run:
            self._count += 1
            entry.cursor = (entry.cursor, self._count)
        return run


@dataclass(frozen=True)
class SkipFirst(FoldStage):
    """All but the first `n` entries. Cursor: that of the entry, and how many were left out."""

    n: int

    exact_in_any_order = True
    passes = True
    keeps_samples = True
    same_each_epoch = True
    reorders = True

    @property
    def label(self) -> str:
        return f"skip({self.n})"

    def length(self, upstream: int) -> int:
        return max(0, upstream - self.n)

    def shape(self) -> dict[str, Any]:
        return {"stage": "skip", "n": self.n}

    def flow(self, before: Flow) -> Flow:
        after = _by_number(before, self.label)
        return after if before.by_key else after.closed()

    def fold(self, this_pass: Pass) -> Fold:
        return _SkipFold(self.n)

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        return order.cut(self.n, len(order))


class _SkipFold(_EachFold):
    def __init__(self, n: int) -> None:
        self._n = n
        self._skipped = 0

    def resume(self, cursor: object) -> Any:
        upstream, skipped = cursor_parts(cursor, 2)
        self._skipped = as_count(skipped, self._n)
        return upstream

    def failed_at(self, cursor: object) -> Any:
        return (cursor, self._skipped)

    def wants(self, limit: int) -> int:
        return limit + self._n - self._skipped

    def feed(self, run: list[Entry]) -> list[Entry]:
        left = self._n - self._skipped
        if left:
            self._skipped += min(left, len(run))
            run = run[left:]
        for entry in run:
            entry.cursor = (entry.cursor, self._n)
        return run


@dataclass(frozen=True)
class Enumerate(FoldStage):
    """Pairs of a number and the sample; a failed one uses up its number. Cursor: that of the entry, and the count."""

    exact_in_any_order = True
    passes = True
    same_each_epoch = True

    @property
    def label(self) -> str:
        return "enumerate()"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> dict[str, Any]:
        return {"stage": "enumerate"}

    def flow(self, before: Flow) -> Flow:
        return _by_number(before, self.label).closed()

    def fold(self, this_pass: Pass) -> Fold:
        return _EnumerateFold()


class _EnumerateFold(_EachFold):
    def __init__(self) -> None:
        self._count = 0

    def resume(self, cursor: object) -> Any:
        upstream, count = cursor_parts(cursor, 2)
        self._count = as_count(count)
        return upstream

    def failed_at(self, cursor: object) -> Any:
        return (cursor, self._count)

    def feed(self, run: list[Entry]) -> list[Entry]:
        for entry in run:
            if entry.error is None:
                entry.value = (self._count, entry.value)
            self._count += 1
            entry.cursor = (entry.cursor, self._count)
        return run
