"""As many samples on each rank, out of files that have more or fewer of them."""

from typing import Any, Final, Protocol

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.source import EntryReader, SourceContext
from aioloader.sources.file_order import Dealt

__all__ = ["COUNTED", "EvenReader", "check_enough_files"]

COUNTED: Final = ("pad", "drop", "error")
"""Values of `even` for which it must be known how many samples each rank has."""


def check_enough_files(files: int, world_size: int, even: str | None, source: str, *, counted: bool) -> None:
    """Refuse to deal so few files that some ranks get none, unless `even` says what these do.

    Raises:
        ValueError: Why, and the way out.
    """
    if files >= world_size or even == "keep" or (counted and even == "pad"):
        return
    some = f"rank {files} has none" if files + 1 == world_size else f"ranks {files} to {world_size - 1} have none"
    raise ValueError(
        f"shard(by='file') deals files, and {source} has {files} of them for {world_size} ranks, so that {some} and "
        f"would end at once; write more files, pass by='sample', or even='keep' if your training can handle ranks "
        f"without samples"
    )


class _Counted(Protocol):
    """What `EvenReader` asks of a source."""

    def open_files(self, context: SourceContext, cursor: Any) -> EntryReader: ...

    async def samples_of_ranks(self, context: SourceContext) -> list[int]: ...


class EvenReader(EntryReader):
    """The files of a rank until as many samples have come as on every other rank.

    How many samples there are is counted before the first one comes, on each rank for itself, from what the files say
    of themselves. A rank that has fewer reads its own files again, in rounds: also where some of its rows could not be
    read, since an error may stand for many rows.

    Cursor: that of the round, and how many samples have come.

    Args:
        source: Opened once for each round.
        dealt: Of how many ranks this is which one.
        context: Of the epoch. A round has a part of it, whose threads end with the round: a rank may need many.
        cursor: Where to begin; None: at the start.
    """

    def __init__(self, source: _Counted, dealt: Dealt, context: SourceContext, cursor: Any) -> None:
        self._source = source
        self._dealt = dealt
        self._context = context
        given: Any = 0
        self._cursor: Any = None
        if cursor is not None:
            self._cursor, given = cursor_parts(cursor, 2)
        self._given = as_count(given)
        self._target: int | None = None
        self._round: tuple[SourceContext, EntryReader] | None = None

    async def read(self, limit: int) -> list[Entry]:
        if self._target is None:
            counts = await self._source.samples_of_ranks(self._context)
            self._target = target_of(counts, self._dealt)
        from_start = False
        while self._given < self._target:
            if self._round is None:
                part = self._context.part()
                self._round = part, self._source.open_files(part, self._cursor)
                from_start = self._cursor is None
            _, reader = self._round
            if entries := await reader.read(min(limit, self._target - self._given)):
                for given, entry in enumerate(entries, self._given + 1):
                    entry.cursor = (entry.cursor, given)
                self._given += len(entries)
                return entries
            await self._end_round()
            if from_start:
                break  # all files are empty by now: another round would find as little
            self._cursor = None
        return []

    async def _end_round(self) -> None:
        if self._round is not None:
            (part, reader), self._round = self._round, None
            try:
                await reader.aclose()
            finally:
                await part.aclose()

    async def aclose(self) -> None:
        await self._end_round()


def target_of(counts: list[int], dealt: Dealt) -> int:
    """How many samples each rank gives, where the files of each have `counts`.

    Raises:
        ValueError: They differ and must not, or there is nothing to fill a rank up with.
    """
    least, most = min(counts), max(counts)
    if dealt.even == "error" and least != most:
        raise ValueError(
            f"shard(even='error') needs as many samples for each rank, but their files have {least} to {most}; write "
            f"files of one length, as many for each rank, or pass even='pad' or even='drop'"
        )
    if most and not least:
        raise ValueError(
            f"shard(by='file', even={dealt.even!r}) gives each rank as many samples, but the files of rank "
            f"{counts.index(0)} have none; leave empty files out, write more files, or pass by='sample'"
        )
    return least if dealt.even == "drop" else most
