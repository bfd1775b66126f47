"""`Lines`: the lines of text files, or the JSON values in them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property
from typing import Any, Final, Literal

from aioloader.core.checks import check_callable, check_count
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext, SourceThreads
from aioloader.sources.chunks import READ_BYTES, file_chunks
from aioloader.sources.compressed import MAX_WINDOW_BYTES, decompressor_for, is_compressed
from aioloader.sources.file_events import require_watchfiles
from aioloader.sources.line_parser import Decode, LineParser, LineStart
from aioloader.sources.marks import read_mark
from aioloader.sources.parsing import parsed
from aioloader.sources.paths import Paths, find_files, names_of
from aioloader.sources.read_ahead import Ahead

__all__ = ["Lines"]

_BEGINNING: Final[LineStart] = (0, 0, None)


class Lines(CursorSource):
    """The lines of files, in order: text, or JSON values.

    Files that end in `.gz` or `.zst` are decompressed. They are read in large pieces in a thread, which decodes too. A
    line that cannot be decoded raises in its position, with file, line number and byte offset, and so does a file that
    cannot be opened or ends too early (`.gz`, `.zst`); what comes after it goes on.

    Cursor: file, byte offset, line number, and a mark of what is before, see `aioloader.sources.marks`; with
    `interleave` those of each open file. Reading resumes at the offset of a plain file; a compressed one is
    decompressed again up to there. A file that was rewritten since, or while it is read, is an error.

    Args:
        paths: A path, a glob, or a sequence of these. Globs are looked up here, once, and sorted.
        decode: None: the line as `str`, without its end (LF or CR LF). `"json"`: the value in it; lines of nothing but
            white space are left out. A function: called with the line as `bytes`, for instance `orjson.loads`.
        encoding: The encoding of the text, in which a line must end with the single byte 10: not UTF-16 or UTF-32.
        interleave: How many files are read side by side, at least 1: one line of each in turn. The first reader has
            the files 0, `interleave`, 2 `interleave`, ..., the second 1, `interleave` + 1, ..., whatever their lengths.
        follow: Wait for more at the end of the last file, until the loader is closed; what comes after its last line
            end waits too. Needs watchfiles (`aioloader[watch]`), and a plain file.
        max_line_bytes: A longer line is an error: in a file without line ends nothing else bounds memory.
        max_window_bytes: A `.zst` file that needs a larger window is refused (`zstd --long=31` writes 2 GiB): that much
            of the output is kept while it is read. A file that is broken on purpose can ask for any size.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: `follow` without watchfiles, or `.zst` without something that reads it.
        ValueError: An argument is invalid.

    ```python
    loader = Pipeline(Lines("data/*.jsonl.gz", decode="json", interleave=4)).shuffle(buffer_size=10_000).batch(64)
    ```
    """

    def __init__(
        self,
        paths: Paths,
        *,
        decode: Literal["json"] | Decode | None = None,
        encoding: str = "utf-8",
        interleave: int = 1,
        follow: bool = False,
        max_line_bytes: int = 64 << 20,
        max_window_bytes: int = MAX_WINDOW_BYTES,
    ) -> None:
        self.paths = find_files(paths, source="Lines")
        _check_encoding(encoding)
        if isinstance(decode, str):
            if decode != "json":
                raise ValueError(f"decode must be None, 'json' or a function of bytes, got {decode!r}")
        elif decode is not None:
            check_callable("decode", decode, arguments=1, example="Lines(paths, decode=orjson.loads)")
        self.decode = decode
        self.encoding = encoding
        self.interleave = min(check_count("interleave", interleave, least=1), len(self.paths))
        self.follow = bool(follow)
        self.max_line_bytes = check_count("max_line_bytes", max_line_bytes, least=1)
        self.max_window_bytes = check_count("max_window_bytes", max_window_bytes, least=1)
        for path in self.paths:
            decompressor_for(path)  # raises if the package for it is not installed
        if self.follow:
            self._check_follow()

    @property
    def live(self) -> bool:
        return self.follow

    def _check_follow(self) -> None:
        require_watchfiles("Lines(follow=True)")
        if self.interleave > 1:
            raise ValueError(
                f"follow=True needs interleave=1, got {self.interleave}: a file that waits would hold up the others; "
                f"follow each by a source of its own and join them with Pipeline.merge"
            )
        if is_compressed(self.paths[-1]):
            raise ValueError(f"follow=True needs a plain file, got {self.paths[-1]!r}: pass it without follow")

    @cached_property
    def _names(self) -> dict[str, Any]:
        return names_of(self.paths)

    def identity(self) -> dict[str, Any]:
        return {**self._names, "interleave": self.interleave}

    def check_cursor(self, cursor: Any) -> None:
        if self.interleave == 1:
            self._place(0, cursor)
        else:
            _, cursors = self._places(cursor)
            for first, one in enumerate(cursors):
                self._place(first, one)

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        if self.interleave == 1:
            return self._reader(context, 0, cursor)
        turn, cursors = self._places(cursor)
        readers = [self._reader(context, first, one) for first, one in enumerate(cursors)]
        return _InTurn(readers, turn, [None if one is None else tuple(one) for one in cursors])

    def _places(self, cursor: Any) -> tuple[int, list[Any]]:
        """Whose turn is next, and the cursors of all readers."""
        if cursor is None:
            return 0, [None] * self.interleave
        turn, cursors = cursor_parts(cursor, 2)
        return as_count(turn, self.interleave - 1), cursor_parts(cursors, self.interleave)

    def _place(self, first: int, cursor: Any) -> tuple[int, LineStart]:
        """The file and the place in it where the reader with first file `first` resumes."""
        if cursor is None:
            return first, _BEGINNING
        index, offset, number, mark = cursor_parts(cursor, 4)
        start = as_count(offset), as_count(number), read_mark(mark)
        as_count(index)
        if index >= len(self.paths) + self.interleave or index % self.interleave != first:
            raise ValueError(f"the cursor is in file {index}, but there are {len(self.paths)}: the files have changed")
        return index, start

    def _reader(self, context: SourceContext, first: int, cursor: Any) -> Ahead:
        """A reader of every `interleave`-th file from `first` on, from `cursor` on."""
        index, begin = self._place(first, cursor)
        thread = context.threads(1)

        async def read() -> AsyncGenerator[list[Entry]]:
            start = begin
            for at in range(index, len(self.paths), self.interleave):
                async with aclosing(self._read_file(at, start, thread)) as lists:
                    async for entries in lists:
                        yield entries
                start = _BEGINNING

        return Ahead(context, read)

    def _parser(self, index: int, start: LineStart) -> LineParser:
        return LineParser(
            self.paths[index],
            index,
            start,
            decode=self.decode,
            encoding=self.encoding,
            max_line_bytes=self.max_line_bytes,
            max_window_bytes=self.max_window_bytes,
        )

    def _read_file(self, index: int, start: LineStart, thread: SourceThreads) -> AsyncGenerator[list[Entry]]:
        """The entries of one file, from `start` on."""
        parser = self._parser(index, start)
        following = self.follow and index == len(self.paths) - 1
        chunks = file_chunks(
            self.paths[index],
            thread,
            start=parser.start,
            needed=parser.needed,
            size=max(READ_BYTES // self.interleave, 64 << 10),
            follow=following,
        )
        return parsed(chunks, parser, thread, after=(index + self.interleave, 0, 0, None))


class _InTurn(EntryReader):
    """One entry of each reader in turn; those that have ended drop out.

    Cursor: whose turn is next, and the cursors of all readers.
    """

    def __init__(self, readers: list[Ahead], turn: int, cursors: list[Any]) -> None:
        self._readers: list[Ahead | None] = list(readers)
        self._cursors = cursors
        self._turn = turn
        self._open_readers = len(readers)

    async def read(self, limit: int) -> list[Entry]:
        entries: list[Entry] = []
        while self._open_readers and len(entries) < limit:
            turn = self._turn
            reader = self._readers[turn]
            if reader is not None and not reader.ready and entries:
                break  # give what is there instead of waiting
            taken = await reader.read(1) if reader is not None else []
            self._turn = (turn + 1) % len(self._readers)
            if taken:
                entry = taken[0]
                self._cursors[turn] = entry.cursor
                entry.cursor = (self._turn, tuple(self._cursors))
                entries.append(entry)
            elif reader is not None:
                self._readers[turn] = None
                self._open_readers -= 1
        return entries


def _check_encoding(encoding: str) -> None:
    """Refuse an encoding whose lines cannot be split at the byte 10.

    Raises:
        LookupError: Python does not know it.
        ValueError: It writes a line end in another way.
    """
    if not "a\n".encode(encoding).endswith(b"a\n"):
        raise ValueError(
            f"encoding must write a line end as the single byte 10, got {encoding!r}; convert the files, for instance "
            f"with iconv -t utf-8"
        )
