"""A source that knows its own cursors: entries in lists, errors at their place, files and threads closed."""

import asyncio
from typing import Any

from aioloader import DataLoader, Pipeline
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from tests._support import Steps, collect, on_both_faces


class Letters(CursorSource):
    """The letters of some words; the cursor is the word and the place in it."""

    def __init__(self, words: list[str], *, fails_at: str = "", ends_badly: bool = False) -> None:
        self.words = words
        self.fails_at = fails_at
        self.ends_badly = ends_badly
        self.closed = 0

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return _LetterReader(self, context)


class _LetterReader(EntryReader):
    def __init__(self, source: Letters, access: SourceContext) -> None:
        self._source = source
        self._threads = access.threads(2)
        self._task = access.spawn(self._wait_for_ever)
        self._entries = [
            Entry(letter, (number, place + 1), f"{word}[{place}]", 0)
            for number, word in enumerate(source.words)
            for place, letter in enumerate(word)
        ]

    async def _wait_for_ever(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def read(self, limit: int) -> list[Entry]:
        taken = await self._threads.call(self._take, min(limit, 3))
        if not taken and self._source.ends_badly:
            raise OSError("the disk is gone")
        return taken

    def _take(self, limit: int) -> list[Entry]:
        taken = [self._entries.pop(0) for _ in range(min(limit, len(self._entries)))]
        for entry in taken:
            if entry.value == self._source.fails_at:
                entry.error = ValueError("no such letter")
        return taken

    async def aclose(self) -> None:
        self._source.closed += 1


@on_both_faces
def test_entries_come_in_order_with_the_cursors_of_the_source(face: Any) -> None:
    source = Letters(["abcd", "", "efg"])
    assert collect(Pipeline(source), face) == list("abcdefg")
    assert source.closed == 1


@on_both_faces
def test_an_error_stands_at_its_place_and_a_failure_ends_the_epoch(face: Any) -> None:
    source = Letters(["abc"], fails_at="b", ends_badly=True)
    with Steps(Pipeline(source).batch(1, collate_fn=list), face) as steps:
        seen = steps.outcomes()
    assert [type(outcome).__name__ for outcome in seen] == ["list", "ValueError", "list", "OSError"]
    assert "key 'abc[1]'" in seen[1].__notes__[0]


@on_both_faces
def test_take_closes_the_source_early(face: Any) -> None:
    source = Letters(["abcdefghijklmnop"] * 50)
    assert collect(Pipeline(source).take(3), face) == ["a", "b", "c"]
    assert source.closed == 1


@on_both_faces
def test_a_dataloader_takes_it_as_an_iterable(face: Any) -> None:
    loader: DataLoader[Any] = DataLoader(Letters(["abcde"]), batch_size=2)
    assert collect(loader, face) == [["a", "b"], ["c", "d"], ["e"]]
