"""The lines in the bytes of a file, decoded as fast as a parser that is written in C."""

import codecs
import json
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from itertools import accumulate, repeat
from math import inf
from operator import methodcaller
from time import perf_counter
from typing import Any, Final, Literal

from aioloader.core.entry import Entry
from aioloader.core.safe_text import add_note
from aioloader.errors import BrokenDataError
from aioloader.sources.marks import changed_since
from aioloader.sources.parsing import PARSE_SECONDS, Parser
from aioloader.sources.read_ahead import failed
from aioloader.sources.stores import Version

__all__ = ["Decode", "LineParser", "LineStart"]

Decode = Callable[[bytes], Any]

LineStart = tuple[int, int, int | None]
"""Where reading begins: byte offset, number of the line before it, mark."""

MOST_LINES: Final = 256
"""The most lines that are decoded between two looks at the clock."""

SHOWN_BYTES: Final = 40
"""How much of a broken line its error shows."""

_JSON: Final = json.JSONDecoder()
_LIKE_ASCII: Final = {"utf-8", "ascii"}  # an ASCII byte is that character, whatever comes before it


class LineParser(Parser):
    """The lines of one file.

    What comes after the last line end of a piece is kept for the next one; of a line that grows past the limit only the
    length and the beginning are kept. Lines are decoded and made entries in groups, by loops that run in C: with a fast
    parser, Python loops would cost as much as the parser. JSON in ASCII is not even split into lines: the parser is
    told where to begin, and must stop at the line's end. From the first line on where it does not (it is blank, or
    broken), the piece is read line by line, which finds out what is wrong.
    """

    def __init__(
        self,
        path: str,
        index: int,
        start: LineStart,
        *,
        decode: Literal["json"] | Decode | None,
        encoding: str,
        max_line_bytes: int,
        max_window_bytes: int,
        version: Version | None = None,
    ) -> None:
        self._offset, self._number, mark = start
        super().__init__(path, self._offset, mark, max_window_bytes, least=1)
        self._index = index
        self._version = version
        self._encoding = encoding
        self._has_own_decoder = not callable(decode)
        self._skips_blank = decode == "json"
        self._decode_all = _decoder(decode, encoding)
        self._max_line_bytes = max_line_bytes
        self._too_long: tuple[int, bytes] | None = None  # length and beginning of a line that comes before `lines`
        self._lines: list[bytes] = []
        self._at = 0  # how many of `lines` have been used
        self._may_scan = decode == "json" and codecs.lookup(encoding).name in _LIKE_ASCII
        self._text = ""  # lines of JSON that come after `lines`
        self._text_at = 0  # how much of `text` has been used
        self._group = 1  # how many lines are decoded at a time
        self._half: list[bytes] = []  # the line whose end has not come yet
        self._half_bytes = 0
        self._cut_off = False  # the last line has no end

    def _feed(self, piece: bytes) -> None:
        piece = bytes(piece)  # what comes from a store is none; it costs nothing where it is
        if self.trail.before not in (b"\n", b""):
            piece = self._skip_line_end(piece)
        end = piece.rfind(b"\n")
        if end >= 0:
            first = piece.index(b"\n")
            self._end_half(piece[:first])
            if first < end:
                lines = piece[first + 1 : end + 1]
                if self._may_scan and lines.isascii():
                    self._text, self._text_at = lines.decode("ascii"), 0
                else:
                    self._lines += _split(lines)
            piece = piece[end + 1 :]
        self._keep(piece)

    def _skip_line_end(self, piece: bytes) -> bytes:
        """Skip the line end of the last line, which had none when it was given."""
        self.trail.before = b""
        line_end = piece[: 1 + piece.startswith(b"\r\n")]
        if not line_end.endswith(b"\n"):
            raise BrokenDataError(f"there is no line end before the byte to resume at: {changed_since(self._offset)}")
        self._offset += len(line_end)
        return piece[len(line_end) :]

    def _finish(self) -> list[Entry]:
        if not self._half_bytes:
            return []
        self._end_half(b"")
        self._cut_off = True
        entries: list[Entry] = []
        self._take(entries, inf)
        self._offset -= 1  # there was no line end
        for entry in entries:
            entry.cursor = self._cursor()
        return entries

    def _keep(self, piece: bytes) -> None:
        self._half_bytes += len(piece)
        if self._half_bytes > self._max_line_bytes:
            beginning = b"".join(self._half)[:SHOWN_BYTES]
            self._half = [beginning + piece[: SHOWN_BYTES - len(beginning)]]
        elif piece:
            self._half.append(piece)

    def _end_half(self, piece: bytes) -> None:
        """Complete the line that was kept with `piece`; it is the next line."""
        self._keep(piece)
        self._at = 0
        if self._half_bytes > self._max_line_bytes:
            self._too_long = (self._half_bytes, self._half[0])
            self._lines = []
        else:
            self._lines = [b"".join(self._half)]
        self._half.clear()
        self._half_bytes = 0

    def _take(self, entries: list[Entry], deadline: float) -> bool:
        if self._too_long is not None:
            (length, beginning), self._too_long = self._too_long, None
            entries.append(self._failed(_long_line(length, self._max_line_bytes), beginning, length))
        now = perf_counter()
        while (by_line := self._at < len(self._lines)) or self._text:
            if by_line:
                self._take_lines(entries, self._lines[self._at : self._at + self._group])
            else:
                self._scan_text(entries)
            before, now = now, perf_counter()
            if now > deadline:
                self._group = max(1, self._group // 2)
                return True
            if now - before < PARSE_SECONDS / 16:
                self._group = min(2 * self._group, MOST_LINES)
        return False

    def _take_lines(self, entries: list[Entry], lines: list[bytes]) -> None:
        """Add the entries of `lines`, up to one that fails."""
        ends = list(accumulate([len(line) + 1 for line in lines], initial=self._offset))
        values: list[Any] = []
        failure: BaseException | None = None
        try:
            if max(map(len, lines)) > self._max_line_bytes:
                too_long = next(at for at, line in enumerate(lines) if len(line) > self._max_line_bytes)
                values += self._decode_all(lines[:too_long])
                raise _long_line(len(lines[too_long]), self._max_line_bytes)
            values += self._decode_all(lines)  # `+=` keeps what came before a failure
        except BaseException as error:  # also SystemExit and the like: the consumer gets it, in this position
            failure = error
        count = len(values)
        self._at += count
        self._add(entries, values, ends[1 : count + 1])
        if failure is not None:
            self._at += 1
            line = lines[count]
            if self._skips_blank and not line.strip():
                self._offset = ends[count + 1]
                self._number += 1
            else:
                entries.append(self._failed(failure, line, len(line)))

    def _scan_text(self, entries: list[Entry]) -> None:
        """Add the entries of the next values in `text`; from one that is not all of its line, go on line by line."""
        text, start, max_bytes = self._text, self._text_at, self._max_line_bytes
        base = self._offset - start  # of bytes, each of which is a character
        values: list[Any] = []
        ends: list[int] = []
        try:
            while start < len(text) and len(ends) < self._group:
                end = text.index("\n", start)
                value, stop = _JSON.raw_decode(text, start)
                if (stop != end and (stop > end or text[stop:end].strip(" \t\r"))) or end - start > max_bytes:
                    raise ValueError("the value is not all of the line")
                values.append(value)
                start = end + 1
                ends.append(base + start)
        except Exception:  # reading the line alone will raise it again
            self._lines, self._at = _split(text[start:].encode()), 0
            self._text = ""
        else:
            self._text_at = start
            if start == len(text):
                self._text = ""
        self._add(entries, values, ends)

    def _add(self, entries: list[Entry], values: list[Any], ends: list[int]) -> None:
        """Add the entries of the next `values`, whose lines have these `ends`."""
        if not values:
            return
        numbers = range(self._number + 1, self._number + 1 + len(values))
        path = self.path
        entries += map(
            Entry,
            values,
            zip(repeat(self._index), ends, numbers, self.trail.marks(ends), *map(repeat, self._version_mark())),
            [f"{path}:{number}" for number in numbers],
            repeat(0),
        )
        self._offset = ends[-1]
        self._number += len(values)

    def _version_mark(self) -> tuple[str, ...]:
        """What cursors have of the version of an object; none of a file has it."""
        return () if self._version is None or self._version.mark is None else (self._version.mark,)

    def _cursor(self) -> tuple[Any, ...]:
        """The cursor after the last line."""
        return self._index, self._offset, self._number, self.trail.mark(self._offset), *self._version_mark()

    def _failed(self, error: BaseException, line: bytes, length: int) -> Entry:
        """The entry of the next line, which is broken: our own errors name the place, the user's get a note.

        Args:
            error: What is wrong.
            line: The line, or its beginning.
            length: The length of the line.
        """
        if error.__traceback__ is not None:  # drop the frame of `_take_lines`, which holds the entries before it
            error.__traceback__ = error.__traceback__.tb_next
        begin = self._offset
        self._offset += length + 1
        self._number += 1
        cursor, key = self._cursor(), f"{self.path}:{self._number}"
        what = f"{self.path}, line {self._number}, byte {begin}"
        if self._cut_off:
            what += " (the last line, which has no line end: the file was cut off, or is still being written)"
        if isinstance(error, UnicodeDecodeError) and self._has_own_decoder:
            what += f": not {self._encoding}: {error.reason} at byte {error.start} of the line"
        elif isinstance(error, json.JSONDecodeError) and self._has_own_decoder:
            what += f": not JSON: {error.msg} at character {error.pos} of {len(error.doc)}"
            if line.startswith(codecs.BOM_UTF8):
                what += "; the line begins with a byte order mark: pass encoding='utf-8-sig'"
        elif isinstance(error, _LongLineError):
            what += f": {error}"
        elif (
            isinstance(error, RecursionError | ValueError) and self._has_own_decoder
        ):  # nested too deeply, a number too long
            what += f": {error}; pass a function as decode= to read it"
        else:
            add_note(error, f"aioloader: {what}, which begins {line[:SHOWN_BYTES]!r}")
            return failed(error, cursor, key)
        if line:
            what += f"; the line begins {line[:SHOWN_BYTES]!r}"
        broken = BrokenDataError(what)
        broken.__cause__ = error if not isinstance(error, _LongLineError) else None
        return failed(broken, cursor, key)


class _LongLineError(Exception):
    """Raised by this module and caught in it."""


def _long_line(length: int, max_line_bytes: int) -> _LongLineError:
    return _LongLineError(
        f"a line of {length} bytes, and at most {max_line_bytes} are allowed; pass a larger max_line_bytes, unless the "
        f"file has line ends other than LF"
    )


def _split(lines: bytes) -> list[bytes]:
    """Remove the line ends, which the last line has too. `bytes.split` takes four times as long for a kilobyte."""
    return [line[:-1] for line in BytesIO(lines)]


def _decoder(decode: Literal["json"] | Decode | None, encoding: str) -> Callable[[list[bytes]], Iterable[Any]]:
    """A lazy function from lines as bytes to samples."""
    if decode is None:
        return partial(_texts, methodcaller("decode", encoding))
    if callable(decode):
        return partial(_texts, decode)
    # The same as `json.loads`, which would also detect the encoding of each line.
    to_text, to_value = methodcaller("decode", encoding), _JSON.decode
    return lambda lines: map(to_value, map(to_text, lines))


def _texts(decode: Decode, lines: list[bytes]) -> Iterable[Any]:
    """Decode lines without the CR of CR LF."""
    return map(decode, [line.removesuffix(b"\r") for line in lines])
