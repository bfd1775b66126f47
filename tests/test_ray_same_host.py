"""Results of actors in segments: what is told in which order, what is lost, and what is left."""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Pipeline
from aioloader.executors.processes.wire import encode
from aioloader.executors.ray import hiring
from aioloader.executors.ray.same_host import (
    Answer,
    Inbox,
    InSegments,
    OpenFile,
    Outbox,
    PartPost,
    SegmentsGoneError,
    answer_bytes,
    probe,
)
from aioloader.memory.mapping import Mapping
from tests._ray import RayCluster

SIZE = 1 << 15  # elements; a result of this size goes in segments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files of other processes are in /proc")


@pytest.fixture(autouse=True)
def no_probe_is_left() -> Iterator[None]:
    """That of an actor stays open as long as it lives; here the actor is the test."""
    yield
    if probe.cache_info().currsize and (file := probe()) is not None:
        os.close(file.fd)
    probe.cache_clear()


@pytest.fixture
def there() -> Iterator[Outbox]:
    """That of an actor ends with it."""
    outbox = Outbox()
    yield outbox
    outbox.close()


def inbox() -> Inbox:
    """For an actor that is this process."""
    found = Inbox.of(os.getpid(), probe())
    assert found is not None
    return found


def large(number: float) -> torch.Tensor:
    return torch.full((SIZE,), float(number))


def open_files() -> int:
    """Those of segments; others, which tests before have left, may be closed by a collection at any time."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - there is nothing to be opened for it
        with contextlib.suppress(OSError):  # that of the list itself
            found += "memfd:aioloader" in os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    return found


# -- one process -------------------------------------------------------------------------------------------------------


def test_a_result_is_mapped_and_not_copied(there: Outbox) -> None:
    """What the actor wrote is what is read, until nobody has it any more; then its memory is used again."""
    here = inbox()
    sent = there.arena.alloc((SIZE,), torch.float32)
    sent.fill_(7)
    answer = there.pack(["few", sent])
    assert isinstance(answer, InSegments)
    assert answer_bytes(answer) > 4 * SIZE
    word, got = here.unpack(answer, None)
    assert (word, float(got.sum())) == ("few", 7 * SIZE)
    sent.fill_(8)
    assert float(got[0]) == 8, "they are the same memory"
    del got
    there.hear(here.told())
    again = there.pack(large(9))
    assert isinstance(again, InSegments)
    assert (again.places[0].segment, again.new) == (answer.places[0].segment, [])


def test_a_view_keeps_its_memory(there: Outbox) -> None:
    """The smallest view of a result; what comes next is elsewhere."""
    here = inbox()
    kept = here.unpack(there.pack(large(1)), None)[:1]
    for number in range(2, 6):
        there.hear(here.told())
        assert float(here.unpack(there.pack(large(number)), None)[-1]) == number
    assert kept.tolist() == [1]


def test_small_results_go_with_the_answer(there: Outbox) -> None:
    answer = there.pack([torch.ones(100), "few"])
    assert not isinstance(answer, InSegments)
    ones, word = inbox().unpack(answer, None)
    assert (float(ones.sum()), word) == (100, "few")
    for number in range(20):  # made in a segment, which is free again
        small = there.arena.alloc((2048,), torch.float32).fill_(number)
        assert not isinstance(there.pack(small), InSegments)
    large_one = there.pack(there.arena.alloc((SIZE,), torch.float32).fill_(7))
    assert isinstance(large_one, InSegments)
    assert large_one.places[0].segment <= 2, "small results have left no segments behind"


def test_batches_of_a_part_are_made_where_they_are_sent_from() -> None:
    """From the first read on by a process of this host."""
    here, post, size = inbox(), PartPost(), 8 * SIZE
    assert not isinstance(post.pack(*encode([post.alloc((size,), torch.float32).fill_(1)])), InSegments)
    for number in range(2, 6):
        post.hear(here.told())
        batch = post.alloc((size,), torch.float32).fill_(number)
        address = batch.data_ptr()
        encoded = encode([batch])
        del batch
        answer = post.pack(*encoded)
        assert isinstance(answer, InSegments)
        assert answer.places[0].offset == 0
        again = post._outbox.arena._lent[answer.places[0].segment]  # type: ignore[union-attr]
        assert again.mapping.address == address
        (came,) = here.unpack(answer, None)
        assert (came == number).all()
        del came
    post.close()
    assert post.alloc((size,), torch.float32).shape == (size,)


def test_what_cannot_be_pickled_leaves_the_segments_free(there: Outbox) -> None:
    """Once another result has been sent: until then, what was in them may be sent without what is to blame."""
    first = there.arena.alloc((SIZE,), torch.float32)
    with pytest.raises(Exception, match="lock"):
        there.pack([first, __import__("threading").Lock()])
    segments = []
    for number in range(2):
        answer = there.pack(large(number))
        assert isinstance(answer, InSegments)
        segments.append(answer.places[0].segment)
    assert segments == [2, 1]


def test_files_are_closed_once_they_are_mapped(there: Outbox) -> None:
    """And those that nobody has mapped when it is over."""
    here = inbox()
    before = open_files()
    kept = [here.unpack(there.pack(large(number)), None) for number in range(3)]
    assert open_files() == before + 3
    there.hear(here.told())
    assert open_files() == before
    there.pack(large(4))
    there.close()
    assert open_files() == before
    assert [float(value[0]) for value in kept] == [0, 1, 2]


def shuffled_calls(seed: int) -> None:
    """One history of calls and answers."""
    chance = random.Random(seed)
    here, there = inbox(), Outbox()
    calls: list[Any] = []  # on their way
    answers: list[tuple[float, Answer]] = []
    kept: list[tuple[float, torch.Tensor]] = []
    for number in range(40):
        calls.append(here.told())
        if chance.random() < 0.6:
            call = calls.pop(chance.randrange(len(calls)))  # others are still to come, or never do
            if chance.random() < 0.2:
                calls.append(call)
            there.hear(call)
            value = there.arena.alloc((SIZE + chance.randrange(3) * 1024,), torch.float32)
            answers.append((number, there.pack(value.fill_(number))))
        while answers and chance.random() < 0.5:
            expected, answer = answers.pop(0)
            kept.append((expected, here.unpack(answer, None)))
        chance.shuffle(kept)
        del kept[chance.randrange(1, 5) :]
        assert all(bool((value == expected).all()) for expected, value in kept), seed
    kept.clear()
    for _, answer in answers:
        here.unpack(answer, None)
    there.hear(here.told())
    assert not there.arena._lent, f"what is free is known to be free, with seed {seed}"
    assert not there._files, seed


def test_calls_that_are_lost_or_late_change_nothing() -> None:
    """Told in any order, several times or never: no memory that somebody has is written to, and none is lost."""
    for seed in range(25):
        shuffled_calls(seed)


def test_another_process_with_the_same_number_is_not_taken_for_it(there: Outbox) -> None:
    """Its file of that number is another one."""
    answer = there.pack(large(1))
    assert isinstance(answer, InSegments)
    (number, size, file) = answer.new[0]
    other = answer._replace(new=[(number, size, file._replace(inode=file.inode + 1))])
    here = inbox()
    with pytest.raises(SegmentsGoneError, match="another one"):
        here.unpack(other, None)
    with pytest.raises(SegmentsGoneError, match="was lost"):  # named by an answer that was lost
        here.unpack(answer._replace(new=[]), None)
    assert Inbox.of(os.getpid(), file._replace(inode=file.inode + 1)) is None


def test_an_actor_elsewhere_is_found_out(there: Outbox) -> None:
    """Where it does not answer to its number, has no file, or has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert Inbox.of(ended.pid, probe()) is None
    assert Inbox.of(os.getpid(), None) is None
    answer = there.pack(large(1))
    with pytest.raises(SegmentsGoneError, match="cannot be mapped"):
        Inbox(ended.pid).unpack(answer, None)


def test_a_probe_is_one_file() -> None:
    """However often it is asked for."""
    first = probe()
    before = open_files()
    assert probe() == first
    assert open_files() == before
    assert isinstance(first, OpenFile)


# -- a cluster ---------------------------------------------------------------------------------------------------------


def no_line(*_: Any, **__: Any) -> None:
    raise OSError("no more sockets")


@pytest.fixture(params=["line", "segments", "store"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How results come: from a node on this host, over a line or not, or as from another one."""
    if request.param == "segments":
        monkeypatch.setattr(hiring, "Line", no_line)
    if request.param == "store":
        monkeypatch.setattr(Inbox, "of", lambda *_: None)
    return str(request.param)


def image(key: int) -> torch.Tensor:
    return torch.full((1 << 19,), float(key))


async def image_async(key: int) -> torch.Tensor:
    return image(key)


class Images(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return image(index)


def loaders() -> dict[str, Any]:
    return {
        "map": Pipeline(range(12)).map(image, executor="ray", concurrency=2).batch(2),
        "async map": Pipeline(range(12)).map(image_async, executor="ray", concurrency=2).batch(2),
        "DataLoader": DataLoader(Images(), 2, num_workers=2, worker_type="ray"),
        "in_ray": Pipeline(range(12)).map(image).batch(2).in_ray(2, parts=2),
    }


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["map", "async map", "DataLoader", "in_ray"])
def test_what_comes_is_nobody_elses(way: str, name: str) -> None:
    """Written to at once, and kept beyond the epoch and the actors: the same on all ways."""
    with loaders()[name] as loader:
        kept = []
        for _ in range(3):
            for batch in loader:
                batch += 1
                kept.append(batch)
    firsts = sorted(int(value) for batch in kept for value in batch[:, 0])
    assert firsts == sorted(3 * list(range(1, 13)))
    assert all(bool((row == row[0]).all()) for batch in kept for row in batch)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["map", "async map", "DataLoader", "in_ray"])
def test_segments_are_what_is_used_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nodes of this host: large results do come in segments, and these are used again."""
    mapped: list[int] = []

    def counted(*args: Any, **others: Any) -> Any:
        mapped.append(1)
        return Mapping(*args, **others)

    monkeypatch.setattr("aioloader.executors.processes.segments.Mapping", counted)
    with loaders()[name] as loader:
        for _ in range(5):
            for batch in loader:
                del batch
    assert 1 <= len(mapped) < 5 * 6


@pytest.fixture
def killed_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The actor of the third answer in segments dies when that has come, and before it is mapped."""
    heard = [0]
    unpack = Inbox.unpack
    victims: list[int] = []

    def dies(self: Inbox, answer: Answer, alloc: Any) -> Any:
        if isinstance(answer, InSegments) and answer.new:
            heard[0] += 1
            if heard[0] == 2:
                victims.append(self._pid)
                os.kill(self._pid, signal.SIGKILL)
                while Path(f"/proc/{self._pid}/fd/{answer.new[0][2].fd}").exists():
                    os.sched_yield()
        return unpack(self, answer, alloc)

    monkeypatch.setattr(Inbox, "unpack", dies)
    monkeypatch.setattr(hiring, "Line", no_line)  # over one, files come with the answer
    yield victims
    assert victims


@pytest.mark.ray
@pytest.mark.parametrize("name", ["map", "async map", "DataLoader", "in_ray"])
def test_an_actor_that_dies_after_its_answer_loses_nothing(
    ray_cluster: RayCluster, killed_before_it_is_read: list[int], name: str
) -> None:
    """Its segments have gone with it: what was in them is made again, in order, once."""
    with loaders()[name] as loader:
        rows = [int(row[0]) for batch in loader for row in batch]
    parts = [row for first in range(0, 12, 4) for row in (first, first + 2, first + 1, first + 3)]
    assert rows == (parts if name == "in_ray" else list(range(12)))
    gc.collect()
