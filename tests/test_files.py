"""`Files`: whole files, in order or not, broken in every way, straight into batches, and as they arrive."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from aioloader import DataLoader, Pipeline
from aioloader.sources import Files, Lines, TarShards
from aioloader.sources.given_names import CHUNK_NAMES, GivenNames
from aioloader.sources.watched_files import WatchedFiles, _matches, _split
from aioloader.sources.watched_folder import WatchedFolder
from aioloader.testing import assert_resumes_exactly
from tests._support import Child, Face, Steps, collect, notes, on_both_faces

SIZE = 64


def content(number: int, size: int = SIZE) -> bytes:
    """What file `number` holds."""
    return bytes([number % 256]) * size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten files of one size, `0.bin` to `9.bin`."""
    for number in range(10):
        (tmp_path / f"{number}.bin").write_bytes(content(number))
    return tmp_path


def first_bytes(batch: torch.Tensor) -> list[int]:
    """The numbers of the files in a batch."""
    assert batch.dtype == torch.uint8
    assert (batch == batch[:, :1]).all()
    return [int(number) for number in batch[:, 0]]


# -- which files -------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_the_files_in_it_and_below_sorted(folder: Path) -> None:
    """Without hidden ones; links are followed, but not in circles."""
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "deep.bin").write_bytes(b"deep")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"hidden too")
    (folder / "b" / "up").symlink_to(folder)
    (folder / "linked").symlink_to(folder / "b" / "c")
    expected = sorted([*(f"{n}.bin" for n in range(10)), "b/c/deep.bin", "linked/deep.bin"])
    assert [os.path.relpath(path, folder) for path in Files(folder).paths] == expected


def test_paths_stay_in_their_order_and_globs_are_sorted(folder: Path) -> None:
    """A path that is given twice comes twice."""
    found = Files([folder / "7.bin", str(folder / "[12].bin"), folder / "7.bin"])
    assert [Path(path).stem for path in found.paths] == ["7", "1", "2", "7"]


def test_samples_are_bytes_tensors_or_paths(folder: Path) -> None:
    """By number, from the end, and by slice."""
    path = str(folder / "3.bin")
    assert Files(folder)[3] == content(3)
    assert Files(folder)[-7] == content(3)
    assert torch.equal(Files(folder, read="tensor")[3], torch.full((SIZE,), 3, dtype=torch.uint8))
    assert Files(folder, read=None)[3] == path
    assert Files(folder, with_path=True)[torch.tensor(3)] == (path, content(3))
    assert Files(folder)[3:5] == Files(folder).__getitems__([3, 4]) == [content(3), content(4)]
    assert list(Files(folder)) == [content(number) for number in range(10)]
    with pytest.raises(IndexError):
        Files(folder)[10]


@pytest.mark.parametrize("read", ["bytes", "tensor"])
def test_files_without_a_size_are_read_to_their_end(read: Any) -> None:
    """Those of /proc say 0, an empty one is."""
    if not Path("/proc/version").exists():
        pytest.skip("no /proc")
    assert bytes(Files("/proc/version", read=read)[0]) == Path("/proc/version").read_bytes()


def test_an_empty_file_is_an_empty_sample(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert Files(tmp_path)[0] == b""
    assert Files(tmp_path, read="tensor")[0].shape == (0,)
    (batch,) = DataLoader(Files([tmp_path / "empty"] * 2, read="tensor"), batch_size=2)
    assert batch.shape == (2, 0)


def test_files_are_pickled_by_their_arguments(folder: Path) -> None:
    """What was found is found."""
    copied = pickle.loads(pickle.dumps(Files(folder, read="tensor", with_path=True)))
    (folder / "new.bin").touch()
    assert len(copied) == 10
    assert (copied.read, copied.with_path) == ("tensor", True)


# -- what comes --------------------------------------------------------------------------------------------------------


class Plain(Dataset[Any]):
    """The same samples by a dataset of the user's."""

    def __init__(self, files: Files) -> None:
        self.samples = list(files)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def same(one: Any, other: Any) -> bool:
    """Structures of tensors and bytes."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


KINDS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "tensors": {"read": "tensor"},
    "paths": {"read": None},
    "paths and bytes": {"with_path": True},
    "paths and tensors": {"read": "tensor", "with_path": True},
}


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *product(KINDS, ["inline", "threads", "pipeline"]),
        ("tensors", "processes"),
        ("paths and bytes", "processes"),
    ],
)
def test_batches_are_those_of_torch(folder: Path, kind: str, how: str) -> None:
    """The same structure, in the same order, however they are loaded."""
    files = Files(folder, **KINDS[kind])
    loader: Any
    match how:
        case "inline":
            loader = DataLoader(files, batch_size=4)
        case "threads":
            loader = DataLoader(files, batch_size=4, num_workers=2)
        case "processes":
            loader = DataLoader(files, batch_size=4, num_workers=2, worker_type="process")
        case _:
            loader = Pipeline(files).batch(4)
    expected = list(torch.utils.data.DataLoader(Plain(files), batch_size=4))
    assert same(list(loader), expected)


@on_both_faces
def test_a_pipeline_shuffles_all_files(folder: Path, face: Face) -> None:
    """A full permutation, another one each epoch; shards and `take` are arithmetic too."""
    loader = Pipeline(Files(folder, read="tensor")).shuffle(seed=1).batch(4, drop_last=True)
    assert len(loader) == 2
    epochs = [[number for batch in collect(loader, face) for number in first_bytes(batch)] for _ in range(2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1]
    parts = [Pipeline(Files(folder, read="tensor")).shard(rank, 2).batch(5) for rank in range(2)]
    assert [first_bytes(batch) for part in parts for batch in collect(part, face)] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_whole_batches_are_loaded_only_where_nothing_is_between(folder: Path) -> None:
    """With a map in between, samples are loaded one by one."""
    asked: list[Any] = []

    class Counted(Files):
        def __getitem__(self, key: Any) -> Any:
            asked.append(key)
            return super().__getitem__(key)

        def load_batch(self, keys: Any, alloc: Any) -> Any:
            asked.append(list(keys))
            return super().load_batch(keys, alloc)

    files = Counted(folder, read="tensor")
    assert len(list(Pipeline(files).take(6).batch(4))) == 2
    assert sorted(asked, key=len, reverse=True) == [[0, 1, 2, 3], [4, 5]]
    asked.clear()
    assert len(list(Pipeline(files).map(lambda sample: sample + 1).batch(4))) == 3
    assert sorted(asked) == list(range(10))


def test_a_collate_function_gets_the_samples(folder: Path) -> None:
    """A list, as from any dataset."""
    got = list(Pipeline(Files(folder)).batch(4, collate_fn=lambda samples: [sample[0] for sample in samples]))
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_function_for_tensors_in_torchs_map_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way around samples is taken only where nobody would see it."""
    from torch.utils.data._utils import collate

    monkeypatch.setitem(collate.default_collate_fn_map, torch.Tensor, lambda tensors, **_: len(tensors))
    assert list(Pipeline(Files(folder, read="tensor")).batch(4)) == [4, 4, 2]


def test_a_dataset_that_gives_many_at_once_is_asked_for_whole_batches() -> None:
    """Any dataset with `__getitems__`, not only ours."""
    asked: list[list[int]] = []

    class Many(Dataset[int]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            raise AssertionError

        def __getitems__(self, indices: list[int]) -> list[int]:
            asked.append(indices)
            return [10 * index for index in indices]

    batches = list(Pipeline(Many()).skip(1).batch(4).map(lambda batch: batch + 1))
    assert [batch.tolist() for batch in batches] == [[11, 21, 31, 41], [51, 61, 71, 81], [91]]
    assert sorted(asked) == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]


@pytest.mark.parametrize("how", ["pipeline", "loader"])
def test_a_state_leads_to_exactly_what_was_to_come(folder: Path, how: str) -> None:
    """Also from whole batches to single samples' stages of the same shape."""

    def make(width: int) -> Any:
        files = Files(folder, read="tensor")
        if how == "loader":
            return DataLoader(files, batch_size=4, shuffle=True, num_workers=width, seed=3)
        return Pipeline(files).shuffle(seed=3).batch(4).prefetch(width + 1)

    assert_resumes_exactly(make, variants=[{"width": 2}, {"width": 0}])


# -- memory ------------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda batch: batch,
    "a row": lambda batch: batch[1],
    "a numpy view": lambda batch: batch.numpy()[2:, ::3],
}


@pytest.mark.parametrize("view", VIEWS)
@on_both_faces
def test_memory_in_use_is_never_read_into(tmp_path: Path, view: str, face: Face) -> None:
    """Whatever is kept of a batch stays as it was, while later batches use the memory of those that were dropped."""
    size = 512 << 10  # a batch of two is large enough for memory that is used again
    for number in range(12):
        (tmp_path / f"{number:02}").write_bytes(content(number, size))
    kept: list[tuple[int, Any]] = []
    seen = []
    with Steps(Pipeline(Files(tmp_path, read="tensor")).repeat(2).batch(3), face) as steps:
        for number, batch in enumerate(steps.rest()):
            seen.append(first_bytes(batch))
            if number % 2:
                kept.append((3 * number % 12, VIEWS[view](batch)))
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]] * 2
    for first, part in kept:
        assert set(torch.as_tensor(part).unique().tolist()) <= {first, first + 1, first + 2}


def test_memory_is_used_again(tmp_path: Path) -> None:
    """A few blocks serve all batches."""
    for number in range(32):
        (tmp_path / f"{number:02}").write_bytes(content(number, 256 << 10))
    loader = Pipeline(Files(tmp_path, read="tensor")).repeat(4).batch(8)
    addresses = {batch.data_ptr() for batch in loader}
    assert len(addresses) <= 6


@pytest.mark.parametrize("read", ["bytes", "tensor"])
def test_no_file_stays_open(folder: Path, read: Any) -> None:
    """Not even those that could not be read."""
    (folder / "5.bin").unlink()
    (folder / "5.bin").mkdir()
    files = Files([*sorted(folder.glob("[0-4].bin")), folder / "5.bin", folder / "missing"], read=read)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        for key in range(len(files)):
            with contextlib.suppress(OSError):
                files[key]
        for keys in ([0, 1, 2], [4, 5], [6, 0]):
            with contextlib.suppress(OSError):
                files.load_batch(keys, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- what is wrong -----------------------------------------------------------------------------------------------------


def broken(folder: Path, how: str) -> tuple[str, type[OSError], str]:
    """Break `3.bin`; its path, the error and what the note advises."""
    path = folder / "3.bin"
    path.unlink()
    match how:
        case "missing":
            return str(path), FileNotFoundError, "look files up again"
        case "a folder":
            path.mkdir()
            return str(path), IsADirectoryError, "pass it alone"
        case "a circle of links":
            path.symlink_to(path)
            return str(path), OSError, ""
        case _:
            path.write_bytes(content(3))
            path.chmod(0)
            return str(path), PermissionError, "make it readable"


HOWS = [
    "missing",
    "a folder",
    "a circle of links",
    pytest.param("forbidden", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read it")),
]


@on_both_faces
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("read", ["bytes", "tensor"])
def test_a_file_that_cannot_be_read_raises_at_its_place(folder: Path, how: str, read: Any, face: Face) -> None:
    """The system's error with the path; the others come."""
    files = Files(folder, read=read)
    path, kind, advice = broken(folder, how)
    with Steps(Pipeline(files), face) as steps:
        found = list(steps.outcomes())
    assert [bytes(sample)[0] for place, sample in enumerate(found) if place != 3] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    error = found[3]
    assert isinstance(error, kind)
    assert error.filename == path
    assert advice in notes(error)
    assert f"key {path!r}, epoch 0, position 3" in notes(error)


@on_both_faces
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("read", ["bytes", "tensor"])
@pytest.mark.parametrize("loader", ["pipeline", "threads"])
def test_its_batch_fails_and_the_next_one_follows(folder: Path, how: str, read: Any, loader: str, face: Face) -> None:
    """Batches do not shift."""
    files = Files(folder, read=read)
    path, kind, advice = broken(folder, how)
    made = Pipeline(files).batch(3) if loader == "pipeline" else DataLoader(files, batch_size=3, num_workers=2)
    with Steps(made, face) as steps:
        found = list(steps.outcomes())
    error = found.pop(1)
    assert isinstance(error, kind)
    assert error.filename == path
    assert advice in notes(error)
    assert [[bytes(sample)[0] for sample in batch] for batch in found] == [[0, 1, 2], [6, 7, 8], [9]]


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1, 3 * SIZE, 0])
def test_files_of_several_sizes_cannot_be_stacked(folder: Path, size: int) -> None:
    """The error names two of them; `read="bytes"` takes them."""
    (folder / "4.bin").write_bytes(content(4, size))
    with Steps(Pipeline(Files(folder, read="tensor")).batch(4), "for") as steps:
        found = list(steps.outcomes())
    assert isinstance(found[1], ValueError)
    message = str(found[1])
    assert str(folder / "4.bin") in message
    assert f"{size} bytes" in message
    assert "read='bytes'" in message
    assert [first_bytes(found[0]), first_bytes(found[2])] == [[0, 1, 2, 3], [8, 9]]
    assert [len(sample) for sample in next(iter(Pipeline(Files(folder)).skip(4).batch(2)))] == [size, SIZE]


def test_a_link_to_itself_raises_at_its_place(folder: Path) -> None:
    """As one that leads nowhere does."""
    (folder / "5-self").symlink_to("5-self")
    (folder / "6-nowhere").symlink_to("not there")
    found = []
    with Steps(Pipeline(Files(folder)), "for") as steps:
        found = steps.outcomes()
    errors = [error for error in found if not isinstance(error, bytes)]
    assert [type(error) for error in errors] == [OSError, FileNotFoundError]
    assert len(found) == 12


def test_errors_show_names_that_are_no_utf8(tmp_path: Path) -> None:
    """So that they can be printed, which text with surrogates cannot."""
    folder = tmp_path / no_utf8("folder")
    folder.mkdir()
    lines, archive, packed = (folder / no_utf8(name) for name in ("lines", "archive.tar", "packed.gz"))
    for path in (lines, archive, packed):
        path.write_bytes(b"{no\n" * 300)
    packed = packed.rename(f"{packed}.gz")
    loaders = [
        Pipeline(Files([folder])),
        Pipeline(Files([folder / no_utf8("nowhere")])),
        DataLoader(Files([lines, archive, packed], read="tensor"), batch_size=3),
        DataLoader(Files([lines, folder], read="tensor"), batch_size=2),
        Pipeline(Lines(lines, decode="json")).take(1),
        Pipeline(Lines(lines, decode=lambda _: 1 // 0)).take(1),
        Pipeline(Lines(packed)),
        Pipeline(TarShards(archive)),
    ]
    for loader in loaders[:2] + loaders[3:]:
        with pytest.raises((ValueError, OSError, ZeroDivisionError)) as raised:
            next(iter(loader))
        shown = f"{raised.value}\n{notes(raised.value)}\n{loader!r}\n{loader.explain()}"
        assert shown.encode()
        assert "udce9" in shown
        json.loads(json.dumps(loader.state_dict()))
    assert len(next(iter(loaders[2]))) == 3


def test_nothing_found_is_said_at_once(tmp_path: Path) -> None:
    """With what was searched, and from where."""
    with pytest.raises(FileNotFoundError, match=r"no file matches the glob .*\*\.png"):
        Files(str(tmp_path / "*.png"))
    (tmp_path / ".hidden").touch()
    with pytest.raises(FileNotFoundError, match="no file in the folder") as raised:
        Files(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"paths": []}, ValueError, "at least one path"),
        ({"paths": 7}, TypeError, "takes a path"),
        ({"paths": [b"x"]}, TypeError, "str or os.PathLike"),
        ({"paths": "x", "read": "text"}, ValueError, "read must be 'bytes', 'tensor' or None, got 'text'"),
        ({"paths": "x", "read": None, "with_path": True}, ValueError, "samples are paths already"),
        ({"paths": ["x", "y"], "watch": True}, TypeError, "Pipeline.merge"),
        ({"paths": "nowhere", "watch": True}, FileNotFoundError, "which is not a folder"),
        ({"paths": "nowhere/*.bin", "watch": True}, FileNotFoundError, "which is not a folder"),
        ({"paths": __file__, "watch": True}, NotADirectoryError, r"Lines\(follow=True\)"),
        ({"paths": ".", "watch": True, "settle": 0}, ValueError, "more than 0"),
        ({"paths": ".", "watch": True, "settle": "1"}, TypeError, "number of seconds"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, kind: type[Exception], message: str) -> None:
    """The rule, the value, the way out."""
    with pytest.raises(kind, match=message):
        Files(**arguments)


# -- as they arrive ----------------------------------------------------------------------------------------------------

SETTLE = 0.05

WRITER = """
import os, sys
from pathlib import Path

folder = Path(sys.argv[1])
for line in sys.stdin:
    verb, name, *rest = line.split()
    path = folder / name
    if verb == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rest[0].encode())
    elif verb == "append":
        with path.open("ab") as file:
            file.write(rest[0].encode())
    elif verb == "rename":
        path.rename(folder / rest[0])
    elif verb == "remove":
        path.unlink()
    print("done", flush=True)
"""


@contextmanager
def writer(folder: Path) -> Iterator[Callable[[str], None]]:
    """Another process that changes `folder` as it is told, and returns when it is done."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(line: str) -> None:
            print(line, file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"

        try:
            yield tell
        finally:
            process.stdin.close()


def watched(folder: Path, pattern: str = "", **arguments: Any) -> Pipeline:
    """Names and contents, as they arrive."""
    files = Files(f"{folder}{pattern}", watch=True, settle=SETTLE, with_path=True, **arguments)
    return Pipeline(files).map(lambda sample: (os.path.relpath(sample[0], folder), bytes(sample[1])))


@on_both_faces
@pytest.mark.parametrize("read", ["bytes", "tensor"])
def test_files_come_as_another_process_writes_them(folder: Path, read: Any, face: Face) -> None:
    """Those that are there first, sorted; then each once: written, renamed into place, in a new folder."""
    with writer(folder) as tell, Steps(loader := watched(folder, read=read), face) as steps:
        assert steps.rest(10) == [(f"{number}.bin", content(number)) for number in range(10)]
        tell("write new.bin new")
        assert steps.next() == ("new.bin", b"new")
        tell("append new.bin er")  # it was given
        tell("write .hidden.bin renamed")
        tell("write other.bin.tmp temporary")
        tell("rename .hidden.bin 0-renamed.bin")
        assert steps.next() == ("0-renamed.bin", b"renamed")
        tell("write a/b/deep.bin deep")
        assert steps.next() == ("a/b/deep.bin", b"deep")
        tell("append a/b/second.bin second")
        assert steps.next() == ("a/b/second.bin", b"second")
        tell("remove new.bin")
        tell("write new.bin again")  # another file
        assert steps.next() == ("new.bin", b"again")
        closing(loader, face, steps)


def closing(loader: Pipeline, face: Face, steps: Steps) -> None:
    """An epoch without an end ends when it is closed."""
    if face == "for":
        loader.close()


@on_both_faces
def test_a_watched_glob_gives_what_it_matches(tmp_path: Path, face: Face) -> None:
    """In the folders that it names."""
    with writer(tmp_path) as tell, Steps(loader := watched(tmp_path, "/**/*.bin"), face) as steps:
        tell("write 1.txt no")
        tell("write 1.bin one")
        assert steps.next() == ("1.bin", b"one")
        tell("write x/y/2.bin two")
        assert steps.next() == ("x/y/2.bin", b"two")
        closing(loader, face, steps)


@on_both_faces
def test_a_watch_goes_on_from_its_state(folder: Path, face: Face) -> None:
    """What was given does not come again, also when it was changed; what arrived meanwhile comes, wherever it sorts."""
    with writer(folder) as tell:
        loader = watched(folder)
        with Steps(loader, face) as steps:
            assert [name for name, _ in steps.rest(7)] == [f"{number}.bin" for number in range(7)]
            state = json.loads(json.dumps(loader.state_dict()))
            closing(loader, face, steps)
        tell("append 5.bin more")
        tell("write 0-first.bin late")
        resumed = watched(folder)
        resumed.load_state_dict(state)
        with Steps(resumed, face) as steps:
            names = [name for name, _ in steps.rest(4)]
            assert sorted(names) == ["0-first.bin", "7.bin", "8.bin", "9.bin"]
            tell("write last.bin last")
            assert steps.next() == ("last.bin", b"last")
            closing(resumed, face, steps)


@on_both_faces
def test_a_dataloader_batches_what_arrives(folder: Path, face: Face) -> None:
    """A stream: no length, and the batches that are full."""
    loader = DataLoader(Files(folder, watch=True, settle=SETTLE, read="tensor"), batch_size=4, num_workers=2)
    with pytest.raises(TypeError):
        len(loader)
    with writer(folder) as tell, Steps(loader, face) as steps:
        assert [first_bytes(batch) for batch in steps.rest(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        for name in ("a", "b"):
            tell(f"write {name} {'x' * SIZE}")
        assert sorted(first_bytes(steps.next())) == [8, 9, ord("x"), ord("x")]
        if face == "for":
            loader.close()


@on_both_faces
def test_a_watched_folder_that_is_removed_ends_the_epoch(tmp_path: Path, face: Face) -> None:
    """With an error that names it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "1").write_bytes(b"1")
    with Steps(Pipeline(Files(gone, watch=True, settle=SETTLE)), face) as steps:
        assert steps.next() == b"1"
        (gone / "1").unlink()
        gone.rmdir()
        with pytest.raises(FileNotFoundError, match="the watched folder was removed") as raised:
            steps.next()
        assert raised.value.filename == str(gone)


@on_both_faces
def test_a_watched_folder_whose_place_another_takes_ends_the_epoch(tmp_path: Path, face: Face) -> None:
    """By its name, or by a link that is pointed elsewhere: nothing would ever be seen of what arrives there."""
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    for made in (first, second):
        made.mkdir()
        (made / "1").write_bytes(b"1")
    link.symlink_to("first")
    with Steps(Pipeline(Files(link, watch=True, settle=SETTLE)), face) as steps:
        assert steps.next() == b"1"
        (first / "2").write_bytes(b"2")
        assert steps.next() == b"2"
        (tmp_path / "new").symlink_to("second")
        (tmp_path / "new").rename(link)  # as `ln -sfn` does
        with pytest.raises(OSError, match="another folder took the watched one's place") as raised:
            steps.next()
        assert raised.value.filename == str(link)
    with Steps(Pipeline(Files(first, watch=True, settle=SETTLE)), face) as steps:
        assert steps.rest(2) == [b"1", b"2"]
        first.rename(tmp_path / "away")
        second.rename(first)
        with pytest.raises(OSError, match="another folder took the watched one's place"):
            steps.next()


@on_both_faces
def test_what_arrives_in_a_folder_that_is_linked_later_comes(tmp_path: Path, face: Face) -> None:
    """Under each name that links give it; also when it was linked in a folder that is new, and not through a circle."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "0").write_bytes(b"0")
    with Steps(loader := watched(folder), face) as steps:
        assert steps.next() == ("0", b"0")
        (folder / "link").symlink_to(elsewhere)
        (elsewhere / "1").write_bytes(b"1")
        assert steps.next() == ("link/1", b"1")
        (elsewhere / "2").write_bytes(b"2")
        assert steps.next() == ("link/2", b"2")
        (folder / "new").mkdir()
        (folder / "new" / "same").symlink_to(elsewhere)
        (folder / "new" / "circle").symlink_to(folder)
        (folder / "new" / "nowhere").symlink_to("nowhere")
        assert steps.rest(2) == [("new/same/1", b"1"), ("new/same/2", b"2")]
        (elsewhere / "3").write_bytes(b"3")
        assert sorted(steps.rest(2)) == [("link/3", b"3"), ("new/same/3", b"3")]
        (folder / "new" / "4").write_bytes(b"4")
        assert steps.next() == ("new/4", b"4")
        closing(loader, face, steps)


@on_both_faces
def test_a_folder_that_is_renamed_away_takes_its_names_with_it(tmp_path: Path, face: Face) -> None:
    """What has the same names later is something else, and comes."""
    inside, away = tmp_path / "watched" / "inside", tmp_path / "away"
    inside.mkdir(parents=True)
    away.mkdir()
    (inside / "1").write_bytes(b"1")
    with Steps(loader := watched(tmp_path / "watched"), face) as steps:
        assert steps.next() == ("inside/1", b"1")
        inside.rename(away / "old")
        (tmp_path / "watched" / "2").write_bytes(b"2")
        assert steps.next() == ("2", b"2")
        (away / "new").mkdir()
        (away / "new" / "1").write_bytes(b"another")
        (away / "new").rename(inside)
        assert steps.next() == ("inside/1", b"another")
        closing(loader, face, steps)


def no_utf8(name: str) -> str:
    """A name as Python has it of a file whose name is no UTF-8."""
    return f"{name}\udce9"


@on_both_faces
def test_a_name_that_is_no_utf8_ends_no_watch(tmp_path: Path, face: Face) -> None:
    """Of a file, of a folder in the watched one, and its own; they come like any other, and a state has them."""
    folder = tmp_path / no_utf8("folder")
    folder.mkdir()
    (folder / "0").write_bytes(b"0")
    with Steps(loader := watched(folder), face) as steps:
        assert steps.next() == ("0", b"0")
        for number in range(3):  # again and again
            name = no_utf8(f"{number}-file")
            (folder / name).write_bytes(b"it")
            assert steps.next() == (name, b"it")
            (folder / f"{number}-after").write_bytes(b"after")
            assert steps.next() == (f"{number}-after", b"after")
        (folder / no_utf8("sub")).mkdir()
        (folder / no_utf8("sub") / "1").write_bytes(b"1")
        assert steps.next() == (f"{no_utf8('sub')}/1", b"1")
        state = json.loads(json.dumps(loader.state_dict()))
        closing(loader, face, steps)
    (folder / "last").write_bytes(b"last")
    resumed = watched(folder)
    resumed.load_state_dict(state)
    with Steps(resumed, face) as steps:
        assert steps.next() == ("last", b"last")
        closing(resumed, face, steps)


def test_a_child_that_watches_ends_with_ctrl_c(folder: Path) -> None:
    """Nothing hangs in the wait for what may never come."""
    script = """
    import sys
    from aioloader import Pipeline
    from aioloader.sources import Files, Lines, TarShards
    try:
        for number, sample in enumerate(Pipeline(Files(sys.argv[1], watch=True, settle=0.05))):
            if number == 9:
                print("all", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    """
    with Child(script, str(folder)) as child:
        child.until_line("all")
        child.interrupt()
        assert child.finish() == (0, "interrupted\n", "")


def test_watching_needs_watchfiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, with the way out."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(ImportError, match=r"pip install 'aioloader\[watch\]'"):
        Files(folder, watch=True)


class Clock:
    """The time, as the rule for complete files sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("aioloader.sources.watched_folder.monotonic", lambda: self.now)
        monkeypatch.setattr("aioloader.sources.watched_folder.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@contextmanager
def arrivals(folder: Path) -> Iterator[Any]:
    """What a watch with `settle=10` knows, without a thread that waits for notifications."""
    source = Files(folder, watch=True, settle=10)
    assert isinstance(source, WatchedFiles)
    opened = WatchedFolder(source.folder, GivenNames(None), settle=source.settle, wants=source.wants)
    try:
        yield opened
    finally:
        opened.close()


def written(path: Path, content: bytes, changed: float) -> None:
    path.write_bytes(content)
    os.utime(path, (changed, changed))


def test_a_file_is_complete_when_nothing_happened_to_it_for_a_while(tmp_path: Path, clock: Clock) -> None:
    """Each notification, and each change that is seen without one, begins the wait anew; an empty one waits longer."""
    old, fresh, empty = tmp_path / "old", tmp_path / "fresh", tmp_path / "empty"
    written(old, b"1", 900)
    written(fresh, b"1", 999)
    written(empty, b"", 900)
    with arrivals(tmp_path) as found:
        assert list(found._complete) == ["old"]
        clock.now = 1009
        found._touched(str(fresh))
        clock.now = 1018
        found._look_again()
        assert list(found._complete) == ["old"]
        written(fresh, b"12", 1018)  # whose notification is late
        clock.now = 1019
        found._look_again()
        assert list(found._complete) == ["old"]
        clock.now = 1030
        found._look_again()
        assert list(found._complete) == ["old", "fresh"]
        written(empty, b"1", 1500)
        found._touched(str(empty))
        found._touched(str(old))  # it is complete already
        clock.now = 1041
        found._look_again()
        assert [name for name, *_ in found.take(2)] == ["old", "fresh"]
        assert [name for name, *_ in found.take(2)] == ["empty"]
        assert not found._waiting


def test_a_file_that_goes_before_it_is_given_does_not_come(tmp_path: Path, clock: Clock) -> None:
    """Nobody asked for it yet."""
    written(tmp_path / "complete", b"1", 0)
    written(tmp_path / "waiting", b"1", 999)
    with arrivals(tmp_path) as found:
        for name in ("complete", "waiting"):
            (tmp_path / name).unlink()
            found._touched(str(tmp_path / name))
        assert not found._complete
        assert not found._waiting


def test_a_new_folder_is_looked_through_twice(tmp_path: Path, clock: Clock) -> None:
    """It is not watched from its first moment on: what is written meanwhile is found."""
    with arrivals(tmp_path) as found:
        new = tmp_path / "new"
        new.mkdir()
        found._touched(str(new))
        written(new / "unseen", b"1", 1000)
        clock.now = 1010
        found._look_again()
        clock.now = 1020
        found._look_again()
        assert list(found._complete) == ["new/unseen"]
        assert not found._waiting


def test_a_name_that_is_no_utf8_is_found_in_its_folder(tmp_path: Path, clock: Clock) -> None:
    """watchfiles tells it with other letters."""
    with arrivals(tmp_path) as found:
        path = os.path.join(os.fsencode(tmp_path), b"\xff")  # noqa: PTH118
        Path(os.fsdecode(path)).write_bytes(b"1")
        found._touched(f"{tmp_path}/\ufffd")
        assert os.fsdecode(b"\xff") in found._waiting


def test_who_writes_a_name_that_is_no_utf8_without_end_holds_up_nobody(tmp_path: Path, clock: Clock) -> None:
    """All is looked over again and again; what waits goes on waiting from when it began."""
    with arrivals(tmp_path) as found:
        written(tmp_path / "file", b"1", 1000)
        for clock.now in (1001, 1005, 1009):
            found._look_over()
            assert list(found._waiting) == ["file"]
        clock.now = 1011
        found._look_over()
        found._look_again()
        assert list(found._complete) == ["file"]
        (tmp_path / "file").unlink()
        found._look_over()
        assert not found._complete


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read it")
@on_both_faces
def test_a_folder_that_cannot_be_read_raises_at_its_place(tmp_path: Path, face: Face) -> None:
    """The watch goes on, and when it can be read what is in it comes."""
    (tmp_path / "0").write_bytes(b"0")
    with Steps(loader := watched(tmp_path), face) as steps:
        assert steps.next() == ("0", b"0")
        (tmp_path / "closed").mkdir(0)
        with pytest.raises(PermissionError, match="closed"):
            steps.next()
        (tmp_path / "1").write_bytes(b"1")
        assert steps.next() == ("1", b"1")
        (tmp_path / "closed").chmod(0o700)
        (tmp_path / "closed" / "2").write_bytes(b"2")
        assert steps.next() == ("closed/2", b"2")
        closing(loader, face, steps)


def test_the_names_given_are_kept_in_parts_and_forgotten_with_their_files() -> None:
    """Cursors share their parts, and survive JSON."""
    given = GivenNames(None)
    names = [f"a/{number}.bin" for number in range(3 * CHUNK_NAMES + 5)]
    cursors = []
    for name in names:
        given.add(name)
        cursors.append(given.cursor)
    assert [len(part) for part in given.cursor] == [3, 5]
    for place in (0, CHUNK_NAMES - 1, CHUNK_NAMES, len(names) - 1):
        again = GivenNames(json.loads(json.dumps(cursors[place])))
        assert list(again._names) == names[: place + 1]
        assert again.cursor == cursors[place]
    for name in names[: 2 * CHUNK_NAMES + 5]:
        given.forget(name)
    for number in range(CHUNK_NAMES):
        given.add(f"b/{number}")
    assert len(given.cursor[0]) <= 4
    assert "a/0.bin" not in GivenNames(given.cursor)
    again = GivenNames(given.cursor)
    again.keep({"b/1"})
    assert again.cursor == ((), ("b/1",))


@pytest.mark.parametrize(
    ("path", "folder", "pattern"),
    [
        ("/data/*.bin", "/data", ["*.bin"]),
        ("/data/**/x/*.bin", "/data", ["**", "x", "*.bin"]),
        ("*.bin", ".", ["*.bin"]),
        ("/*.bin", "/", ["*.bin"]),
        ("a/b[0-9]/c", "a", ["b[0-9]", "c"]),
    ],
)
def test_a_glob_is_a_folder_and_a_pattern(path: str, folder: str, pattern: list[str]) -> None:
    """Up to the first name with a wildcard."""
    assert _split(path) == (folder, pattern)


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("a.bin", "*.bin", True),
        ("x/a.bin", "*.bin", False),
        ("a.bin", "**/*.bin", True),
        ("x/y/a.bin", "**/*.bin", True),
        ("x/y/a.bin", "x/**", True),
        ("y/a.bin", "x/**", False),
        ("x/1/a", "x/?/a", True),
        ("x/12/a", "x/?/a", False),
    ],
)
def test_names_match_as_globs_do(name: str, pattern: str, matches: bool) -> None:
    """Part by part."""
    assert _matches(name.split("/"), pattern.split("/")) == matches
