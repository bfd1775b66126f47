"""Files and objects that are rewritten while they are read, or between a state and its resume.

Right is an error that says so, or all samples of one version. Wrong are samples made of two, or a clean end with
samples missing.
"""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, Literal

import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import LocalStore, MemoryStore

from aioloader import BrokenDataError, Pipeline
from aioloader.core.source import CursorSource
from aioloader.sources import Files, Lines, Objects, TarShards
from aioloader.sources.marks import BLOCK, MARK_BYTES, Trail
from tests._cursor_sources import assert_opens_at_every_cursor, outcomes, outcomes_and_cursors
from tests._servers import HttpServer, S3Server
from tests._support import Face, Steps, collect, notes, on_both_faces


def archive(content: bytes, count: int) -> bytes:
    """`count` samples, each a file of this content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:04}.txt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def lines(content: bytes, count: int) -> bytes:
    return (content + b"\n") * count


def letters(found: list[Any]) -> set[str]:
    """Of samples of one letter: those that there are, and what is none, as it is."""
    return {
        letter if isinstance(letter, str) else chr(letter)
        for sample in found
        if not isinstance(sample, Exception)
        for letter in set(sample["txt"] if isinstance(sample, dict) else sample.strip('"'))
    }


def errors(found: list[Any]) -> list[Exception]:
    return [outcome for outcome in found if isinstance(outcome, Exception)]


def old(path: Path) -> None:
    """Its last change was long ago: the clock of file systems goes in steps of milliseconds."""
    os.utime(path, ns=(0, 0))


# -- while it is read: files -------------------------------------------------------------------------------------------

SIZE = 100_000
COUNT = 400  # 40 MB: a reader is never that far ahead

SOURCES: dict[str, tuple[str, Callable[[bytes, int], bytes], Callable[[Any], CursorSource]]] = {
    "lines": ("x.txt", lines, Lines),
    "json": ("x.jsonl", lambda content, count: lines(b'"%s"' % content, count), lambda p: Lines(p, decode="json")),
    "side by side": ("x.txt", lines, lambda p: Lines(p, interleave=2)),
    "tar": ("x.tar", archive, TarShards),
}

Change = Callable[[Path, bytes], object]


def in_place(path: Path, content: bytes) -> None:
    """Byte by byte over what is there, as `rsync --inplace` writes."""
    with path.open("r+b") as file:
        file.write(content)


REWRITES: dict[str, tuple[Change, int]] = {
    "of the same size": (Path.write_bytes, COUNT),
    "of the same size, in place": (in_place, COUNT),
    "shorter": (Path.write_bytes, 5),
    "longer": (Path.write_bytes, COUNT + 5),
}


@on_both_faces
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rewrite", REWRITES)
def test_a_file_that_is_written_anew_while_it_is_read_is_an_error(
    tmp_path: Path, source: str, rewrite: str, face: Face
) -> None:
    """After samples of the old version alone; then the next file follows."""
    name, make, open_source = SOURCES[source]
    change, count = REWRITES[rewrite]
    path, following = tmp_path / name, tmp_path / f"z{name}"
    path.write_bytes(make(b"A" * SIZE, COUNT))
    following.write_bytes(make(b"C", 3))
    old(path)
    with Steps(Pipeline(open_source([str(path), str(following)])), face) as steps:
        found = [steps.next()]
        change(path, make(b"B" * SIZE, count))
        found += steps.outcomes()
    (error,) = errors(found)
    assert letters(found) == {"A", "C"}
    assert len(found) < COUNT
    assert str(path) in str(error)
    assert "was rewritten while it was read" in str(error) or "the file shrank from" in str(error)
    del found, error


@on_both_faces
@pytest.mark.parametrize("source", SOURCES)
def test_a_file_whose_place_another_one_takes_is_read_to_its_end(tmp_path: Path, source: str, face: Face) -> None:
    """What is open stays what it was."""
    name, make, open_source = SOURCES[source]
    path, other = tmp_path / name, tmp_path / "other"
    path.write_bytes(make(b"A" * SIZE, 100))
    other.write_bytes(make(b"B" * SIZE, 100))
    with Steps(Pipeline(open_source(str(path))), face) as steps:
        found = [steps.next()]
        other.replace(path)
        found += steps.outcomes()
    assert (letters(found), len(found)) == ({"A"}, 100)
    del found


@on_both_faces
def test_a_file_that_is_appended_to_is_read_to_its_new_end(tmp_path: Path, face: Face) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(lines(b"A" * SIZE, 100))
    old(path)
    with Steps(Pipeline(Lines(path)), face) as steps:
        found = [steps.next()]
        with path.open("ab") as file:
            file.write(lines(b"B" * SIZE, 100))
        found += steps.outcomes()
    assert (letters(found), len(found)) == ({"A", "B"}, 200)


@on_both_faces
def test_a_followed_file_that_is_written_anew_is_an_error_and_no_piece_of_a_line(tmp_path: Path, face: Face) -> None:
    """As `copytruncate` of logrotate does, and by the time that anybody looks it is longer than before."""
    path = tmp_path / "log.txt"
    path.write_bytes(b"1\n2\n")
    with Steps(Pipeline(Lines(path, follow=True)), face) as steps:
        assert [steps.next(), steps.next()] == ["1", "2"]
        with path.open("r+b") as file:  # not emptied first, which would be seen
            file.write(b"30000\n40000\n")
        (error,) = steps.outcomes()
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(
        f"{path} was rewritten while it was read, 4 bytes of it so far: it has 12 bytes, and had 4"
    )


@on_both_faces
def test_a_followed_file_may_be_touched(tmp_path: Path, face: Face) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"1\n")
    with Steps(Pipeline(Lines(path, follow=True)), face) as steps:
        assert steps.next() == "1"
        old(path)
        with path.open("ab") as file:
            file.write(b"2\n")
        assert steps.next() == "2"


@pytest.mark.parametrize("read", ["bytes", "tensor"])
@pytest.mark.parametrize("how", ["of the same size", "shorter"])
def test_a_whole_file_that_is_written_anew_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Literal["bytes", "tensor"], how: str
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"A" * (2 << 20))
    old(path)
    second = bytes(2 << 20) if how == "of the same size" else b"B"
    name = "read" if read == "bytes" else "readv"
    real = getattr(os, name)

    def content() -> bytes:
        sample: Any = Files(path, read=read)[0]
        return sample if read == "bytes" else sample.numpy().tobytes()  # type: ignore[no-any-return]

    def rewriting(*arguments: Any) -> Any:
        monkeypatch.setattr(f"aioloader.sources.read_file.os.{name}", real)
        path.write_bytes(second)
        return real(*arguments)

    monkeypatch.setattr(f"aioloader.sources.read_file.os.{name}", rewriting)
    if (read, how) == ("tensor", "shorter"):  # read once more, and whole
        assert content() == second
    else:
        with pytest.raises(BrokenDataError, match=r"x\.bin was rewritten while it was read"):
            content()
    assert content() == second


# -- while it is read: objects -----------------------------------------------------------------------------------------


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"start": 0, "needed": 0, "size": 4096, "pace": None, "turn": None}
    monkeypatch.setattr("aioloader.sources.chunks.object_chunks.__kwdefaults__", defaults)


OLD, NEW = archive(b"A" * 1000, 20), archive(b"B" * 1000, 20)


@on_both_faces
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("tells", ["etag", "weak etag", "time"])
@pytest.mark.usefixtures("small_ranges")
def test_an_object_that_is_written_anew_between_two_ranges_is_an_error(
    http_server: HttpServer, tells: Any, conditions: bool, heads: bool, face: Face
) -> None:
    """Whatever the server tells, and does with what it is asked."""
    http_server.files = {"x.tar": NEW, "y.tar": archive(b"C", 3)}
    http_server.versions = {"x.tar": chain([OLD, OLD], repeat(NEW))}
    http_server.tells, http_server.conditions, http_server.heads = tells, conditions, heads
    store = http_server.store()
    with Steps(Pipeline(TarShards("{x,y}.tar", store=store)), face) as steps:
        found = steps.outcomes()
    (error,) = errors(found)
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(
        "the object 'x.tar' was rewritten while it was read: what comes from byte 8192 on is of another version"
    )
    assert "key 'x.tar', epoch 0, position" in notes(error)
    assert letters(found) == {"A", "C"}
    del store, found, error


@pytest.mark.usefixtures("small_ranges")
def test_the_ranges_after_the_first_are_asked_for_by_the_etag(http_server: HttpServer) -> None:
    """So that a server that knows it sends nothing of another version. A weak one matches nothing."""
    for tells, named in (("etag", "If-Match"), ("weak etag", None), ("time", "If-Unmodified-Since")):
        http_server.reset()
        http_server.files = {"x.tar": OLD}
        http_server.tells = tells  # type: ignore[assignment]
        store = http_server.store()
        assert len(list(Pipeline(TarShards("x.tar", store=store)))) == 20
        assert http_server.epoch_pinned[0] == set()
        assert set().union(*http_server.epoch_pinned[1:]) == ({named} if named else set())
        del store


@on_both_faces
def test_a_server_without_ranges_gives_one_version(http_server: HttpServer, face: Face) -> None:
    http_server.ranges = False
    http_server.tells = "etag"
    http_server.files = {"x.tar": NEW}
    http_server.versions = {"x.tar": chain([OLD], repeat(NEW))}
    store = http_server.store()
    found = collect(Pipeline(TarShards("x.tar", store=store)), face)
    assert (letters(found), len(found)) == ({"B"}, 20)
    del store


@pytest.mark.parametrize("fault", ["short", "truncated"])
@pytest.mark.parametrize("tells", ["etag", None])
@pytest.mark.usefixtures("small_ranges")
def test_an_answer_that_is_cut_short_is_an_error_or_asked_for_again(
    http_server: HttpServer, tells: Any, fault: Any
) -> None:
    """What the store asks for again is of the same version."""
    for versions, letter in ((repeat(OLD), {"A"}), (chain([OLD, OLD], repeat(NEW)), {"A"})):
        http_server.reset()
        http_server.tells = tells
        http_server.files, http_server.versions = {"x.tar": OLD}, {"x.tar": versions}
        http_server.faults = {"x.tar": iter([None, fault])}
        store = http_server.store()
        with Steps(Pipeline(TarShards("x.tar", store=store)), "for") as steps:
            found = steps.outcomes()
        assert letters(found) <= letter
        assert len(found) == 20 if not errors(found) else "x.tar" in notes(errors(found)[0])
        del store, found


@on_both_faces
@pytest.mark.parametrize("kind", ["memory", "folder", "s3"])
@pytest.mark.parametrize("second", [NEW, archive(b"B" * 1000, 5) + bytes(len(OLD)), archive(b"B", 2), b""])
@pytest.mark.usefixtures("small_ranges")
def test_no_store_gives_two_versions_of_an_object(
    tmp_path: Path, s3_server: S3Server, kind: str, second: bytes, face: Face
) -> None:
    """Of the same size, with end marks where members were, shorter, empty."""
    store: Any = MemoryStore() if kind == "memory" else LocalStore(tmp_path)
    if kind == "s3":
        store = s3_server.store(s3_server.make_bucket())
    many = archive(b"A" * 1000, 400)
    obstore.put(store, "x.tar", many)
    with Steps(Pipeline(TarShards("x.tar", store=store)), face) as steps:
        found = [steps.next()]
        obstore.put(store, "x.tar", second)
        found += steps.outcomes()
    (error,) = errors(found)
    assert "'x.tar' was rewritten while it was read" in str(error)
    assert letters(found) == {"A"}
    del store, found, error


@on_both_faces
@pytest.mark.parametrize("tells", ["etag", "weak etag", "time"])
def test_the_ranges_of_one_object_are_of_one_version(http_server: HttpServer, tells: Any, face: Face) -> None:
    http_server.tells = tells
    http_server.files = {"all.bin": b"B" * 100, "other": b"C"}
    http_server.versions = {"all.bin": chain([b"A" * 100] * 2, repeat(b"B" * 100))}
    store = http_server.store()
    keys, ranges = ["all.bin"] * 4 + ["other"], [(0, 10), (10, 20), (20, 30), (30, 40), None]
    with Steps(Pipeline(Objects(store, keys, ranges=ranges, concurrency=1)), face) as steps:
        found = steps.outcomes()
    assert [found[0], found[1], found[4]] == [b"A" * 10, b"A" * 10, b"C"]
    for error in found[2:4]:
        assert isinstance(error, BrokenDataError)
        assert str(error).startswith("the object 'all.bin' was rewritten since the first of its ranges was read")
        assert "aioloader: object 'all.bin', bytes " in notes(error)
    del store, found, error


# -- between a state and its resume ------------------------------------------------------------------------------------


def state_after(source: Any, count: int) -> Any:
    """Through JSON, as a checkpoint would be."""
    loader = Pipeline(source)
    with Steps(loader, "for") as steps:
        steps.rest(count)
        return json.loads(json.dumps(loader.state_dict()))


def resumed(source: Any, state: Any, face: Face = "for") -> list[Any]:
    loader = Pipeline(source)
    loader.load_state_dict(state)
    with Steps(loader, face) as steps:
        return steps.outcomes()


def numbered(word: str, count: int) -> bytes:
    return "".join(f"{word}{number}\n" for number in range(count)).encode()


@on_both_faces
@pytest.mark.parametrize(
    ("suffix", "interleave", "follow"),
    [("", 1, False), (".gz", 1, False), ("", 2, False), (".gz", 2, False), ("", 1, True)],
)
def test_a_resume_into_lines_that_were_written_anew_is_refused(
    tmp_path: Path, suffix: str, interleave: int, follow: bool, face: Face
) -> None:
    """However long they are, and wherever the byte of the cursor is in them; the next file follows."""
    path, other = tmp_path / f"x.txt{suffix}", tmp_path / "other.txt"
    write = gzip.compress if suffix else bytes
    for word, count in (("line number ", 10), ("1", 200), ("x" * 100, 3), ("0\n" * 20, 9)):
        path.write_bytes(write(numbered("00", 10)))
        other.write_bytes(b"".join(b"C\n" for _ in range(20)))

        def source() -> Lines:
            paths = [other, path] if follow else [path, other]
            return Lines(paths, interleave=interleave, follow=follow)

        state = state_after(source(), 24 if follow else 5 * interleave)
        path.write_bytes(write(numbered(word, count)))
        loader = Pipeline(source())
        loader.load_state_dict(state)
        with Steps(loader, face) as steps:
            found = steps.outcomes()
        (error,) = errors(found)
        assert isinstance(error, BrokenDataError)
        assert str(path) in str(error)
        assert "was rewritten since the state was made" in str(error) or "it was changed" in str(error), str(error)
        assert letters(found) <= {"C"}
        assert len(found) == (1 if follow else 21 if interleave == 1 else 16)


def test_a_cursor_without_a_mark_sits_on_the_beginning_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"line number 1\nline number 2\n")
    assert outcomes(Lines(path), cursor=(0, 14, 1, None)) == ["line number 2"]
    (message,) = outcomes(Lines(path), cursor=(0, 20, 1, None))
    assert message.startswith(f"{path}: there is no line end before the byte to resume at: reading resumes at byte 20")


@on_both_faces
def test_a_copy_is_the_same_file_and_so_is_one_that_has_grown(tmp_path: Path, face: Face) -> None:
    """On another machine the time of change is another one, and the folder too."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    (first / "x.txt").write_bytes(numbered("old ", 10))
    (first / "x.tar").write_bytes(OLD)
    state, of_tar = state_after(Lines(first / "x.txt"), 4), state_after(TarShards(str(first / "x.tar")), 4)
    shutil.copytree(first, second)
    old(second / "x.txt")
    with (second / "x.txt").open("ab") as file:
        file.write(b"new\n")
    assert resumed(Lines(second / "x.txt"), state, face) == [*(f"old {number}" for number in range(4, 10)), "new"]
    assert len(resumed(TarShards(str(second / "x.tar")), of_tar, face)) == 16


@on_both_faces
def test_a_last_line_without_an_end_that_went_on_is_no_line_of_its_own(tmp_path: Path, face: Face) -> None:
    """Where its end came, what was given was all of it; where more came, the rest of it is no sample."""
    path = tmp_path / "x.txt"
    path.write_bytes(b"1\n2")
    source = Lines(path)
    found, cursors = outcomes_and_cursors(source, face)
    assert found == ["1", "2"]
    assert outcomes(source, face, cursors[-1]) == []
    for end in (b"\n", b"\r\n"):
        path.write_bytes(b"1\n2" + end + b"3\n")
        rest, later = outcomes_and_cursors(source, face, cursors[-1])
        assert (rest, later[0][1]) == (["3"], path.stat().st_size)
    path.write_bytes(b"1\n2 and more\n3\n")
    (message,) = outcomes(source, face, cursors[-1])
    assert "there is no line end before the byte to resume at" in message


@on_both_faces
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_resume_into_another_archive_is_refused(tmp_path: Path, suffix: str, face: Face) -> None:
    path, other = tmp_path / f"x.tar{suffix}", tmp_path / "y.tar"
    write = gzip.compress if suffix else bytes
    path.write_bytes(write(OLD))
    other.write_bytes(archive(b"C", 2))
    source = TarShards([str(path), str(other)])
    state = state_after(source, 7)
    path.write_bytes(write(NEW))
    error, *found = resumed(source, state, face)
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(f"{path}: reading resumes at byte 10752, but what is before it is not what was read")
    assert (letters(found), len(found)) == ({"C"}, 2)
    del error, found


@on_both_faces
@pytest.mark.parametrize("kind", ["memory", "s3", "http"])
def test_a_resume_into_another_version_of_an_object_is_refused(
    s3_server: S3Server, http_server: HttpServer, kind: str, face: Face
) -> None:
    """Also where it is the same up to the cursor, and only what comes after it is another."""
    http_server.tells = "etag"
    store: Any = MemoryStore()
    if kind != "memory":
        store = http_server.store() if kind == "http" else s3_server.store(s3_server.make_bucket())

    def put(content: bytes, store: Any = store) -> None:
        if kind == "http":
            http_server.files["x.tar"] = content
        else:
            obstore.put(store, "x.tar", content)

    put(OLD)
    source = TarShards("x.tar", store=store)
    state = state_after(source, 7)
    put(OLD[:20_000] + NEW[20_000:])
    (error,) = resumed(source, state, face)
    assert str(error).startswith("the object 'x.tar' was rewritten since the state was made: its ETag differs")
    put(OLD)
    if kind != "memory":  # there each upload is another one
        assert len(resumed(source, state, face)) == 13
    del source, error
    store = None


@on_both_faces
def test_a_copy_in_another_store_is_the_same_object(tmp_path: Path, http_server: HttpServer, face: Face) -> None:
    """Its ETag is another one, and what is before the cursor is not; and a folder may be filled anew."""
    stores: list[Any] = [MemoryStore(), MemoryStore(), LocalStore(tmp_path), http_server.store()]
    http_server.files = {"x.tar": OLD}
    http_server.tells = "etag"
    obstore.put(stores[1], "x.tar", b"")
    for store in stores[:3]:
        obstore.put(store, "x.tar", OLD)
    for number, store in enumerate(stores):
        state = state_after(TarShards("x.tar", store=store), 7)
        os.utime(tmp_path / "x.tar", ns=(number, number))
        for other in stores:
            assert len(resumed(TarShards("x.tar", store=other), state, face)) == 13
    for other in stores[:3]:
        obstore.put(other, "x.tar", NEW)
        (error,) = resumed(TarShards("x.tar", store=other), state, face)
        assert "what is before it is not what was read there" in str(error)
    del stores, store, other, error


# -- marks -------------------------------------------------------------------------------------------------------------


def test_cursors_are_the_same_wherever_reading_began(tmp_path: Path) -> None:
    """Through many blocks, and with lines longer than one."""
    path = tmp_path / "x.txt"
    path.write_bytes(b"".join(b"%d %s\n" % (number, b"x" * (number * 977 % 9000)) for number in range(60)))
    assert path.stat().st_size > 3 * BLOCK
    for compressed in (False, True):
        if compressed:
            (tmp_path / "x.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        source = Lines(tmp_path / "x.txt.gz" if compressed else path)
        assert len(assert_opens_at_every_cursor(source)) == 60


@settings(max_examples=200)
@given(
    length=st.integers(1, 3 * BLOCK),
    cuts=st.lists(st.integers(1, 3 * BLOCK), max_size=8),
    offset=st.integers(0, 3 * BLOCK),
    wrong=st.integers(1, 1024),
)
def test_a_mark_depends_on_nothing_but_its_place(length: int, cuts: list[int], offset: int, wrong: int) -> None:
    """Not on the pieces, nor on where reading began; and one byte that is another one is seen."""
    content = bytes(number * number % 251 for number in range(length))
    offset = min(offset, length)

    def rest(trail: Trail, content: bytes) -> bytes:
        bounds = sorted({trail.start, length, *(cut for cut in cuts if trail.start < cut < length)})
        return b"".join(trail.feed(content[begin:end]) for begin, end in pairwise(bounds))

    whole = Trail(0, None)
    whole.feed(content)
    mark = whole.mark(offset)
    later = Trail(offset, mark)
    assert rest(later, content) == content[offset:]
    assert [later.mark(offset), later.mark(length)] == [mark, whole.mark(length)]
    if not offset:
        assert mark is None
        return
    place = offset - offset % BLOCK if offset > BLOCK else 1 << offset.bit_length() - 1
    changed = bytearray(content)
    changed[place - 1 - wrong % min(place, MARK_BYTES)] ^= 1
    with pytest.raises(BrokenDataError, match=f"resumes at byte {offset}, but what is before"):
        rest(Trail(offset, mark), bytes(changed))
