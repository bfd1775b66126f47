"""`batch_by_length`: batches of so many tokens at most, of samples that are about as long."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

from aioloader.core.checks import check_count, check_integer
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.safe_text import safe_repr
from aioloader.core.seeds import derive_seed
from aioloader.engine.node import Fold, FoldNode, Node
from aioloader.engine.ops import Op
from aioloader.engine.refill_node import RefillNode
from aioloader.engine.resumable import beginning
from aioloader.executors.chunk import DROP
from aioloader.stages.base import Builder, Pass, Stage, UnknownLengthError
from aioloader.stages.batch import CollateWith
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.group import group_entries
from aioloader.stages.length import Length
from aioloader.stages.length_plan import OpenBatch, TokenBudget, plan_window

__all__ = ["BatchByLength", "TooLong"]

TooLong = Literal["alone", "drop", "error"]
"""What becomes of a sample that is longer than a whole batch may be."""

_TOO_LONG: Final = get_args(TooLong)


@dataclass(frozen=True)
class BatchByLength(Stage):
    """Batches within a budget of tokens.

    Samples are measured in a step of the window before, in the user's threads; the rest is arithmetic on the lengths.

    Without a window the order is kept, and the cursor of a batch is that of its last sample. A sample that failed
    closes the open batch, so that it comes between those before it and those after it.

    With a window see `_WindowFold`.

    Args:
        budget: What a batch may hold.
        length: Tokens of a sample.
        window: Samples that are sorted together; None: the order is kept.
        seed: With the epoch and the number of the window, all that the order of its batches depends on.
        too_long: See `TooLong`.
        collate: How a group becomes a batch.
    """

    budget: TokenBudget
    length_of: Length
    window: int | None = 2048
    seed: int = 0
    too_long: TooLong = "alone"
    collate: CollateWith = field(default_factory=CollateWith)

    batches = True
    part_by_part = True

    def __post_init__(self) -> None:
        check_count("max_tokens", self.budget.max_tokens, least=1)
        if self.budget.max_samples is not None:
            check_count("max_samples", self.budget.max_samples, least=1, hint="leave it out for any number")
        if self.window is not None:
            check_count("window", self.window, least=1, hint="window=None keeps the order")
        check_integer("seed", self.seed)
        if self.too_long not in _TOO_LONG:
            raise ValueError(f"too_long must be one of {', '.join(map(repr, _TOO_LONG))}, got {self.too_long!r}")

    @property
    def exact_in_any_order(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always one
        return self.window is None

    @property
    def same_each_epoch(self) -> bool:  # type: ignore[override]
        return self.window is None

    @property
    def only_reads(self) -> bool:  # type: ignore[override]
        return self.collate.fn is None and self.length_of.only_reads  # the default puts samples straight into the batch

    @property
    def functions(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self.length_of.of, self.collate.fn)

    @property
    def label(self) -> str:
        return f"batch_by_length({self.budget.max_tokens})"

    @property
    def shown(self) -> str:
        return self.label if self.window is None else f"{self.label[:-1]}, seed={self.seed})"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} gives as many batches as the lengths of the samples make of them")

    def shape(self) -> dict[str, Any]:
        return {
            "stage": "batch_by_length",
            "name": self.length_of.name,
            "max_tokens": self.budget.max_tokens,
            "padded": self.budget.padded,
            "max_samples": self.budget.max_samples,
            "window": self.window,
            "seed": self.seed if self.window is not None else None,
            "too_long": self.too_long,
        }

    def flow(self, before: Flow) -> Flow:
        after = before if self.exact_in_any_order else before.counted()
        after = after.limited(Shared.SAME_RANK, self.label).closed()
        return replace(after, batch_size=None, collated=self.collate.fn is None, one_a_step=True)

    def build(self, builder: Builder) -> None:
        checks = builder.fused.checks
        measure = Measure(self.length_of, self.budget.max_tokens, self.too_long)
        builder.fuse(Op(measure, self.label, flexible=True))
        unordered_input = bool(builder.flow.completion_order)
        builder.node = self._node(builder.close(), builder.this_pass, unordered_input=unordered_input)
        self.collate.build(builder, checks)

    def _node(self, upstream: Node, this_pass: Pass, *, unordered_input: bool) -> Node:
        if self.window is None:
            return FoldNode(upstream, _InOrderFold(self.budget))
        fold = _WindowFold(self.budget, self.window, this_pass.seed(self.seed, "batch_by_length"))
        return RefillNode(upstream, fold, unordered_input=unordered_input)


@dataclass(frozen=True)
class Measure:
    """From a sample to a pair of its length and itself.

    Args:
        length: Tells it.
        most: Tokens that it may have.
        too_long: What becomes of one with more.
    """

    length: Length
    most: int
    too_long: TooLong

    def __call__(self, sample: object) -> Any:
        """Measure it.

        Raises:
            ValueError: It is too long.
        """
        length = self.length(sample)
        if length > self.most:
            if self.too_long == "drop":
                return DROP
            if self.too_long == "error":
                raise ValueError(
                    f"a sample has {length} tokens, and a batch holds max_tokens={self.most}; cut it before, raise "
                    f"max_tokens, or pass too_long='alone' or too_long='drop'"
                )
        return length, sample


def _group(entries: list[Entry]) -> Entry:
    """One entry of measured samples."""
    for entry in entries:
        entry.value = entry.value[1]
    return group_entries(entries)


class _InOrderFold(Fold):
    """Closes a batch before the sample that would pass the budget."""

    full = False

    def __init__(self, budget: TokenBudget) -> None:
        self._open = OpenBatch(budget)
        self._pending: list[Entry] = []
        self._typical = 1  # samples in a batch: those of the last one

    def resume(self, cursor: object) -> Any:
        return cursor

    def failed_at(self, cursor: object) -> Any:
        return cursor  # `interrupt` and `flush` have given what was held

    def wants(self, limit: int) -> int:
        return max(1, limit * self._typical - len(self._pending))

    def feed(self, run: list[Entry]) -> list[Entry]:
        out: list[Entry] = []
        open_batch, pending = self._open, self._pending
        for entry in run:
            if entry.error is not None:
                out += self.interrupt()
                out.append(entry)
                continue
            length = entry.value[0]
            if not open_batch.fits(length):
                out += self.interrupt()
            open_batch.add(length)
            pending.append(entry)
            if open_batch.full:
                out += self.interrupt()
        return out

    def flush(self) -> list[Entry]:
        return self.interrupt()

    def interrupt(self) -> list[Entry]:
        """Close the open batch."""
        if not self._pending:
            return []
        self._typical = len(self._pending)
        group = _group(self._pending)
        self._pending.clear()
        self._open.clear()
        return [group]


class _WindowFold:
    """Sorts so many samples by their lengths, and gives their batches while the next ones come in.

    Samples that failed are given first, each as it is: then nobody waits for their errors, and their neighbours are in
    batches. No more samples are held than a window has: as many come in as have been given.

    Cursor: the one before the window, the window's number, and a number whose bits say which of its samples have been
    given. A resume reads the window again and leaves those out. Which batches they were in follows from the
    lengths of all. Should a sample fail now that did not, or the other way round, then the batches to come may be
    others, but still no sample is lost, none comes twice, and each batch keeps its budget.

    Args:
        budget: What a batch may hold.
        size: Samples of a window.
        seed: Of this pass.
    """

    full = False

    def __init__(self, budget: TokenBudget, size: int, seed: int) -> None:
        self._budget = budget
        self._size = size
        self._seed = seed
        self._number = 0  # of the window that comes in
        self._pending: list[Entry] = []  # its samples
        self._before: Any = None  # the cursor before it
        self._gone = 0  # those of them that were given before a resume
        self._newest: Any = None  # the newest cursor
        self._planned: deque[Entry] = deque()  # of the window that is given
        self._held = 0  # samples in these
        self._given: Any = (None, 0, 0)  # the cursor after what has been given

    def resume(self, cursor: object) -> Any:
        upstream, number, gone = cursor_parts(cursor, 3)
        gone = int(gone, 16) if isinstance(gone, str) else gone
        if type(gone) is not int or gone < 0 or gone.bit_length() > self._size:
            raise ValueError(f"bits of up to {self._size} samples were expected, got {safe_repr(gone)}")
        self._number, self._gone = as_count(number), gone
        self._newest = upstream
        self._given = (upstream, self._number, gone)
        return upstream

    def failed_at(self, cursor: object) -> Any:
        return self._given if self._pending or self._planned else (cursor, self._number, 0)

    def wants(self, limit: int) -> int:
        return self._size - self._held - len(self._pending)

    def feed(self, run: list[Entry]) -> list[Entry]:
        if not self._pending and run:
            # The order of the keys is to be the same one again.
            self._before = beginning(run[0].cursor) if self._newest is None else self._newest
        self._pending += run
        if run:
            self._newest = run[-1].cursor
        if len(self._pending) == self._size:
            self._plan()
        return []

    def take(self, limit: int) -> list[Entry]:
        """See `RefilledFold`."""
        planned = self._planned
        taken = [planned.popleft() for _ in range(min(limit, len(planned)))]
        if taken:
            self._given = taken[-1].cursor
            self._held -= sum(len(entry.key) if entry.error is None else 1 for entry in taken)
        return taken

    def flush(self) -> list[Entry]:
        out = self.take(len(self._planned))
        if self._pending:
            self._plan()
            out += self.take(len(self._planned))
        return out

    def _plan(self) -> None:
        """The window is complete, and all of the one before has been given."""
        entries, self._pending = self._pending, []
        gone, before, number = self._gone, self._before, self._number
        seed = derive_seed(self._seed, "window", number)
        self._gone, self._number = 0, number + 1
        out: list[Entry] = []
        for entry, bits in _outcomes(entries, gone, self._budget, seed):
            gone |= bits
            entry.cursor = (before, number, gone)
            out.append(entry)
        after = (self._newest, number + 1, 0)
        if out:
            out[-1].cursor = after  # nothing of this window need be read again
        else:
            self._given = after
        self._held = sum(len(entry.key) if entry.error is None else 1 for entry in out)
        self._planned.extend(out)


def _outcomes(entries: list[Entry], gone: int, budget: TokenBudget, seed: int) -> Iterable[tuple[Entry, int]]:
    """What a window gives: an entry, and the bits of the samples in it.

    Args:
        entries: Of the window.
        gone: Bits of those that have been given.
        budget: What a batch may hold.
        seed: Of the order of the batches.
    """
    lengths: list[int | None] = []
    for number, entry in enumerate(entries):
        failed = entry.error is not None
        lengths.append(None if failed else entry.value[0])
        if failed and not gone >> number & 1:
            yield entry, 1 << number
    for batch in plan_window(lengths, budget, seed):
        left = [number for number in batch if not gone >> number & 1] if gone else batch
        if left:
            yield _group([entries[number] for number in left]), sum(1 << number for number in left)
