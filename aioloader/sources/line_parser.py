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

__all__ = ["Decode", "LineParser", "LineStart"]

Decode = Callable[[bytes], Any]

LineStart = tuple[int, int, int | None]
"""Where to begin: byte offset, number of the line before, mark."""

MOST_LINES: Final = 256
"""Decoded between two looks at the clock."""

SHOWN_BYTES: Final = 40
"""Of a line that is wrong, in its error."""

_JSON: Final = json.JSONDecoder()
_LIKE_ASCII: Final = {"utf-8", "ascii"}  # ASCII bytes are ASCII characters, whatever is before them


class LineParser(Parser):
    """The lines of one file.

    What stands behind the last line end of a piece is kept for the next; of a line that grows past the limit only the
    length and the beginning are kept. Lines are decoded, and made entries, some at a time by loops that run in C: with
    a fast parser these would cost as much as it does. JSON in ASCII is not even cut into lines: its parser is told
    where to begin, and where it stopped must be the line's end. From the first line on for which that is not so (it
    is blank, or wrong) the piece is taken line by line, which finds out what is the matter.
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
    ) -> None:
        self._offset, self._number, mark = start
        super().__init__(path, self._offset, mark, max_window_bytes, least=1)
        self._index = index
        self._encoding = encoding
        self._ours = not callable(decode)
        self._skips_blank = decode == "json"
        self._decode_all = _decoder(decode, encoding)
        self._longest = max_line_bytes
        self._too_long: tuple[int, bytes] | None = None  # a line that comes before `lines`: length and beginning
        self._lines: list[bytes] = []
        self._at = 0  # in `lines`: those before it have been used
        self._may_scan = decode == "json" and codecs.lookup(encoding).name in _LIKE_ASCII
        self._text = ""  # JSON values that come after `lines`, each with its line end
        self._text_at = 0  # in `text`: what is before it has been used
        self._some = 1  # lines at a time
        self._half: list[bytes] = []  # of the line whose end has not come yet
        self._half_bytes = 0
        self._cut_off = False  # the line at hand has no end

    def _feed(self, piece: bytes) -> None:
        if self.trail.before not in (b"\n", b""):
            piece = self._end_given(piece)
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

    def _end_given(self, piece: bytes) -> bytes:
        """What comes after a last line without an end, which was given as it was: if it is the end, all is well."""
        self.trail.before = b""
        line_end = piece[: 1 + piece.startswith(b"\r\n")]
        if not line_end.endswith(b"\n"):
            raise BrokenDataError(f"there is no line end before the byte to go on at: {changed_since(self._offset)}")
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
        if self._half_bytes > self._longest:
            beginning = b"".join(self._half)[:SHOWN_BYTES]
            self._half = [beginning + piece[: SHOWN_BYTES - len(beginning)]]
        elif piece:
            self._half.append(piece)

    def _end_half(self, piece: bytes) -> None:
        """`piece` ends the line that was kept; it is the next one."""
        self._keep(piece)
        self._at = 0
        if self._half_bytes > self._longest:
            self._too_long = (self._half_bytes, self._half[0])
            self._lines = []
        else:
            self._lines = [b"".join(self._half)]
        self._half.clear()
        self._half_bytes = 0

    def _take(self, entries: list[Entry], deadline: float) -> bool:
        if self._too_long is not None:
            (length, beginning), self._too_long = self._too_long, None
            entries.append(self._failed(_refusal(length, self._longest), beginning, length))
        now = perf_counter()
        while (by_line := self._at < len(self._lines)) or self._text:
            if by_line:
                self._take_some(entries, self._lines[self._at : self._at + self._some])
            else:
                self._scan_some(entries)
            before, now = now, perf_counter()
            if now > deadline:
                self._some = max(1, self._some // 2)
                return True
            if now - before < PARSE_SECONDS / 16:
                self._some = min(2 * self._some, MOST_LINES)
        return False

    def _take_some(self, entries: list[Entry], lines: list[bytes]) -> None:
        """The entries of the next `lines`, up to one that fails."""
        ends = list(accumulate([len(line) + 1 for line in lines], initial=self._offset))
        values: list[Any] = []
        failure: BaseException | None = None
        try:
            if max(map(len, lines)) > self._longest:
                fine = next(at for at, line in enumerate(lines) if len(line) > self._longest)
                values += self._decode_all(lines[:fine])
                raise _refusal(len(lines[fine]), self._longest)
            values += self._decode_all(lines)  # `+=` keeps what came before a failure
        except BaseException as error:  # also what ends a program: it is the consumer's, at this place
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

    def _scan_some(self, entries: list[Entry]) -> None:
        """The entries of the next values in `text`; at one that is not its line, go on line by line."""
        text, start, longest = self._text, self._text_at, self._longest
        base = self._offset - start  # of bytes, each of which is a character
        values: list[Any] = []
        ends: list[int] = []
        try:
            while start < len(text) and len(ends) < self._some:
                end = text.index("\n", start)
                value, stop = _JSON.raw_decode(text, start)
                if (stop != end and (stop > end or text[stop:end].strip(" \t\r"))) or end - start > longest:
                    raise ValueError("it is not the line")
                values.append(value)
                start = end + 1
                ends.append(base + start)
        except Exception:  # whatever it is, it is found again, in the line alone
            self._lines, self._at = _split(text[start:].encode()), 0
            self._text = ""
        else:
            self._text_at = start
            if start == len(text):
                self._text = ""
        self._add(entries, values, ends)

    def _add(self, entries: list[Entry], values: list[Any], ends: list[int]) -> None:
        """The entries of the next `values`, whose lines have these `ends`."""
        if not values:
            return
        numbers = range(self._number + 1, self._number + 1 + len(values))
        path = self.path
        entries += map(
            Entry,
            values,
            zip(repeat(self._index), ends, numbers, self.trail.marks(ends)),
            [f"{path}:{number}" for number in numbers],
            repeat(0),
        )
        self._offset = ends[-1]
        self._number += len(values)

    def _cursor(self) -> tuple[int, int, int, int | None]:
        """After the line that was taken last."""
        return self._index, self._offset, self._number, self.trail.mark(self._offset)

    def _failed(self, error: BaseException, line: bytes, length: int) -> Entry:
        """The entry of the next line, which cannot be used: our errors say where themselves, the user's in a note.

        Args:
            error: What is wrong.
            line: The line, or its beginning.
            length: Of all of it.
        """
        if error.__traceback__ is not None:  # without the frame of `_take_some`, which holds the entries before it
            error.__traceback__ = error.__traceback__.tb_next
        begin = self._offset
        self._offset += length + 1
        self._number += 1
        cursor, key = self._cursor(), f"{self.path}:{self._number}"
        what = f"{self.path}, line {self._number}, byte {begin}"
        if self._cut_off:
            what += " (the last line, which has no line end: the file was cut off, or is still being written)"
        if isinstance(error, UnicodeDecodeError) and self._ours:
            what += f": not {self._encoding}: {error.reason} at byte {error.start} of the line"
        elif isinstance(error, json.JSONDecodeError) and self._ours:
            what += f": not JSON: {error.msg} at character {error.pos} of {len(error.doc)}"
            if line.startswith(codecs.BOM_UTF8):
                what += "; the line begins with a byte order mark: pass encoding='utf-8-sig'"
        elif isinstance(error, _LongLineError):
            what += f": {error}"
        elif isinstance(error, RecursionError | ValueError) and self._ours:  # nested too deeply, a number too long
            what += f": {error}; pass a function as decode= if it is to be read"
        else:
            add_note(error, f"aioloader: {what}, which begins {line[:SHOWN_BYTES]!r}")
            return failed(error, cursor, key)
        if line:
            what += f"; the line begins {line[:SHOWN_BYTES]!r}"
        broken = BrokenDataError(what)
        broken.__cause__ = error if not isinstance(error, _LongLineError) else None
        return failed(broken, cursor, key)


class _LongLineError(Exception):
    """Only between raising it and `_failed`."""


def _refusal(length: int, longest: int) -> _LongLineError:
    return _LongLineError(
        f"a line of {length} bytes, and at most {longest} are taken; pass a larger max_line_bytes, unless the file has "
        f"other line ends than LF"
    )


def _split(lines: bytes) -> list[bytes]:
    """Lines, the last one too with its end, to lines without. `bytes.split` takes four times as long for a kilobyte."""
    return [line[:-1] for line in BytesIO(lines)]


def _decoder(decode: Literal["json"] | Decode | None, encoding: str) -> Callable[[list[bytes]], Iterable[Any]]:
    """From lines as bytes to samples, each as it is asked for."""
    if decode is None:
        return partial(_texts, methodcaller("decode", encoding))
    if callable(decode):
        return partial(_texts, decode)
    # What `json.loads` comes to, without its looking for the encoding of each line.
    to_text, to_value = methodcaller("decode", encoding), _JSON.decode
    return lambda lines: map(to_value, map(to_text, lines))


def _texts(decode: Decode, lines: list[bytes]) -> Iterable[Any]:
    """Of lines without the first half of CR LF."""
    return map(decode, [line.removesuffix(b"\r") for line in lines])
