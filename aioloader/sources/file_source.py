"""What `TarShards`, `Lines` and `ParquetRows` have in common: a stream out of files, each read from front to back."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar

from aioloader.core.checks import check_count, check_integer
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.rate import Rate
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.core.typevars import T_co
from aioloader.sources.even_files import COUNTED, EvenReader, check_enough_files
from aioloader.sources.file_order import Dealt, FileOrder, file_order
from aioloader.sources.interleave import InTurn, Lane, turn_cursor
from aioloader.sources.paths import names_of
from aioloader.sources.requests import RequestPolicies
from aioloader.sources.stored_files import StoredFile

__all__ = ["FileSource"]

S = TypeVar("S")


class FileSource(CursorSource[T_co], Generic[S, T_co]):
    """Samples out of files: in which order, how many files at a time, and by which rank, is the same for all formats.

    Cursor: that in a file, with the position of the file in the order of the pass; with `interleave`, that of each
    lane, see `InTurn`; for a rank that gives as many samples as all others, that and how many it has given, see
    `EvenReader`.

    Attributes:
        shuffle: The files come in another order in each pass.
        seed: With the pass, all that this order depends on.
        interleave: How many files are read side by side.
    """

    shuffle: bool = False
    seed: int = 0
    interleave: int = 1
    counts_samples: bool = False  # it knows how many samples are in its files without reading all of them
    _files: tuple[StoredFile, ...]
    _requests: RequestPolicies
    _dealt: Dealt | None = None
    _words: ClassVar[tuple[str, str]] = ("file", "the files")  # what one is called, and all of them

    def _set_order(self, shuffle: object, seed: object, interleave: object) -> None:
        self.shuffle = bool(shuffle)
        self.seed = check_integer("seed", seed)
        self.interleave = min(check_count("interleave", interleave, least=1), len(self._files))

    @property
    def rate(self) -> Rate | None:
        """How many of its requests begin in a second, which others may share."""
        return self._requests.rate

    @property
    def same_each_epoch(self) -> bool:
        return not self.shuffle

    @cached_property
    def _names(self) -> dict[str, Any]:
        return names_of([file.url for file in self._files])

    def identity(self) -> dict[str, Any]:
        return {**self._names, "interleave": self.interleave, "shuffle": self.seed if self.shuffle else None}

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files, in the order in which they were given."""
        return self._files

    @property
    def file_count(self) -> int:
        """How many files there are to be dealt."""
        return len(self._files)

    @property
    def may_be_dealt(self) -> bool:
        """Whether ranks could read files of their own."""
        return len(self._files) > 1

    def dealt(self, rank: int, world_size: int, even: str | None) -> Self:
        """The files of one rank: every `world_size`-th in the order of the pass, from number `rank` on.

        Args:
            rank: In [0, world_size).
            world_size: Of how many.
            even: How all ranks give as many samples, see `Shard`; None: each gives what is in its files.

        Raises:
            ValueError: There are fewer files than ranks, and nothing says what to do about it.
        """
        check_enough_files(len(self._files), world_size, even, type(self).__name__, counted=self.counts_samples)
        part = copy(self)
        counted = self.counts_samples and even in COUNTED and world_size > 1
        part._dealt = Dealt(rank, world_size, even if counted else None)
        return part

    def part(self, number: int, of: int) -> Self | None:
        """Every `of`-th of this rank's files, from number `number` on; None: there are not so many to be dealt.

        Nor are those of a rank that reads its files again until it has as many samples as the others.
        """
        ranks = Dealt(0, 1, None) if self._dealt is None else self._dealt
        if ranks.counted or self._rank_files < of:
            return None
        part = copy(self)
        part._dealt = Dealt(ranks.rank + ranks.world_size * number, ranks.world_size * of, None)
        return part

    async def count_samples(self, context: SourceContext) -> list[int]:
        """What `samples_of` takes of each file, in the order in which they were given.

        Raises:
            Exception: Somebody has to be asked, and does not answer.
        """
        raise NotImplementedError

    def samples_of(self, counts: Sequence[int]) -> int:
        """How many samples files with these `counts` are together."""
        return sum(counts)

    async def samples_of_ranks(self, context: SourceContext) -> list[int]:
        """How many samples are in the files of each rank; of one without files, in those that it reads instead."""
        assert self._dealt is not None
        counts = await self.count_samples(context)
        ranks = [replace(self._dealt, rank=rank) for rank in range(self._dealt.world_size)]
        numbers = [file_order(len(counts), self._seed_of(context), rank) for rank in ranks]
        return [self.samples_of([counts[number] for number in its]) for its in numbers]

    # -- reading -----------------------------------------------------------------------------------------------------

    def check_cursor(self, cursor: object) -> None:
        if self._dealt is not None and self._dealt.counted:
            cursor, given = cursor_parts(cursor, 2)
            as_count(given)
        self._places(cursor)

    def open(self, context: SourceContext, cursor: object) -> EntryReader:
        if self._dealt is not None and self._dealt.counted:
            return EvenReader(self, self._dealt, context, cursor)
        return self.open_files(context, cursor)

    def open_files(self, context: SourceContext, cursor: object) -> EntryReader:
        """All files of this rank, once, from `cursor` on."""
        return self.side_by_side(self._opener(context, self.order_of(context)), cursor)

    def order_of(self, context: SourceContext) -> FileOrder:
        """The files of this rank in this pass."""
        return FileOrder(file_order(len(self._files), self._seed_of(context), self._dealt), self._lanes)

    def side_by_side(
        self, open_lane: Callable[[int, S], Lane], cursor: object, stays: Callable[[Entry], bool] | None = None
    ) -> EntryReader:
        """The lanes that `open_lane` opens, each at its place in `cursor`."""
        turn, cursors, places = self._places(cursor)
        lanes = [open_lane(*place) for place in places]
        return lanes[0] if len(lanes) == 1 else InTurn(lanes, turn, cursors, stays)

    def _places(self, cursor: object) -> tuple[int, list[Any], list[tuple[int, S]]]:
        """Whose turn is next, the cursors of all lanes, and where each of them begins.

        Raises:
            ValueError: `cursor` is nothing of the kind, or that of other files.
        """
        lanes = self._lanes
        turn, cursors = (0, [cursor]) if lanes == 1 else turn_cursor(cursor, lanes)
        return turn, cursors, [self._place(lane, one) for lane, one in enumerate(cursors)]

    def _place(self, lane: int, cursor: object) -> tuple[int, S]:
        """The position of a file, and the place in it where `lane` begins."""
        if cursor is None:
            return lane, self._parse(None)[1]
        at, start = self._parse(cursor)
        if as_count(at) >= self._rank_files + self._lanes or at % self._lanes != lane:
            kind, they = self._words
            raise ValueError(f"the cursor is in {kind} {at}, but there are {self._rank_files}: {they} have changed")
        return at, start

    @property
    def _rank_files(self) -> int:
        """How many files this rank reads."""
        return len(file_order(len(self._files), None, self._dealt))

    @property
    def _lanes(self) -> int:
        return max(1, min(self.interleave, self._rank_files))

    def _seed_of(self, context: SourceContext) -> int | None:
        return context.seed(self.seed, "files") if self.shuffle else None

    @abstractmethod
    def _parse(self, cursor: object) -> tuple[Any, S]:
        """The position of a file and the place in it, of the cursor of one lane; None: the beginning.

        Raises:
            ValueError: It is none.
        """

    @abstractmethod
    def _opener(self, context: SourceContext, order: FileOrder) -> Callable[[int, S], Lane]:
        """Gives a function that opens the lane whose first file is at a position of `order`, at a place in that."""
