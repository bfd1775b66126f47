"""`Lines`: the lines of text files, or the JSON values in them."""

from asyncio import Event
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, Literal, Unpack, overload

from aioloader.core.checks import check_callable, check_count
from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.entry import Entry
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import SourceContext, SourceThreads
from aioloader.core.typevars import T_co
from aioloader.sources.compressed import MAX_WINDOW_BYTES, decompressor_for, is_compressed
from aioloader.sources.file_events import require_watchfiles
from aioloader.sources.file_order import FileOrder
from aioloader.sources.file_source import FileSource
from aioloader.sources.in_order import InOrder
from aioloader.sources.line_parser import Decode, LineParser, LineStart
from aioloader.sources.marks import read_mark
from aioloader.sources.options import LinesOptions
from aioloader.sources.pace import Pace
from aioloader.sources.parsing import OffsetQuota, parsed, stored_chunks
from aioloader.sources.paths import Paths
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import find_stored_files
from aioloader.sources.stores import Version, read_version

__all__ = ["Lines"]

_Start = tuple[LineStart, str | None]  # and the version of an object
_Part = tuple[int, int, _Start]  # position in the order, number, and where to begin
_BEGINNING: Final[_Start] = ((0, 0, None), None)


class Lines(FileSource[_Start, T_co]):
    """The lines of files, in order: text, or JSON values.

    Files that end in `.gz` or `.zst` are decompressed. They are read in large pieces in a thread, which decodes too. A
    line that cannot be decoded raises in its position, with file, line number and byte offset, and so does a file that
    cannot be opened or ends too early (`.gz`, `.zst`); what comes after it goes on.

    Cursor: file, byte offset, line number, a mark of what is before, see `aioloader.sources.marks`, and the version of
    an object; with `interleave` those of each open file. Reading resumes at the offset of a plain file; a compressed
    one is decompressed again up to there. A file that was rewritten since, or while it is read, is an error.

    Args:
        paths: Paths, globs, or URLs of what obstore opens (`s3://`, `gs://`, `az://`, `https://`), one or a sequence;
            `{000..099}` and `{a,b}` are expanded. Globs are looked up here, once, and sorted. With `store`: keys in it.
        decode: None: the line as `str`, without its end (LF or CR LF). `"json"`: the value in it; lines of nothing but
            white space are left out. A function: called with the line as `bytes`, for instance `orjson.loads`.
        encoding: The encoding of the text, in which a line must end with the single byte 10: not UTF-16 or UTF-32.
        shuffle: The files come in another order in each epoch, and in each round of a `repeat`: a permutation that
            depends on these and `seed` alone, so all ranks have the same.
        seed: See `shuffle`.
        interleave: How many files are read side by side, at least 1: one line of each in turn. The first reader has
            the files 0, `interleave`, 2 `interleave`, ..., the second 1, `interleave` + 1, ..., whatever their lengths.
        follow: Wait for more at the end of the last file, until the loader is closed; what comes after its last line
            end waits too. Needs watchfiles (`aioloader[watch]`), and a plain file.
        store: A store of obstore (`aioloader[objects]`).
        client_options, retry_config: For URLs and `store`: timeouts and retries in place of the store's own, as obstore
            names them.
        retry, timeout, hedge, rate: What is done about requests that fail, take long or are too many, as in
            `Pipeline.map`, for each request for itself. With `retry`, the store makes no retries of its own.
        max_line_bytes: A longer line is an error: in a file without line ends nothing else bounds memory.
        max_window_bytes: A `.zst` file that needs a larger window is refused (`zstd --long=31` writes 2 GiB): that much
            of the output is kept while it is read. A file that is broken on purpose can ask for any size.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: `follow` without watchfiles, a URL without obstore, or `.zst` without something that reads it.
        ValueError: An argument is invalid.

    ```python
    loader = Pipeline(Lines("data/*.jsonl.gz", decode="json", interleave=4)).shuffle(buffer_size=10_000).batch(64)
    ```
    """

    @overload
    def __init__(self: "Lines[str]", paths: Paths, *, decode: None = None, **options: Unpack[LinesOptions]) -> None: ...

    @overload
    def __init__(
        self: "Lines[Any]", paths: Paths, *, decode: Literal["json"], **options: Unpack[LinesOptions]
    ) -> None: ...

    @overload
    def __init__(self, paths: Paths, *, decode: Callable[[bytes], T_co], **options: Unpack[LinesOptions]) -> None: ...

    def __init__(
        self,
        paths: Paths,
        *,
        decode: Literal["json"] | Decode | None = None,
        encoding: str = "utf-8",
        shuffle: bool = False,
        seed: int = 0,
        interleave: int = 1,
        follow: bool = False,
        store: Any = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        max_line_bytes: int = 64 << 20,
        max_window_bytes: int = MAX_WINDOW_BYTES,
    ) -> None:
        options = {"client_options": client_options, "retry_config": retry_config}
        policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
        self._files, self._requests = find_stored_files(paths, store, options, policies, source="Lines")
        _check_encoding(encoding)
        if isinstance(decode, str):
            if decode != "json":
                raise ValueError(f"decode must be None, 'json' or a function of bytes, got {decode!r}")
        elif decode is not None:
            check_callable("decode", decode, arguments=1, example="Lines(paths, decode=orjson.loads)")
        self.decode = decode
        self.encoding = encoding
        self._set_order(shuffle, seed, interleave)
        self.follow = bool(follow)
        self.max_line_bytes = check_count("max_line_bytes", max_line_bytes, least=1)
        self.max_window_bytes = check_count("max_window_bytes", max_window_bytes, least=1)
        for file in self._files:
            decompressor_for(file.key)  # raises if the package for it is not installed
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
        last = self._files[-1]
        if last.store is not None or is_compressed(last.key):
            kind = "file of this machine" if last.store is not None else "plain file"
            raise ValueError(f"follow=True needs a {kind}, got {safe_repr(last.url)}: pass it without follow")
        if self.shuffle:
            raise ValueError("follow=True waits at the end of the last file, got shuffle=True; leave one of them out")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, URLs or keys of the files, in order."""
        return tuple(file.url for file in self._files)

    @property
    def may_be_dealt(self) -> bool:
        return super().may_be_dealt and not self.follow

    def dealt(self, rank: int, world_size: int, even: str | None) -> "Lines[T_co]":
        if self.follow:
            raise ValueError(
                "shard(by='file') deals files that end, and with follow=True the last one does not; pass by='sample'"
            )
        return super().dealt(rank, world_size, even)

    def _parse(self, cursor: object) -> tuple[Any, _Start]:
        if cursor is None:
            return 0, _BEGINNING
        parts = cursor_sequence(cursor)
        version = parts.pop() if len(parts) == 5 else None  # of an object
        index, offset, number, mark = cursor_parts(parts, 4)
        return index, ((as_count(offset), as_count(number), read_mark(mark)), read_version(version))

    def _opener(self, context: SourceContext, order: FileOrder) -> Callable[[int, _Start], InOrder[_Part]]:
        requests = self._requests.begin(context)
        pace = Pace(order.lanes, len(order.numbers), lambda: context.consumer_starves)

        def read(part: _Part, thread: SourceThreads, turn: Event) -> AsyncGenerator[list[Entry]]:
            return self._read_file(part, thread, pace, turn, requests)

        def quota_of(part: _Part) -> OffsetQuota | None:
            stored = self._files[part[1]].store is not None
            return OffsetQuota(lambda: pace.ahead_bytes) if stored else None

        def open_lane(at: int, start: _Start) -> InOrder[_Part]:
            # One that is followed is opened when those before it have been read.
            ahead = 0 if self.follow else 1
            parts = self._parts(order, at, start)
            return InOrder(
                context,
                parts,
                read,
                open_ahead=ahead,
                lists_ahead=1,
                quota_of=quota_of,
                starved=pace.starved,
            )

        return open_lane

    async def _parts(self, order: FileOrder, at: int, start: _Start) -> AsyncGenerator[_Part]:
        """The files of a lane from position `at` on; the first begins at `start`."""
        for position, number in order.places(at):
            yield position, number, start
            start = _BEGINNING

    def _read_file(
        self, part: _Part, thread: SourceThreads, pace: Pace, turn: Event, requests: Requests | None
    ) -> AsyncGenerator[list[Entry]]:
        position, number, (start, known) = part
        file = self._files[number]
        version = Version(file.store, file.key, known)
        parser = self._parser(number, start, position, version)
        following = self.follow and number == len(self._files) - 1
        chunks = stored_chunks(file, version, parser, thread, requests, pace, turn, follow=following)
        return parsed(chunks, parser, thread, after=(position + pace.lanes, *_BEGINNING[0]))

    def _parser(
        self, number: int, start: LineStart, position: int | None = None, version: Version | None = None
    ) -> LineParser:
        return LineParser(
            self._files[number].name,
            number if position is None else position,
            start,
            decode=self.decode,
            encoding=self.encoding,
            max_line_bytes=self.max_line_bytes,
            max_window_bytes=self.max_window_bytes,
            version=version,
        )


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
