"""`pack`: rows of so many tokens out of documents."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.entry import Entry, annotate
from aioloader.engine.fuse import FusedOps
from aioloader.engine.node import Fold, FoldNode
from aioloader.engine.ops import Op
from aioloader.engine.resumable import beginning
from aioloader.executors.chunk import DROP
from aioloader.stages.base import Builder, Pass, Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.group import group_entries
from aioloader.stages.length import Length
from aioloader.stages.pack_plan import PackPlan, Row, Strategy
from aioloader.stages.packed import Document, MakeRow, Padding, RowParts, document_of

__all__ = ["OverRow", "Pack"]

OverRow = Literal["split", "drop", "error"]
"""What becomes of a document that is longer than a row."""

_STRATEGIES: Final = get_args(Strategy)
_TOO_LONG: Final = get_args(OverRow)

_SHORT_ROW: Final = 8192
"""Tokens of a row that is copied together on the loop: that takes 20 to 50 µs, less than a hop into a thread, and such
threads would hand the GIL to each other a dozen times a row (measured: 40 µs a document, and 18 on the loop)."""

_ROWS_AHEAD: Final = 16  # such rows that lie ready

AGAIN_AT_ONCE: Final = 4096  # documents that come once more are asked for in such runs, however many there are


@dataclass(frozen=True)
class Pack(Stage):
    """Rows of documents.

    Documents become tensors in a step of the window before, in threads. Where each goes is planned from its length
    (`PackPlan`), and rows are copied together in the window after (`MakeRow`), of those alone that a `shard` in between
    deals to this rank.

    Args:
        seq_len: Tokens of a row.
        length_of: Tokens of a document, to be checked; None: as many as it has.
        strategy: See `Strategy`.
        open_rows: Rows that are filled at a time, at most.
        max_documents: Of a row; None: any number.
        too_long: See `OverRow`.
        pad_value: See `Padding`.
        pad_to: Each document takes a multiple of so many tokens.
    """

    seq_len: int
    length_of: Length | None = None
    strategy: Strategy = "best_fit"
    open_rows: int = 64
    max_documents: int | None = None
    too_long: OverRow = "split"
    pad_value: Any = 0
    pad_to: int = 1

    same_each_epoch = True
    part_by_part = True

    def __post_init__(self) -> None:
        check_count("seq_len", self.seq_len, least=1)
        check_count("open_rows", self.open_rows, least=1)
        check_count("pad_to", self.pad_to, least=1, hint="pad_to=1 pads no document")
        if self.max_documents is not None:
            check_count("max_documents", self.max_documents, least=1, hint="leave it out for any number")
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, _STRATEGIES))}, got {self.strategy!r}")
        if self.too_long not in _TOO_LONG:
            raise ValueError(f"too_long must be one of {', '.join(map(repr, _TOO_LONG))}, got {self.too_long!r}")
        if self.seq_len % self.pad_to:
            raise ValueError(
                f"seq_len must be a multiple of pad_to, got {self.seq_len} and {self.pad_to}; pass for instance "
                f"seq_len={-(-self.seq_len // self.pad_to) * self.pad_to}"
            )
        values = self.pad_value.values() if isinstance(self.pad_value, Mapping) else [self.pad_value]
        for value in values:
            if not isinstance(value, int | float):
                raise TypeError(
                    f"pad_value must be a number, or a mapping of fields to numbers, got {self.pad_value!r}; "
                    f"pass for instance pad_value=tokenizer.pad_token_id"
                )

    @property
    def only_reads(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.length_of is None or self.length_of.only_reads

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]
        return () if self.length_of is None else (self.length_of.of,)

    @property
    def label(self) -> str:
        return f"pack({self.seq_len})"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} gives as many rows as the lengths of the documents make of them")

    def shape(self) -> dict[str, Any]:
        return {
            "stage": "pack",
            "seq_len": self.seq_len,
            "strategy": self.strategy,
            "open_rows": self.open_rows,
            "max_documents": self.max_documents,
            "too_long": self.too_long,
            "pad_to": self.pad_to,
        }

    def flow(self, before: Flow) -> Flow:
        after = before.counted().limited(Shared.SAME_RANK, self.label).closed()
        return replace(after, batch_size=None, collated=False, one_a_step=True)

    def build(self, builder: Builder) -> None:
        padding = Padding(self.pad_value)
        prepare = Prepare(self.length_of, self.seq_len, self.too_long, padding)
        builder.fuse(Op(prepare, self.label, flexible=True))
        builder.node = FoldNode(
            builder.close(),
            self.fold(builder.this_pass),
            unordered_input=bool(builder.flow.completion_order),
            recounts=True,
        )
        builder.fused = FusedOps()
        make = Op(MakeRow(self.seq_len, padding, self.pad_to), f"rows of {self.label}", flexible=True)
        if self.seq_len <= _SHORT_ROW:
            make = replace(make, concurrency=1, in_place=True, ahead=_ROWS_AHEAD)
        builder.fused.add(make)

    def fold(self, this_pass: Pass) -> Fold:
        """Its rule, with fresh state."""
        plan = PackPlan(self.seq_len, self.strategy, self.open_rows, self.max_documents, self.pad_to)
        return _PackFold(plan, self.label, this_pass.epoch)


@dataclass(frozen=True)
class Prepare:
    """From a sample to a `Document`.

    Args:
        length: What it must have as its length; None: nobody says.
        most: Tokens that it may have.
        too_long: What becomes of one with more.
        padding: What its fields must be able to hold.
    """

    length: Length | None
    most: int
    too_long: OverRow
    padding: Padding

    def __call__(self, sample: object) -> Any:
        """Convert it.

        Raises:
            TypeError, ValueError: It is no document, or too long.
        """
        told = None if self.length is None else self.length(sample)
        document = document_of(sample, self.padding)
        if told is not None and told != document.length:
            raise ValueError(
                f"length says that a document has {told} tokens, and it has {document.length}; leave length out, or "
                f"cut the document in a map before"
            )
        if document.length > self.most and self.too_long != "split":
            if self.too_long == "drop":
                return DROP
            raise ValueError(
                f"a document has {document.length} tokens, and a row has {self.most}; cut it before, or pass "
                f"too_long='split' or too_long='drop'"
            )
        return document


class _PackFold:
    """Gives a row when it is closed, and an error at once.

    Cursor: the one before the oldest document that is in an open row; its number; the number of the document that
    comes next, and how many of its tokens are in rows already; how many rows were begun; and the open rows, see
    `Row.code`. A resume reads from the oldest document on, puts those that the rows name to where they were, and drops
    the others: they have been given. How much that is is bounded by `PackPlan`, and the size of the cursor by what is
    in the open rows.

    Documents have the fields that those in the open rows have, or fail.

    Args:
        plan: Where documents go.
        label: Of the stage.
        epoch: For notes.
    """

    full = False

    def __init__(self, plan: PackPlan, label: str, epoch: int) -> None:
        self._plan = plan
        self._label = label
        self._epoch = epoch
        # In open rows, or being put into rows, by number, the oldest first: the entry, and the cursor that leads to it.
        self._held: dict[int, tuple[Entry, Any]] = {}
        self._number = 0  # of the document that comes next
        self._offset = 0  # tokens of it that are in rows
        self._newest: Any = None  # the newest cursor
        self._typical = 1  # documents in a row: those of the last one
        self._names: Any = None  # of the fields of documents in open rows
        self._resumed: tuple[Any, int] | None = None  # until all has come again: the cursor, and the oldest document
        self._resumed_at = 0  # the document that came next when the state was taken
        self._missing: dict[int, int] = {}  # documents that are to come again, and the rows that they were in

    # -- resume ------------------------------------------------------------------------------------------------------

    def resume(self, cursor: object) -> Any:
        upstream, oldest, following, offset, begun, codes = cursor_parts(cursor, 6)
        codes = cursor_sequence(codes)
        if not following:  # also where numbers were forgotten: then all comes again from here on
            codes = []
        as_count(oldest, as_count(following))
        self._plan.restore(begun, codes, oldest, following)
        self._number, self._resumed_at, self._offset = oldest, following, as_count(offset)
        self._newest = upstream
        self._resumed = (upstream, oldest) if oldest < following else None
        rows = self._plan.rows.values()
        self._missing = {document: row.number for row in rows for document, _, _ in row.pieces}
        return upstream

    def _again(self, number: int, entry: Entry, before: object) -> Entry | None:
        """A document that had come before the state was taken; an error where it is not what it was."""
        row = self._missing.pop(number, None)
        failed = None
        if row is not None:
            stop = next(stop for document, _, stop in self._plan.rows[row].pieces if document == number)
            if entry.error is None and entry.value.length != stop:
                length = entry.value.length
                self._refuse(entry, f"a document had {stop} tokens when the state was saved, and has {length} now")
            if entry.error is None:
                self._held[number] = (entry, before)
                self._names = entry.value.names
            else:
                self._plan.forget(row, number)
                failed = entry
        if self._number >= self._resumed_at:
            self._resumed = None
        if failed is not None:
            failed.cursor = self._cursor()
        return failed

    def _cursor(self) -> tuple[Any, ...]:
        codes = tuple([row.code for row in self._plan.rows.values()])
        following = max(self._number, self._resumed_at)
        if self._resumed is not None:
            before, oldest = self._resumed
        elif self._held:
            oldest = next(iter(self._held))
            before = self._held[oldest][1]
        else:
            before, oldest = self._newest, following
        return before, oldest, following, self._offset, self._plan.begun, codes

    def failed_at(self, cursor: object) -> Any:
        if self._held or self._resumed is not None:
            return self._cursor()
        return cursor, self._number, self._number, 0, self._plan.begun, ()

    # -- documents ---------------------------------------------------------------------------------------------------

    def wants(self, limit: int) -> int:
        return limit * self._typical + min(AGAIN_AT_ONCE, max(0, self._resumed_at - self._number))

    def feed(self, run: list[Entry]) -> list[Entry]:
        out: list[Entry] = []
        for entry in run:
            before, after = self._newest, entry.cursor
            if before is None:  # the order of the keys is to be the same one again
                before = beginning(after)
            number = self._number
            if number < self._resumed_at:
                self._number, self._newest = number + 1, after
                if (failed := self._again(number, entry, before)) is not None:
                    out.append(failed)
                continue
            if entry.error is None and self._held and entry.value.names != self._names:
                self._refuse(
                    entry,
                    f"all documents must have the same fields, those before it had {_listed(self._names)}, got "
                    f"{_listed(entry.value.names)}; give it the same ones in a map before",
                )
            if entry.error is None:
                self._put(number, entry, before, after, out)
                continue
            self._number, self._newest, self._offset = number + 1, after, 0
            entry.cursor = self._cursor()
            out.append(entry)
        return out

    def _put(self, number: int, entry: Entry, before: object, after: object, out: list[Entry]) -> None:
        """Put a document into rows."""
        plan, document = self._plan, entry.value
        length, start = document.length, self._offset
        self._held[number] = (entry, before)
        self._names = document.names
        while start < length:  # else what is to come again was longer when the state was taken
            while (row := plan.due()) is not None:
                self._give(row, number, out)
            stop = plan.cut(start, length)
            row = plan.put(number, start, stop)
            start = stop
            if start < length:
                self._offset = start
            else:
                self._number, self._newest, self._offset = number + 1, after, 0
            if row is not None:
                self._give(row, number if start < length else None, out)
        if self._number == number:
            self._number, self._newest, self._offset = number + 1, after, 0
            del self._held[number]

    def _give(self, row: Row, current: int | None, out: list[Entry]) -> None:
        """A closed row; of document `current` more is to come."""
        held, pieces = self._held, row.pieces
        entries = [held[document][0] for document, _, _ in pieces]
        for document, _, _ in pieces:
            if document != current:
                del held[document]
        documents: list[Document] = [entry.value for entry in entries]
        group = group_entries(entries)
        group.value = RowParts(
            [(document, start, stop) for document, (_, start, stop) in zip(documents, pieces, strict=True)],
            tuple(group.key),
        )
        group.cursor = self._cursor()
        self._typical = len(pieces)
        out.append(group)

    def _refuse(self, entry: Entry, why: str) -> None:
        entry.error = ValueError(why)
        entry.value = None
        annotate(entry.error, self._label, entry, self._epoch)

    def flush(self) -> list[Entry]:
        out: list[Entry] = []
        for number, row in self._missing.items():  # the source ends before they come again
            self._plan.forget(row, number)
        self._missing, self._resumed, self._resumed_at = {}, None, 0
        while (closed := self._plan.close_first()) is not None:
            self._give(closed, None, out)
        return out


def _listed(names: frozenset[Any] | None) -> str:
    return "none" if names is None else ", ".join(sorted(map(repr, names)))
