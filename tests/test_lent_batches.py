"""Batches that are made side by side in shared memory, and sent without a copy if nobody else has them."""

import gc
import os
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch

from aioloader import Pipeline
from aioloader.engine import thread_step
from aioloader.executors.processes import segments
from aioloader.executors.processes.segments import Arena, MappedSegments
from aioloader.executors.processes.wire import decode, encode
from aioloader.executors.processes.worker import WorkerLink
from aioloader.executors.threads import call_loop
from aioloader.plan.elsewhere import sends_what_it_collates
from tests._support import Face, collect, on_both_faces

pytestmark = pytest.mark.usefixtures("fork_server")

SIZE = 1 << 18  # of a batch; of this size its memory is shared


class Peers:
    """An engine and the process that gets its batches, both in this one.

    Attributes:
        copied: How many bytes were copied into segments.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arena = Arena()
        self.mapped = MappedSegments()
        self.copied = 0
        reserve = self.arena._reserve

        def counting(size: int) -> Any:
            self.copied += size
            return reserve(size)

        monkeypatch.setattr(self.arena, "_reserve", counting)

    def batch(self, number: float, size: int = SIZE) -> torch.Tensor:
        return self.arena.lend((size,), torch.float32).fill_(number)

    def send(self, stream: bytes, buffers: list[memoryview]) -> Any:
        """What `encode` has given, as it comes there."""
        self.arena.take_back(self.mapped.freed())
        places = self.arena.place(buffers)
        if places is None:
            return decode(stream, [bytearray(buffer) for buffer in buffers])
        for number, size, fd in self.arena.hand_over(places):
            self.mapped.map(number, size, fd)
        self.mapped.forget(self.arena.trim())
        return decode(stream, self.mapped.buffers(places))

    def segments(self) -> int:
        """How many there are; each is where it can be used again."""
        gc.collect()
        self.arena.take_back(self.mapped.freed())
        self.arena._collect()
        assert not self.arena._out
        assert not self.arena._lent
        assert not self.arena._claimed
        return len(self.arena._free)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    peers = Peers(monkeypatch)
    yield peers
    peers.arena.close()


def same(batch: torch.Tensor, number: float) -> bool:
    return bool((batch == number).all())


def test_a_batch_that_nobody_else_has_is_not_copied(peers: Peers) -> None:
    for number in range(20):
        came = peers.send(*encode({"x": peers.batch(number), "y": [number]}))
        assert same(came["x"], number)
        del came
    assert not peers.copied
    assert peers.segments() == 2  # the next one is begun before it is told that the last one is free


def test_one_that_somebody_keeps_is_copied(peers: Peers) -> None:
    kept = peers.batch(1)
    other = peers.batch(2)
    view, encoded = other[5:6], encode([kept, other])
    del other
    came = peers.send(*encoded)
    assert peers.copied
    came[0].zero_()
    assert same(kept, 1)
    assert same(view, 2)
    kept.fill_(3)
    assert same(came[0], 0)


def test_what_was_kept_is_used_again_later(peers: Peers) -> None:
    kept = [peers.batch(number) for number in range(4)]
    came = [peers.send(*encode([batch])) for batch in kept]
    assert peers.copied
    del kept, came
    assert peers.segments() <= 8
    peers.copied, made = 0, peers.arena._made
    for number in range(10):
        (batch,) = peers.send(*encode([peers.batch(number)]))
        assert same(batch, number)
        del batch
    assert not peers.copied
    assert peers.arena._made == made


def test_a_small_part_does_not_take_the_whole_along(peers: Peers) -> None:
    (few,) = peers.send(*encode([peers.batch(1, 4 * SIZE)[:SIZE]]))
    assert peers.copied == 4 * SIZE
    assert same(few, 1)


def test_parts_that_are_most_of_it_go_with_it(peers: Peers) -> None:
    whole = peers.batch(1)
    whole[: SIZE // 2] = 2
    parts = encode([whole[: SIZE // 2], whole[SIZE // 2 :].numpy()])
    del whole
    first, second = peers.send(*parts)
    assert not peers.copied
    assert same(first, 2)
    assert (second == 1).all()


def test_more_than_a_message_takes(peers: Peers) -> None:
    """Of file descriptors: the rest is copied."""
    batches = encode([peers.batch(number) for number in range(30)])
    came = peers.send(*batches)
    del batches
    assert [float(batch[-1]) for batch in came] == list(range(30))
    assert all(same(batch, number) for number, batch in enumerate(came))
    assert peers.copied == 4 * SIZE * (30 - segments.MAX_SEGMENTS)


def test_without_memory_to_share_it_comes_all_the_same(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = peers.batch(1)
    sole = encode([kept, peers.batch(2), torch.full((SIZE,), 3.0)])

    def full(size: int) -> int:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(segments, "create_file", full)
    made = peers.batch(4)  # torch's
    came = peers.send(*sole)
    again = peers.batch(5)  # in the segment of batch 2
    assert [float(batch[0]) for batch in came] == [1, 2, 3]
    assert same(kept, 1)
    assert same(again, 5)
    assert same(made, 4)
    del kept, again
    assert peers.segments() == 2


def test_small_results_are_not_in_segments_that_are_free(peers: Peers) -> None:
    """They may be read later than the segment is used again."""
    stream, buffers = encode(peers.arena.alloc((1000,), torch.float32).fill_(1))
    assert peers.arena.place(buffers) is None
    peers.arena.alloc((1000,), torch.float32).fill_(2)
    assert same(decode(stream, buffers), 1)


def test_so_many_at_a_time_are_in_segments_and_no_more(peers: Peers) -> None:
    """Each has an open file."""
    batches = [peers.batch(number) for number in range(segments.MAX_OUT + 10)]
    assert len(peers.arena._out) == segments.MAX_OUT
    assert all(same(batch, number) for number, batch in enumerate(batches))


def test_after_the_end_memory_is_torchs_and_no_file_is_open(peers: Peers) -> None:
    kept = peers.batch(1)
    memory = ref(peers.arena._out[1].mapping)
    files = [segment.fd for segment in peers.arena._out.values()]
    peers.arena.close()
    for fd in files:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
    assert same(peers.batch(2), 2)
    assert same(kept, 1)
    del kept
    gc.collect()
    assert memory() is None, "the arena keeps nothing"


@pytest.mark.parametrize("seed", range(8))
def test_threads_that_make_keep_change_and_drop_batches(peers: Peers, seed: int) -> None:
    """What came stays as it was sent, and what was kept stays as it was made: nobody writes to another's memory.

    Three threads make batches; each may be kept there, by a reference that ends at any moment, also while it is sent.
    """
    made: deque[tuple[int, tuple[bytes, list[memoryview]]]] = deque()
    wrong: list[str] = []
    over = threading.Event()
    room = threading.Semaphore(6)
    there = threading.Semaphore(0)

    def make(of: int) -> None:
        chance = random.Random(seed * 100 + of)
        kept: list[tuple[int, torch.Tensor]] = []
        for number in range(of, 240, 3):
            room.acquire()
            batch = peers.batch(number)
            if chance.random() < 0.5:
                kept.append((number, batch))
            made.append((number, encode([batch])))
            del batch
            there.release()
            while kept and chance.random() < 0.5:
                number_kept, one = kept.pop(chance.randrange(len(kept)))
                if not same(one, number_kept):
                    wrong.append(f"{number_kept} was changed where it was made")
                del one

    threads = [threading.Thread(target=make, args=(of,)) for of in range(3)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        chance = random.Random(seed)
        held: list[tuple[int, torch.Tensor]] = []
        for _ in range(240):
            there.acquire()
            number, encoded = made.popleft()
            (came,) = peers.send(*encoded)
            room.release()
            del encoded
            if not same(came, number):
                wrong.append(f"{number} came as {float(came[0])}")
            came.fill_(-number)
            held.append((number, came))
            del came
            while len(held) > chance.randrange(5):
                number, one = held.pop(chance.randrange(len(held)))
                if not same(one, -number):
                    wrong.append(f"{number} was changed there")
                del one
        for thread in threads:
            thread.join()
    finally:
        over.set()
        sys.setswitchinterval(switch)
    assert not wrong
    held.clear()
    assert peers.segments() <= segments.MAX_FREE + 6


# -- in a process of its own -------------------------------------------------------------------------------------------


def filled(number: int) -> torch.Tensor:
    return torch.full((SIZE,), float(number))


def refuses_copies(number: int) -> torch.Tensor:
    """In the other process: whatever is copied into a segment ends it."""

    def reserve(self: Arena, size: int) -> Any:
        assert size < SIZE, "a batch is copied"
        return real(self, size)

    real: Callable[..., Any] = Arena._reserve
    if real.__module__ == segments.__name__:
        Arena._reserve = reserve  # type: ignore[method-assign]
    return filled(number)


@on_both_faces
def test_its_batches_are_collated_where_they_are_sent_from(face: Face) -> None:
    with Pipeline(range(40)).map(refuses_copies).batch(2).in_process() as loader:
        for _ in range(2):
            for number, batch in enumerate(collect(loader, face)):
                assert same(batch[0], 2 * number)
                assert same(batch[1], 2 * number + 1)


def refuses_copies_and_stays(number: int) -> torch.Tensor:
    """The same; and a thread that has made a batch stands still until one is sent."""
    if vars(thread_step)["call_loop"] is call_loop:
        sent = threading.Semaphore(0)
        send: Callable[..., Any] = WorkerLink.send_encoded

        def sending(link: WorkerLink, *args: Any) -> None:
            send(link, *args)
            sent.release()

        def call(loop: Any, callback: Any, step: Any, job: thread_step.ThreadJob, *args: Any) -> None:
            made_batch = any(outcome.ndim == 2 for outcome in job.outcomes)
            call_loop(loop, callback, step, job, *args)
            if made_batch:
                assert sent.acquire(timeout=10)

        for owner, name, value in [
            (WorkerLink, "send_encoded", sending),
            (thread_step, "call_loop", call),
            (thread_step, "LIGHT_SECONDS", 0.0),  # no batch is collated on the loop
        ]:
            setattr(owner, name, value)
    return refuses_copies(number)


@on_both_faces
def test_a_thread_that_has_collated_a_batch_knows_nothing_of_it(face: Face) -> None:
    """Else the batch would be copied, whenever that thread loses the processor between two of its last lines."""
    with Pipeline(range(12)).map(refuses_copies_and_stays, concurrency=1).batch(2).in_process() as loader:
        for number, batch in enumerate(collect(loader, face)):
            assert same(batch[0], 2 * number)


def has_no_memory_to_share(number: int) -> torch.Tensor:
    """In the other process."""

    def full(size: int) -> int:
        raise OSError(28, "no space left on device")

    segments.create_file = full
    return filled(number)


@on_both_faces
def test_without_memory_to_share_there_all_goes_through_the_socket(face: Face) -> None:
    """A message is larger than what the socket takes at once, whichever event loop has let it not block."""
    with Pipeline(range(24)).map(has_no_memory_to_share).batch(2).in_process() as loader:
        batches = collect(loader, face)
    assert [float(batch[1, -1]) for batch in batches] == list(range(1, 24, 2))


def forks(batch: torch.Tensor) -> torch.Tensor:
    """The child writes to what it has of the batch."""
    child = os.fork()
    if not child:
        batch.fill_(-1)
        os._exit(0)
    os.waitpid(child, 0)
    return batch


@on_both_faces
def test_what_a_child_of_that_process_writes_is_its_own(face: Face) -> None:
    with Pipeline(range(8)).map(filled).batch(2).map(forks, concurrency=1).in_process() as loader:
        batches = collect(loader, face)
    assert [float(batch[0, 0]) for batch in batches] == list(range(0, 8, 2))


def last(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(
    ("pipeline", "lent"),
    [
        (Pipeline(range(9)).batch(2), True),
        (Pipeline(range(9)).map(filled).shuffle(seed=1).batch(2, drop_last=True), True),
        (Pipeline(range(9)).map(filled), False),
        (Pipeline(range(9)).batch(2).map(last), False),
        (Pipeline(range(9)).batch(2).cache(memory_bytes=1 << 20), False),
        (Pipeline(range(9)).batch(2).map(last).batch(2), False),
        (Pipeline.merge(Pipeline(range(9)).batch(2), Pipeline(range(9)).batch(2)), True),
        (Pipeline.merge(Pipeline(range(9)).batch(2), Pipeline(range(9)).batch(2).map(last)), False),
        (Pipeline.merge(Pipeline(range(9)).batch(2), Pipeline(range(9)).batch(2)).batch(2), False),
        (Pipeline.mix([range(9), range(9)], [1, 2]).batch(2), True),
    ],
)
def test_only_what_nothing_sees_before_it_is_sent_is_made_in_shared_memory(pipeline: Pipeline[Any], lent: bool) -> None:
    assert sends_what_it_collates(pipeline._plan) == lent


kept: list[torch.Tensor] = []


def keeps(batch: torch.Tensor) -> torch.Tensor:
    """The first one of an epoch, of 12 batches, changes those of the epochs before."""
    if not len(kept) % 12:
        for one in kept:
            one.fill_(-1)
    kept.append(batch)
    return batch


@on_both_faces
def test_a_function_there_may_keep_a_batch_and_change_it(face: Face) -> None:
    with Pipeline(range(24)).map(filled).batch(2).map(keeps, concurrency=1).in_process() as loader:
        epochs = [collect(loader, face) for _ in range(3)]
    for batches in epochs:
        assert [float(batch[0, 0]) for batch in batches] == list(range(0, 24, 2))


@on_both_faces
def test_a_cache_there_does_not_see_what_is_written_here(face: Face) -> None:
    with Pipeline(range(24)).map(filled).batch(2).cache(memory_bytes=1 << 30).in_process() as loader:
        for _ in range(3):
            for number, batch in enumerate(collect(loader, face)):
                assert same(batch[0], 2 * number)
                batch.fill_(-1)
