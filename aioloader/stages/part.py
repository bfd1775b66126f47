"""One of the parts that `in_ray` deals a source into: every n-th sample, or file."""

from dataclasses import dataclass
from typing import Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.engine.node import Fold, FoldNode
from aioloader.stages.base import Builder, FoldStage, Pass, UnknownLengthError
from aioloader.stages.flow import Flow
from aioloader.stages.key_order import KeyOrder

__all__ = ["Part"]


@dataclass(frozen=True)
class Part(FoldStage):
    """Every `of`-th sample, from number `number` on. Nothing is added to fill a last round, and nothing left out.

    Other than after `shard`, a cursor is this part's own: how far the other parts are does not matter to it.

    Args:
        number: From 0.
        of: How many parts there are.
        by_file: The source reads the files of this part alone, so that nothing is left to be done here.
    """

    number: int
    of: int
    by_file: bool = False

    exact_in_any_order = True
    keeps_samples = True
    same_each_epoch = True
    passes = True
    reorders = True

    @property
    def label(self) -> str:
        return f"part({self.number} of {self.of})"

    def length(self, upstream: int) -> int:
        if self.by_file:
            raise UnknownLengthError("how many samples are in the files of a part is known only when they are read")
        return (upstream - self.number + self.of - 1) // self.of

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return before

    def fold(self, this_pass: Pass) -> Fold:
        return _PartFold(self.number, self.of)

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        return order.dealt(self.number, self.of, "keep")

    def build(self, builder: Builder) -> None:
        """As `Shard.build`: maps before it run on the samples of this part alone."""
        if self.by_file:
            return
        if builder.flow.by_key:
            builder.key_stages.append(self)
            return
        node = builder.node if builder.fused.one_for_one else builder.close()
        builder.node = FoldNode(node, self.fold(builder.this_pass))


class _PartFold:
    """Cursor: that of the entry, and how many entries of all parts came up to there."""

    full = False

    def __init__(self, number: int, of: int) -> None:
        self._number = number
        self._of = of
        self._seen = 0

    def resume(self, cursor: Any) -> Any:
        upstream, seen = cursor_parts(cursor, 2)
        self._seen = as_count(seen)
        return upstream

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, self._seen)

    def wants(self, limit: int) -> int:
        to_mine = (self._number - self._seen) % self._of
        return to_mine + (limit - 1) * self._of + 1

    def feed(self, run: list[Entry]) -> list[Entry]:
        mine = []
        for entry in run:
            if self._seen % self._of == self._number:
                entry.cursor = (entry.cursor, self._seen + 1)
                mine.append(entry)
            self._seen += 1
        return mine

    def flush(self) -> list[Entry]:
        return []
