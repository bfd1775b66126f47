"""`Lines`: text and JSON, compressed, side by side, growing, and broken in every way that a file can be."""

import gzip
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aioloader import BrokenDataError, Pipeline
from aioloader.core.entry import Entry
from aioloader.sources import Lines
from aioloader.sources.file_events import folders_of_links
from tests._cursor_sources import Opened, assert_opens_at_every_cursor, outcomes
from tests._support import Child, Face, Steps, collect, on_both_faces

WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.ZstdCompressor().compress(content),
}
in_every_compression = pytest.mark.parametrize("suffix", WRITERS)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    """Writes a file, compressed as its name says, and returns its path."""

    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(WRITERS[path.suffix if path.suffix in WRITERS else ""](content))
        return str(path)

    return write


Write = Callable[[str, bytes], str]


# -- what comes --------------------------------------------------------------------------------------------------------


@on_both_faces
@in_every_compression
def test_lines_of_several_files_come_in_order_without_their_ends(write: Write, suffix: str, face: Face) -> None:
    paths = [
        write(f"1.txt{suffix}", "grüße\nwindows\r\n\nlast".encode()),
        write(f"2.txt{suffix}", b""),
        write(f"3.txt{suffix}", b"\nend\n"),
    ]
    assert collect(Pipeline(Lines(paths)), face) == ["grüße", "windows", "", "last", "", "end"]


@on_both_faces
def test_json_values_come_and_blank_lines_do_not(write: Write, face: Face) -> None:
    path = write("data.jsonl", b'{"a": 1}\r\n\n[2]\n   \n"three"')
    assert collect(Pipeline(Lines(path, decode="json")), face) == [{"a": 1}, [2], "three"]


def test_a_function_gets_the_bytes_of_each_line(write: Write) -> None:
    path = write("data.jsonl", b'{"a": 1}\r\n{"a": 2}\n')
    assert list(Pipeline(Lines(path, decode=orjson.loads))) == [{"a": 1}, {"a": 2}]
    assert list(Pipeline(Lines(path, decode=len))) == [8, 8]


def test_other_encodings(write: Write) -> None:
    assert list(Pipeline(Lines(write("old.txt", "é\nß\n".encode("latin-1")), encoding="latin-1"))) == ["é", "ß"]
    assert list(Pipeline(Lines(write("bom.txt", "é\nß\n".encode("utf-8-sig")), encoding="utf-8-sig"))) == ["é", "ß"]


def test_a_glob_is_sorted_and_a_file_with_that_very_name_comes_first(write: Write, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt", "c1.txt"):
        write(name, name.encode())
    (tmp_path / "folder.txt").mkdir()
    assert list(Pipeline(Lines(tmp_path / "*.txt"))) == ["a.txt", "b.txt", "c1.txt", "c[1].txt"]
    assert list(Pipeline(Lines(str(tmp_path / "c[1].txt")))) == ["c[1].txt"]


@in_every_compression
def test_a_long_line_among_short_ones(write: Write, suffix: str) -> None:
    """Longer than what is read at once, from files whose pieces end in the middle of it."""
    lines = ["a", "b" * 3_000_000, "c", "d" * 1_500_000]
    path = write(f"long.txt{suffix}", "\n".join(lines).encode())
    assert list(Pipeline(Lines(path))) == lines


def test_several_gzip_members_and_zstd_frames_are_one_file(write: Write, tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"parts{suffix}"
        path.write_bytes(WRITERS[suffix](b"1\n2") + WRITERS[suffix](b"") + WRITERS[suffix](b"0\n3\n"))
        assert list(Pipeline(Lines(path))) == ["1", "20", "3"]
    padded = tmp_path / "padded.gz"
    padded.write_bytes(gzip.compress(b"1\n") + bytes(1000))
    assert list(Pipeline(Lines(padded))) == ["1"]


def test_much_zero_in_little_gzip_comes_in_bounded_pieces(tmp_path: Path) -> None:
    """64 MiB from 64 KiB, refused as a line that is too long, and the next line follows."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(64 << 20) + b"\nnext\n"))
    found = outcomes(Lines(path, max_line_bytes=1 << 20))
    assert "byte 0: a line of 67108864 bytes, and at most 1048576 are allowed; pass a larger max_line_bytes" in found[0]
    assert found[1:] == ["next"]


# -- several files side by side ----------------------------------------------------------------------------------------


def in_turn(files: list[list[str]], count: int) -> list[str]:
    """The rule in plain words: `count` readers, each with every `count`-th file, one line of each in turn."""
    readers: list[Iterator[str]] = [chain.from_iterable(files[first::count]) for first in range(min(count, len(files)))]
    found = []
    while readers:
        for reader in list(readers):
            line = next(reader, None)
            if line is None:
                readers.remove(reader)
            else:
                found.append(line)
    return found


@on_both_faces
def test_files_side_by_side_come_one_line_of_each_in_turn(write: Write, face: Face) -> None:
    files = [
        [f"{name}{number}" for number in range(count)] for name, count in zip("abcde", (3, 1, 5, 0, 2), strict=True)
    ]
    paths = [
        write(f"{number}.txt", "".join(f"{line}\n" for line in file).encode()) for number, file in enumerate(files)
    ]
    for interleave in (1, 2, 3, 5, 9):
        assert collect(Pipeline(Lines(paths, interleave=interleave)), face) == in_turn(files, interleave)


# -- cursors -----------------------------------------------------------------------------------------------------------


@in_every_compression
@pytest.mark.parametrize("interleave", [1, 2, 3])
def test_it_opens_at_every_cursor(write: Write, suffix: str, interleave: int) -> None:
    paths = [
        write(f"1.jsonl{suffix}", b'1\n\n"\xc3\xa4"\r\nbroken\n3'),
        write(f"2.jsonl{suffix}", b""),
        str(Path(write("x", b"")).with_name("missing.jsonl")),
        write(f"3.jsonl{suffix}", b"\n4\n5\n\xff\n"),
    ]
    source = Lines(paths, decode="json", interleave=interleave)
    found = assert_opens_at_every_cursor(source)
    assert sorted(str(value) for value in found if not isinstance(value, str) or value == "ä") == [
        "1",
        "3",
        "4",
        "5",
        "ä",
    ]
    assert len(found) == 8  # and three errors


def test_a_cursor_that_does_not_fit_is_refused(write: Write) -> None:
    path = write("data.txt", b"1\n2\n3\n")
    with pytest.raises(ValueError, match="the cursor is in file 7, but there are 1: the files have changed"):
        next(iter(Pipeline(Opened(Lines(path), (7, 0, 0, None)))))
    with pytest.raises(ValueError, match="a list of 3 was expected"):
        next(iter(Pipeline(Opened(Lines([path] * 3, interleave=3), (0, [None, None])))))
    assert (
        "the file has 6 bytes now, and reading resumes at byte 60" in outcomes(Lines(path), cursor=(0, 60, 9, None))[0]
    )
    short = write("data.gz", b"1\n2\n3\n")
    assert (
        "data.gz: it ends 54 bytes before the place to resume at: it was changed"
        in outcomes(Lines(short), cursor=(0, 60, 9, None))[0]
    )


@in_every_compression
def test_a_thread_whose_time_is_always_up_gives_all_lines(
    write: Write, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether more lines follow or none: a turn of the thread that gives none is no end."""
    monkeypatch.setattr("aioloader.sources.parsing.PARSE_SECONDS", -1.0)
    paths = [write(f"{number}.jsonl{suffix}", b"1\n\n2\n \n[\n3\n\n") for number in range(2)]
    found = assert_opens_at_every_cursor(Lines(paths, decode="json"))
    assert [found[place] for place in (0, 1, 3, 4, 5, 7)] == [1, 2, 3, 1, 2, 3]


SPANNING = [b"[", b"1,", b"2]", b'"a', b'b"']  # two or three of them would be a value, were it not for the line ends
SPACED = [b"", b" ", b" 3", b"3 \t\r", b"3\x0b", b"3\x00"]
KINDS = [b"1", b'{"a": [2]}', b"\xff", '"é"'.encode(), b"{", b"12345678", b"x\r", *SPANNING, *SPACED]
LINES = st.lists(st.sampled_from(KINDS), max_size=12)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, ended=st.booleans(), cuts=st.lists(st.integers(0, 80)), longest=st.sampled_from([4, 1000]))
def test_where_the_pieces_end_makes_no_difference(
    lines: list[bytes], ended: bool, cuts: list[int], longest: int, tmp_path: Path
) -> None:
    """The entries of a content that comes in any pieces are those of the content in one, and those of its lines."""
    source = Lines(tmp_path / "any.txt", decode="json", max_line_bytes=longest)
    content = b"\n".join(lines) + (b"\n" if ended else b"")

    def entries(pieces: list[bytes], *, scans: bool = True) -> list[Any]:
        parser = source._parser(0, (0, 0, None))
        parser._may_scan = parser._may_scan and scans
        found: list[Entry] = []
        for piece in pieces:
            found += parser.parse(piece) if piece else []
            while parser.has_more:  # a thread that was not run for a while: its time was up
                found += parser.parse(b"")
        found += parser.finish()
        return [(entry.value, str(entry.error), entry.cursor, entry.key) for entry in found]

    bounds = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    whole = entries([content])
    assert entries([content[start:stop] for start, stop in pairwise(bounds)]) == whole
    assert entries([content], scans=False) == whole
    assert whole == [] or whole[-1][2][1] <= len(content)


# -- what is broken ----------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_broken_line_names_file_line_and_byte_and_the_rest_goes_on(write: Write, face: Face) -> None:
    path = write("data.jsonl", b'{"a": 1}\n{"a": \n\xff\xfe\n{"a": 4}\n')
    with Steps(Pipeline(Lines(path, decode="json")), face) as steps:
        found = steps.outcomes()
    assert (found[0], found[3]) == ({"a": 1}, {"a": 4})
    assert isinstance(found[1], BrokenDataError)
    assert isinstance(found[1].__cause__, json.JSONDecodeError)
    assert str(found[1]) == (
        f"{path}, line 2, byte 9: not JSON: Expecting value at character 6 of 6; the line begins b'{{\"a\": '"
    )
    assert isinstance(found[2].__cause__, UnicodeDecodeError)
    assert str(found[2]) == (
        f"{path}, line 3, byte 16: not utf-8: invalid start byte at byte 0 of the line; the line begins b'\\xff\\xfe'"
    )
    assert f"stage source(Lines), key '{path}:3', epoch 0, position 2" in found[2].__notes__[-1]


@on_both_faces
def test_json_that_python_does_not_take_is_an_error_at_its_place(write: Write, face: Face) -> None:
    """Nested too deeply, or a number with too many digits."""
    path = write("data.jsonl", b"1\n" + b"[" * 100_000 + b"\n3\n" + b"9" * 5000 + b"\n5\n")
    with Steps(Pipeline(Lines(path, decode="json")), face) as steps:
        one, deep, three, long, five = steps.outcomes()
    assert (one, three, five) == (1, 3, 5)
    for error, cause, line in (deep, RecursionError, 2), (long, ValueError, 4):
        assert type(error) is BrokenDataError
        assert isinstance(error.__cause__, cause)
        assert str(error).startswith(f"{path}, line {line}, byte ")
        assert "; pass a function as decode= to read it; the line begins b'" in str(error)


def test_half_a_line_of_json_at_the_end_says_so(write: Write) -> None:
    path = write("cut.jsonl", b'{"a": 1}\n{"a"')
    found = outcomes(Lines(path, decode="json"))
    assert found[0] == {"a": 1}
    assert (
        "line 2, byte 9 (the last line, which has no line end: the file was cut off, or is still being writt"
        in found[1]
    )


@on_both_faces
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_before_json_is_named_with_its_way_out(write: Write, suffix: str, face: Face) -> None:
    """Of a file that was written on Windows, and of one in the middle, where files were joined; the others come."""
    path = write(f"bom.jsonl{suffix}", b"\xef\xbb\xbf[1]\n[2]\n\xef\xbb\xbf[3]\n[4]")
    with Steps(Pipeline(Lines(path, decode="json")), face) as steps:
        first, second, third, fourth = steps.outcomes()
    assert (second, fourth) == ([2], [4])
    for number, error in ((1, first), (3, third)):
        assert isinstance(error, BrokenDataError)
        assert f"line {number}" in str(error)
        assert "byte order mark: pass encoding='utf-8-sig'" in str(error)
    with_it = Lines(path, decode="json", encoding="utf-8-sig")
    assert collect(Pipeline(with_it), face) == [[1], [2], [3], [4]]


def test_the_error_of_a_users_function_stays_what_it_is(write: Write) -> None:
    path = write("data.txt", b"1\none\n3\n")
    with Steps(Pipeline(Lines(path, decode=int)), "for") as steps:
        found = steps.outcomes()
    assert (found[0], found[2]) == (1, 3)
    assert type(found[1]) is ValueError
    assert found[1].__notes__[0] == f"aioloader: {path}, line 2, byte 2, which begins b'one'"


def test_too_long_a_line_is_refused_and_the_next_one_follows(write: Write) -> None:
    path = write("long.txt", b"1\n" + b"x" * 3_000_000 + b"\n2\n" + b"y" * 11 + b"\n3\n" + b"z" * 12)
    found = assert_opens_at_every_cursor(Lines(path, max_line_bytes=10))
    assert [found[0], found[2], found[4]] == ["1", "2", "3"]
    assert f"{path}, line 2, byte 2: a line of 3000000 bytes, and at most 10 are allowed" in found[1]
    assert "line 4, byte 3000005: a line of 11 bytes" in found[3]
    assert "a line of 12 bytes" in found[5]


@on_both_faces
def test_a_file_that_cannot_be_opened_stands_at_its_place(write: Write, tmp_path: Path, face: Face) -> None:
    (tmp_path / "folder").mkdir()
    paths = [write("1.txt", b"1"), str(tmp_path / "missing.txt"), str(tmp_path / "folder"), write("2.txt", b"2")]
    with Steps(Pipeline(Lines(paths)), face) as steps:
        found = steps.outcomes()
    assert [found[0], found[3]] == ["1", "2"]
    assert isinstance(found[1], FileNotFoundError)
    assert found[1].filename == paths[1]
    assert isinstance(found[2], IsADirectoryError)
    assert f"those in a folder pass a glob: '{paths[2]}/*'" in found[2].__notes__[0]


def test_permission_denied_stands_at_its_place() -> None:
    """In a process of its own, that gives up being root: root may read everything."""
    script = """
        import os, tempfile
        from pathlib import Path
        from aioloader.sources import Lines
        from tests._cursor_sources import outcomes

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            for number in range(3):
                (folder / f"{number}.txt").write_text(f"{number}")
            (folder / "1.txt").chmod(0)
            source = Lines(folder / "*.txt")
            outcomes(source)  # what is imported late is there now
            root = os.geteuid() == 0
            if root:
                os.seteuid(65534)
            found = outcomes(source)
            if root:
                os.seteuid(0)
            assert found == ["0", f"[Errno 13] Permission denied: '{folder}/1.txt'", "2"], found
    """
    with Child(script) as child:
        assert child.finish() == (0, "", "")


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".zst", "zstd")])
def test_a_truncated_file_gives_its_whole_lines_then_an_error_then_the_next_file(
    write: Write, suffix: str, name: str
) -> None:
    lines = [os.urandom(2000).hex() for _ in range(400)]  # long enough for several blocks
    path = Path(write(f"cut{suffix}", "".join(f"{line}\n" for line in lines).encode()))
    path.write_bytes(path.read_bytes()[:-100_000])
    found = outcomes(Lines([path, write("next.txt", b"next")]))
    assert found[-2:] == [f"{path}: the {name} data is truncated: it ends before its end mark", "next"]
    assert len(found) > 100
    assert found[:-2] == lines[: len(found) - 2]


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".zst", "zstd")])
def test_what_is_not_compressed_at_all_is_an_error(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"plain{suffix}"
    path.write_bytes(b"just text\n")
    assert f"{path}: the {name} data is broken: " in outcomes(Lines(path))[0]
    path.write_bytes(b"")
    assert outcomes(Lines(path)) == [f"{path}: the {name} data is truncated: it ends before its end mark"]


def test_arguments_that_cannot_work_are_refused_where_they_are_written(write: Write, tmp_path: Path) -> None:
    path = write("a.txt", b"")
    with pytest.raises(
        FileNotFoundError, match=r"no file matches the glob '.*\*\.jsonl', searched from '.*'; check the"
    ):
        Lines(tmp_path / "*.jsonl")
    with pytest.raises(ValueError, match="Lines needs at least one path, got none"):
        Lines([])
    with pytest.raises(TypeError, match="Lines takes a path, a glob, or a sequence of them; got 3"):
        Lines(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"Lines takes paths as str or os\.PathLike; got b'a' of type bytes"):
        Lines([b"a"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"decode must be None, 'json' or a function of bytes, got 'yaml'"):
        Lines(path, decode="yaml")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="decode must be a function"):
        Lines(path, decode=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="encoding must write a line end as the single byte 10, got 'utf-16'"):
        Lines(path, encoding="utf-16")
    with pytest.raises(LookupError, match="klingon"):
        Lines(path, encoding="klingon")
    with pytest.raises(ValueError, match="interleave must be at least 1, got 0"):
        Lines(path, interleave=0)
    with pytest.raises(ValueError, match="follow=True needs interleave=1, got 2"):
        Lines([path, path], interleave=2, follow=True)
    with pytest.raises(ValueError, match=r"follow=True needs a plain file, got '.*a\.gz'"):
        Lines(write("a.gz", b""), follow=True)


def test_what_is_not_installed_is_named_with_its_command(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(
        ImportError, match=r"Lines\(follow=True\) needs the package watchfiles: pip install 'aioloader\[w"
    ):
        Lines(write("a.txt", b""), follow=True)
    if sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(ImportError, match=r"reading \.zst files needs Python 3\.14, .* 'aioloader\[zstd\]'"):
            Lines(write("a.zst", b""))


# -- a file that grows -------------------------------------------------------------------------------------------------


class Writer:
    """Another process, which appends to a file what it is told."""

    def __init__(self, path: Path) -> None:
        self._fifo = path.with_suffix(".commands")
        os.mkfifo(self._fifo)
        self._child = Child(
            """
            import ast, sys
            with open(sys.argv[1], "ab", buffering=0) as file, open(sys.argv[2]) as commands:
                for command in commands:
                    file.write(ast.literal_eval(command))
                    print("written", flush=True)
            """,
            str(path),
            str(self._fifo),
        )
        self._commands = self._fifo.open("w", buffering=1)

    def write(self, content: bytes) -> None:
        """Append, and wait until that is done."""
        self._commands.write(f"{content!r}\n")
        self._child.until_line("written")

    def close(self) -> None:
        self._commands.close()
        self._child.__exit__()


@contextmanager
def another_process(path: Path) -> Iterator[Writer]:
    writer = Writer(path)
    try:
        yield writer
    finally:
        writer.close()


@on_both_faces
def test_a_file_is_followed_as_another_process_writes_it(tmp_path: Path, write: Write, face: Face) -> None:
    """Half a line waits for its other half."""
    first = write("old.jsonl", b'{"n": 0}')
    path = tmp_path / "growing.jsonl"
    with another_process(path) as other:
        other.write(b'{"n": 1}\n')
        loader = Pipeline(Lines([first, str(path)], decode="json", follow=True))
        with Steps(loader, face) as steps:
            assert steps.next() == {"n": 0}
            assert steps.next() == {"n": 1}
            for number in range(2, 6):
                other.write(f'{{"n": {number}}}\n{{"n"'.encode())
                assert steps.next() == {"n": number}
                other.write(b": -1}\n")
                assert steps.next() == {"n": -1}


@on_both_faces
def test_a_file_that_is_followed_is_let_go_while_it_waits(write: Write, face: Face) -> None:
    """The fixture looks for what is left."""
    loader = Pipeline(Lines(write("a.txt", b"1\n"), follow=True))
    with Steps(loader, face) as steps:
        assert steps.next() == "1"


@on_both_faces
def test_the_end_of_a_followed_file_is_an_error_that_says_how(tmp_path: Path, write: Write, face: Face) -> None:
    def end_of(change: Callable[[Path], object]) -> Exception:
        path = Path(write("a.txt", b"1\nhalf"))
        with Steps(Pipeline(Lines(path, follow=True)), face) as steps:
            assert steps.next() == "1"
            change(path)
            found = steps.outcomes()
        assert len(found) == 1
        assert isinstance(found[0], OSError)
        return found[0]

    def truncate(path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(1)

    assert isinstance(end_of(Path.unlink), FileNotFoundError)
    assert "the file shrank from 6 to 1 bytes while followed" in str(end_of(truncate))
    replaced = end_of(lambda path: Path(write("b.txt", b"2\n")).replace(path))
    assert "another file took this one's place while it was followed" in str(replaced)


@on_both_faces
@pytest.mark.parametrize("depth", ["the link", "a folder on the way"])
def test_a_followed_link_that_is_pointed_elsewhere_is_an_error(tmp_path: Path, depth: str, face: Face) -> None:
    """As `ln -sfn`, log rotation and Kubernetes do, after what was written before: another file took its place."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"1\n")
    path, swapped = tmp_path / "a.txt", tmp_path / "..data"
    if depth == "the link":
        path, swapped = tmp_path / "link.txt", tmp_path / "link.txt"
        swapped.symlink_to("old/a.txt")
    else:
        swapped.symlink_to("old")
        path.symlink_to("..data/a.txt")
    with Steps(Pipeline(Lines(path, follow=True)), face) as steps:
        assert steps.next() == "1"
        with (old / "a.txt").open("ab") as file:
            file.write(b"2\n")
        assert steps.next() == "2"
        with (old / "a.txt").open("ab") as file:
            file.write(b"3\n")
        (tmp_path / "..tmp").symlink_to("new/a.txt" if depth == "the link" else "new")
        (tmp_path / "..tmp").rename(swapped)
        assert steps.next() == "3"
        with pytest.raises(OSError, match="another file took this one's place while it was followed") as raised:
            steps.next()
        assert raised.value.filename == str(path)


def test_what_was_written_just_before_a_link_is_pointed_elsewhere_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both happen while the reader looks: it has seen the size of the file, and not yet where the link leads."""
    for name in ("old.txt", "new.txt"):
        (tmp_path / name).write_bytes(b"1\n")
    link = tmp_path / "link.txt"
    link.symlink_to("old.txt")
    fstat, left = os.fstat, [True]

    def looks(fd: int) -> os.stat_result:
        status = fstat(fd)
        if left and sys._getframe(1).f_code.co_name == "wait":
            left.clear()
            with (tmp_path / "old.txt").open("ab") as file:
                file.write(b"2\n")
            (tmp_path / "tmp").symlink_to("new.txt")
            (tmp_path / "tmp").rename(link)
        return status

    with Steps(Pipeline(Lines(link, follow=True)), "for") as steps:
        assert steps.next() == "1"
        monkeypatch.setattr("aioloader.sources.chunks.os.fstat", looks)
        (tmp_path / "other.txt").touch()  # the folder is watched, too: the reader looks again
        assert steps.next() == "2"
        with pytest.raises(OSError, match="another file took this one's place"):
            steps.next()


@on_both_faces
def test_a_followed_link_that_is_removed_is_an_error(tmp_path: Path, write: Write, face: Face) -> None:
    link = tmp_path / "link"
    link.symlink_to(write("a.txt", b"1\n"))
    with Steps(Pipeline(Lines(link, follow=True)), face) as steps:
        assert steps.next() == "1"
        link.unlink()
        with pytest.raises(FileNotFoundError):
            steps.next()


@on_both_faces
def test_a_file_whose_name_is_no_utf8_is_followed(tmp_path: Path, face: Face) -> None:
    """And found by a link that lies among such names."""
    path = tmp_path / "a\udce9.txt"
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        path.write_bytes(b"1\n")
        with Steps(Pipeline(Lines(name, follow=True)), face) as steps:
            assert steps.next() == "1"
            (tmp_path / "other\udce9").write_bytes(b"x")
            with path.open("ab") as file:
                file.write(b"2\n")
            assert steps.next() == "2"


def test_the_folders_that_decide_where_a_path_leads_to(tmp_path: Path) -> None:
    """Those in which its links lie, through relative and absolute ones, and no others."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"")
    (tmp_path / "to_b").symlink_to("a/b")
    (tmp_path / "a" / "up").symlink_to("../to_b/file")
    (tmp_path / "a" / "b" / "far").symlink_to(tmp_path / "a" / "up")
    (tmp_path / "self").symlink_to("self")
    here = Path(os.path.realpath(tmp_path))
    assert folders_of_links(str(here / "a" / "b" / "file")) == []
    assert folders_of_links(str(here / "to_b" / "file")) == [str(here)]
    assert folders_of_links(str(here / "to_b" / "far")) == [str(here), str(here / "a" / "b"), str(here / "a")]
    assert folders_of_links(str(here / "self")) == [str(here)]
    assert folders_of_links(str(here / "none" / "file")) == []


# -- as a source among others ------------------------------------------------------------------------------------------


@on_both_faces
def test_taking_a_few_lines_lets_go_of_the_files(write: Write, face: Face) -> None:
    paths = [write(f"{number}.txt", b"line\n" * 100_000) for number in range(3)]
    assert collect(Pipeline(Lines(paths, interleave=3)).take(5), face) == ["line"] * 5


def test_each_epoch_reads_anew_and_the_source_can_be_pickled(write: Write) -> None:
    source = Lines(write("a.jsonl", b"1\n2\n"), decode="json")
    loader = Pipeline(pickle.loads(pickle.dumps(source)))
    assert list(loader) == list(loader) == [1, 2]


def test_it_is_sharded_and_shuffled_as_any_stream(write: Write) -> None:
    loader = Pipeline(Lines(write("a.jsonl", b"".join(b"%d\n" % n for n in range(100))), decode="json"))
    parts = [list(loader.shard(rank, 2).shuffle(buffer_size=10)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(100))
    assert parts[0] != sorted(parts[0])
