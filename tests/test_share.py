"""`share`: one rank reads, the others get the same, in shared memory.

Most ranks here are threads of one process, which talk over the same sockets and map the same memory as processes do.
"""

import asyncio
import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader import LoaderClosedError, Pipeline, WorkerDiedError
from aioloader.core.entry import Entry
from aioloader.engine import meeting
from aioloader.engine.fuse import exactly
from aioloader.engine.inline import InlineSource
from aioloader.engine.lending_node import LendingNode, ShareTerms, _Guest
from aioloader.engine.node import Kick, Node
from aioloader.engine.run import Run
from aioloader.engine.window import Window
from aioloader.executors.processes.lending import MOST_FREE, Borrower, Lender
from aioloader.executors.processes.wire import Connection
from aioloader.stages.share import Share
from tests._support import DEADLINE, Face, Started, Steps, collect, notes, on_both_faces, turns, until, wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="share needs Linux")

Build = Callable[[int], Pipeline]
"""The pipeline of a rank, before `share`."""

WIDE = 4096  # a batch of such rows goes through shared memory


@pytest.fixture(autouse=True)
def threads_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Share, "ranks", lambda stage: (stage.rank, tuple(stage.group)))


_names = itertools.count(10**6)


def shared(build: Build, size: int, *, timeout: float = DEADLINE) -> list[Pipeline]:
    """The loader of each rank; what is before `share` is `build(rank)`."""
    number = next(_names)
    loaders = []
    for rank in range(size):
        loader = build(rank).share(range(size), timeout=timeout)
        stage = loader._plan.stages[-1]
        object.__setattr__(stage, "number", number)
        object.__setattr__(stage, "rank", rank)
        loaders.append(loader)
    return loaders


def together(loaders: list[Pipeline], program: Callable[[Pipeline], Any]) -> list[Any]:
    """What `program` returns for each, all at the same time."""
    started = [Started(lambda loader=loader: program(loader)) for loader in loaders]  # type: ignore[misc]
    return [one.outcome() for one in started]


def outcomes(face: Face) -> Callable[[Pipeline], list[Any]]:
    def run(loader: Pipeline) -> list[Any]:
        with Steps(loader, face) as steps:
            return steps.outcomes()

    return run


class Calls:
    """Rows of a key each; counts by rank."""

    def __init__(self) -> None:
        self.of: dict[int, list[int]] = {}

    def rows(self, rank: int) -> Callable[[int], torch.Tensor]:
        mine = self.of.setdefault(rank, [])

        def row(key: int) -> torch.Tensor:
            mine.append(key)
            return torch.full((WIDE,), key)

        return row


def first(batch: Any) -> list[int]:
    column: list[int] = batch[:, 0].tolist()
    return column


# -- the same for all --------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("batched", [True, False])
def test_all_get_the_same_and_one_reads(face: Face, batched: bool) -> None:
    calls = Calls()

    def build(rank: int) -> Pipeline:
        pipeline = Pipeline(range(30)).shuffle(seed=3).map(calls.rows(rank), concurrency=4)
        return pipeline.batch(4) if batched else pipeline

    alone = [batch.tolist() for batch in collect(build(9), face)]
    loaders = shared(build, 3)
    for epoch in range(2):
        found = together(loaders, lambda loader: [batch.tolist() for batch in collect(loader, face)])
        assert found[0] == found[1] == found[2]
        assert (found[0] == alone) is (epoch == 0)
        assert sorted(itertools.chain(*found[0])) == sorted(itertools.chain(*alone))
    assert [len(calls.of[rank]) for rank in range(3)] == [60, 0, 0]


@on_both_faces
def test_who_changes_a_batch_changes_it_for_nobody_else(face: Face) -> None:
    """Neither the others' now, nor what is written into the same memory later."""
    calls = Calls()
    loaders = shared(lambda rank: Pipeline(range(60)).map(calls.rows(rank)).batch(2), 3)

    def program(loader: Pipeline) -> list[list[int]]:
        seen = []
        with Steps(loader, face) as steps:
            for batch in iter(lambda: next_of(steps), None):
                seen.append(first(batch))
                assert (batch == batch[:, :1]).all()
                batch += 1000
        return seen

    assert together(loaders, program) == [[[n, n + 1] for n in range(0, 60, 2)]] * 3


def next_of(steps: Steps) -> Any:
    try:
        return steps.next()
    except StopIteration:
        return None


@on_both_faces
def test_the_state_of_each_is_that_of_a_loader_that_reads_itself(face: Face) -> None:
    calls = Calls()

    def build(rank: int) -> Pipeline:
        return Pipeline(range(20)).shuffle(seed=1).map(calls.rows(rank)).batch(3)

    plain = build(9)
    whole = [first(batch) for batch in collect(plain, face)]

    def begin(loader: Pipeline) -> Any:
        with Steps(loader, face) as steps:
            head = [first(batch) for batch in steps.rest(3)]
            state = pickle.loads(pickle.dumps(loader.state_dict()))
            return head, state, len(steps.rest())

    found = together(shared(build, 2), begin)
    assert [one[0] for one in found] == [whole[:3]] * 2
    assert found[0][1] == found[1][1]
    again = shared(build, 2)
    for loader, (_, state, _) in zip(again, found, strict=True):
        loader.load_state_dict(state)
    assert together(again, lambda loader: [first(batch) for batch in collect(loader, face)]) == [whole[3:]] * 2
    alone = build(9)
    alone.load_state_dict(found[1][1])
    assert [first(batch) for batch in collect(alone, face)] == whole[3:]


@on_both_faces
def test_an_error_comes_at_its_place_everywhere(face: Face) -> None:
    def build(rank: int) -> Pipeline:
        def load(key: int) -> torch.Tensor:
            if key == 5:
                raise KeyError("no such image")
            return torch.full((WIDE,), key)

        return Pipeline(range(12)).map(load).batch(3)

    for found in together(shared(build, 2), outcomes(face)):
        assert [first(one) if isinstance(one, torch.Tensor) else type(one) for one in found] == [
            [0, 1, 2],
            KeyError,
            [6, 7, 8],
            [9, 10, 11],
        ]
        assert "key 5" in notes(found[1])


@on_both_faces
def test_what_cannot_travel_is_an_error_for_all(face: Face) -> None:
    def build(rank: int) -> Pipeline:
        return Pipeline(range(3)).map(lambda key: threading.Lock() if key == 1 else key)

    for found in together(shared(build, 2), outcomes(face)):
        assert [found[0], found[2]] == [0, 2]
        assert isinstance(found[1], pickle.PicklingError)


@pytest.mark.parametrize(
    "before",
    [
        lambda loader: loader.in_process(),
        lambda loader: loader.skip_errors(),
        lambda loader: loader.take(3),
        lambda loader: loader.repeat(2),
        lambda loader: loader.drop_if(lambda _: False),
        lambda loader: Pipeline.zip(loader, loader),
    ],
    ids=["in_process", "skip_errors", "take", "repeat", "drop_if", "zip"],
)
def test_batches_that_are_ahead_already_are_shared(before: Callable[[Pipeline], Pipeline]) -> None:
    """There is nothing left to be made in a window of its own."""

    def build(_: int) -> Pipeline:
        return before(Pipeline(range(8)).map(abs).batch(2, collate_fn=list))

    assert together(shared(build, 2), list) == [list(build(0))] * 2


def test_several_pipelines_share_at_the_same_time() -> None:
    calls = Calls()

    def build(rank: int) -> Pipeline:
        return Pipeline(range(8)).map(calls.rows(rank)).batch(2)

    one, other = shared(build, 2), shared(build, 2)
    pairs = [Pipeline.zip(a, b) for a, b in zip(one, other, strict=True)]
    found = together(pairs, lambda loader: [(first(a), first(b)) for a, b in loader])
    assert found[0] == found[1] == [([n, n + 1], [n, n + 1]) for n in range(0, 8, 2)]


# -- bounds and memory -------------------------------------------------------------------------------------------------


@on_both_faces
def test_nobody_runs_ahead_of_the_slowest(face: Face) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def row(key: int) -> torch.Tensor:
        loops.append(asyncio.get_running_loop())
        return torch.full((WIDE,), key)

    loaders = shared(lambda _: Pipeline(range(40)).map(row, concurrency=1).batch(1).prefetch(0), 2)
    more = threading.Event()

    def guest() -> list[list[int]]:
        with Steps(loaders[1], face) as steps:
            seen = [first(batch) for batch in steps.rest(3)]
            more.wait(DEADLINE)
            return seen + [first(batch) for batch in steps.rest()]

    reading = Started(lambda: [first(batch) for batch in collect(loaders[0], face)])
    waiting = Started(guest)
    wait_until(lambda: loaders[0].stats().batches >= 4)
    for _ in range(20):  # it has all the time that it could use
        asyncio.run_coroutine_threadsafe(turns(), loops[0]).result(DEADLINE)
    assert loaders[0].stats().batches == 4, "the guest has one more at hand"
    more.set()
    assert reading.outcome() == waiting.outcome() == [[n] for n in range(40)]


@pytest.fixture
def lenders(monkeypatch: pytest.MonkeyPatch) -> list[Lender]:
    """Those of all hosts."""
    found: list[Lender] = []
    made = LendingNode.__init__

    def init(node: LendingNode, upstream: Node, terms: ShareTerms, lender: Lender) -> None:
        made(node, upstream, terms, lender)
        found.append(lender)

    monkeypatch.setattr(LendingNode, "__init__", init)
    return found


@on_both_faces
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_all_together_hold_no_more_batches_than_one_that_reads_for_itself(
    face: Face, prefetch: int, lenders: list[Lender]
) -> None:
    """The one in use, those made ahead, and the one that is made while the one before is given up."""
    loops: list[asyncio.AbstractEventLoop] = []
    all_ranks = threading.Barrier(3, timeout=DEADLINE)

    async def row(key: int) -> torch.Tensor:
        loops.append(asyncio.get_running_loop())
        return torch.full((WIDE,), key)

    loaders = shared(lambda _: Pipeline(range(40)).map(row).batch(2).prefetch(prefetch), 3)

    def hold_each(loader: Pipeline) -> list[list[int]]:
        seen, batch = [], None
        with Steps(loader, face) as steps:
            while (batch := next_of(steps)) is not None:
                seen.append(first(batch))
                for _ in range(20 if len(seen) < 10 else 0):  # all that can be made ahead is, and there is more to come
                    all_ranks.wait()
                    if face == "async for":
                        steps.do(turns)
                    elif loader is loaders[0]:
                        steps.settle(loops[0])
        return seen

    assert together(loaders, hold_each) == [[[n, n + 1] for n in range(0, 40, 2)]] * 3
    (lender,) = lenders
    assert 0 < lender.made <= max(2, prefetch) + 2


def test_what_is_collated_is_not_copied_again() -> None:
    lender, borrower = Lender(), Borrower()
    batch = lender((2, WIDE), torch.int64)
    batch.copy_(torch.arange(WIDE).expand(2, WIDE))
    loan = lender.lend({"x": batch, "y": batch[1]}, 1)
    assert (lender.made, loan.numbers) == (1, (1,))
    value = borrower.borrow(loan.head, loan.body, loan.fds)
    loan.close()
    assert torch.equal(value["x"], batch)
    again = lender.lend(batch, 1)
    assert again.numbers == (2,), "as long as it is lent, it is lent again as a copy: each has its own changes"
    again.close()
    del batch, value
    assert borrower.given_back() == [1]
    lender.less([1])
    assert lender((2, WIDE), torch.int64).shape == (2, WIDE)
    assert lender.made == 2
    lender.close()


def test_free_segments_are_given_up_and_forgotten() -> None:
    lender, borrower = Lender(), Borrower()
    loans = [lender.lend(torch.zeros(WIDE), 1) for _ in range(12)]
    values = [borrower.borrow(loan.head, loan.body, loan.fds) for loan in loans]
    for loan in loans:
        loan.close()
    values.clear()
    lender.less(borrower.given_back())
    last = lender.lend(torch.zeros(WIDE), 1)
    assert len(last.gone) == 12 - MOST_FREE
    borrower.borrow(last.head, last.body, last.fds)
    assert len(borrower._mappings) == MOST_FREE
    lender.close()


def test_a_segment_is_free_when_all_have_given_it_back() -> None:
    lender, borrowers = Lender(), [Borrower(), Borrower()]
    value = torch.arange(WIDE)
    loan = lender.lend(value, 2)
    copies = [borrower.borrow(loan.head, loan.body, loan.fds) for borrower in borrowers]
    loan.close()
    copies[0] += 1
    assert torch.equal(copies[1], value)
    assert torch.equal(copies[0], value + 1)
    assert [borrower.given_back() for borrower in borrowers] == [[], []]
    view = copies[1][5:]
    copies.clear()
    assert [borrower.given_back() for borrower in borrowers] == [[1], []]
    assert view[0] == 5
    del view
    assert [borrower.given_back() for borrower in borrowers] == [[], [1]]
    lender.less([1], 2)
    second = lender.lend(value * 2, 2)
    assert (second.numbers, second.new) == ((1,), ())
    for borrower in borrowers:
        assert torch.equal(borrower.borrow(second.head, second.body, ()), value * 2)


def test_small_values_travel_without_shared_memory() -> None:
    lender, borrower = Lender(), Borrower()
    loan = lender.lend(({"key": 3}, [torch.tensor(4)]), 1)
    assert (loan.numbers, loan.fds) == ((), ())
    value, (tensor,) = borrower.borrow(loan.head, loan.body, ())
    assert (value, int(tensor)) == ({"key": 3}, 4)


# -- who ends early ----------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_guest_that_ends_early_is_not_waited_for(face: Face) -> None:
    calls = Calls()
    loaders = shared(lambda rank: Pipeline(range(40)).map(calls.rows(rank)).batch(1), 3)

    def program(loader: Pipeline) -> int:
        return len(collect(loader, face, limit=2 if loader is loaders[1] else None))

    assert together(loaders, program) == [40, 2, 40]


def test_what_a_guest_had_is_free_when_it_is_gone() -> None:
    lender = Lender()
    terms = ShareTerms("share", (), "", (0, 1), 0, 1, True, 1.0)
    node = LendingNode(InlineSource([], "source", 0), terms, lender)
    guest = _Guest()
    loan = lender.lend(torch.zeros(WIDE), 1)
    loan.close()
    guest.borrowed.update(loan.numbers)
    node._guests.append(guest)
    guest.left = True
    node._gone(guest)
    assert lender.lend(torch.zeros(WIDE), 1).numbers == loan.numbers
    lender.close()


@pytest.mark.asyncio
async def test_another_user_is_neither_let_in_nor_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes is unpickled."""
    came: list[Any] = []
    name = ("users", os.getpid())
    loop = asyncio.get_running_loop()
    door = meeting.Door(loop, name, [], came.append)
    other = meeting._other
    monkeypatch.setattr(meeting, "_other", lambda sock: (other(sock)[0], os.getuid() + 1))
    assert meeting.try_door(name) is None
    visitor = meeting._connect(meeting._address(name, "host"))
    assert visitor is not None
    assert await loop.sock_recv(visitor, 1) == b"", "it is shown out"
    visitor.close()
    door.close()
    assert not came


@pytest.mark.asyncio
async def test_who_stands_before_a_door_that_closes_is_let_in_and_told() -> None:
    """To a guest, a connection that is shut without a word is a host that has died; this one may come again."""
    loop = asyncio.get_running_loop()
    name = ("knocks", os.getpid())
    came: list[socket.socket] = []
    door = meeting.Door(loop, name, [], came.append)
    visitor = meeting.try_door(name)
    assert visitor is not None
    door.close()
    (let_in,) = came
    assert meeting.try_door(name) is None
    let_in.send(b"closed")
    assert await loop.sock_recv(visitor, 6) == b"closed"
    visitor.close()
    let_in.close()


class Silent(Node):
    """Gives nothing."""

    def start(self, run: Run, kick: Kick) -> None: ...
    def resume(self, cursor: Any) -> None: ...
    def close(self) -> None: ...
    def poll(self, limit: int) -> list[Entry]:
        return []


@pytest.mark.parametrize(("error", "told"), [(None, "closed"), (TimeoutError("rank 2 is late"), "failed")])
def test_a_guest_that_knocks_while_the_host_gives_up_is_told_why(error: Exception | None, told: str) -> None:
    """Its host has not seen it yet. After `closed` it waits for it to come again; after an error it fails, too."""
    terms = ShareTerms("share", ("gives up", os.getpid()), "", (0, 1), 0, 1, True, DEADLINE)
    node = LendingNode(Silent(), terms, Lender())

    async def main() -> list[Any]:
        run = Run(Window(node, (), room=exactly(1)), 0)
        run.attach(asyncio.get_running_loop())
        node.start(run, lambda: None)
        visitor = meeting.try_door(terms.meeting(0))
        assert visitor is not None
        if error is not None:
            node._give_up(error)
        node.close()
        heard: list[Any] = []
        peer = meeting.Peer(run.loop, visitor, lambda message: heard.append(message.head[0]), lambda: heard.append(""))
        await until(lambda: "" in heard)
        peer.close()
        return heard

    assert asyncio.run(main())[0] == told


@on_both_faces
def test_when_the_host_ends_the_others_are_told(face: Face) -> None:
    calls = Calls()
    loaders = shared(lambda rank: Pipeline(range(40)).map(calls.rows(rank)).batch(1), 2)

    def program(loader: Pipeline) -> Any:
        if loader is loaders[0]:
            collect(loader, face, limit=3)
            loader.close()
            return []
        return outcomes(face)(loader)

    _, found = together(loaders, program)
    *batches, error = found
    assert [first(batch) for batch in batches] == [[n] for n in range(len(batches))]
    assert 3 <= len(batches) <= 4
    assert isinstance(error, WorkerDiedError)
    assert "rank 0" in str(error)
    assert "has ended its iterator" in str(error)


@on_both_faces
def test_an_epoch_can_be_begun_again_after_a_break(face: Face) -> None:
    calls = Calls()
    loaders = shared(lambda rank: Pipeline(range(6)).map(calls.rows(rank)).batch(2), 2)
    together(loaders, lambda loader: len(collect(loader, face, limit=1)))
    found = together(loaders, lambda loader: [first(batch) for batch in collect(loader, face)])
    assert found == [[[0, 1], [2, 3], [4, 5]]] * 2


@on_both_faces
@pytest.mark.parametrize("alone", [0, 1])
def test_closing_while_others_are_waited_for(face: Face, alone: int) -> None:
    """The fixtures find nothing that is left."""
    loader = shared(lambda _: Pipeline(range(6)).batch(2), 2)[alone]
    with Steps(loader, face) as steps:
        asked = steps.ask()
        loader.close() if face == "for" else steps.do(loader.aclose)
        with pytest.raises(Exception, match="closed"):
            asked()


@on_both_faces
@pytest.mark.parametrize("alone", [0, 1])
def test_who_does_not_come_is_named(face: Face, alone: int) -> None:
    loader = shared(lambda _: Pipeline(range(6)).batch(2), 2, timeout=0.05)[alone]
    with pytest.raises(TimeoutError, match=f"rank {1 - alone} did not come within timeout=0.05 s"):
        collect(loader, face)


@on_both_faces
def test_ranks_that_read_something_else_are_refused(face: Face) -> None:
    calls = Calls()
    loaders = shared(lambda rank: Pipeline(range(6)).shard(rank, 2).map(calls.rows(rank)).batch(2), 2)
    for (error,) in together(loaders, outcomes(face)):
        assert isinstance(error, ValueError)
        assert "all ranks must read the same" in str(error)
        assert "shard(0, 2)" in str(error)
        assert "shard(1, 2)" in str(error)


class LostGuest:
    """A process that comes, says who it is, and is gone without another word."""

    def __init__(self, loader: Pipeline, rank: int, what: str) -> None:
        stage = loader._plan.stages[-1]
        assert isinstance(stage, Share)
        self._meeting = (*meeting.job_name(), stage.number, tuple(stage.group), 0)
        self._hello = ("hello", rank, what)

    def come_and_die(self) -> None:
        found: list[socket.socket] = []

        def came() -> bool:
            found.extend([] if (sock := meeting.try_door(self._meeting)) is None else [sock])
            return bool(found)

        wait_until(came)
        connection = Connection(found[0])
        connection.send(self._hello)
        connection.close()


@pytest.fixture
def came(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks that a host has heard of."""
    came: list[int] = []
    welcome = LendingNode._welcome

    def welcomed(node: LendingNode) -> None:
        came.extend(guest.rank for guest in node._guests if guest.rank is not None)
        welcome(node)

    monkeypatch.setattr(LendingNode, "_welcome", welcomed)
    return came


@on_both_faces
def test_a_guest_that_dies_before_all_have_come_is_told_at_once(face: Face, came: list[int]) -> None:
    """To the host, and to those that wait with it; not when the time is up. (Who comes later finds nobody.)"""
    loaders = shared(lambda _: Pipeline(range(6)).batch(2), 4, timeout=1e6)
    waiting = [Started(partial(outcomes(face), loader)) for loader in loaders[:2]]
    wait_until(lambda: came == [1])
    LostGuest(loaders[0], 2, "batch(2), from the beginning on").come_and_die()
    for one in waiting:
        (error,) = one.outcome()
        assert isinstance(error, WorkerDiedError)
        assert re.search(r"rank 2 \(pid \d+\), for which rank 0 would have read, has died before all", str(error))


@on_both_faces
def test_what_the_host_refuses_is_told_to_all_that_wait(face: Face, came: list[int]) -> None:
    """Rank 1 waits already: one that comes when the host has given up finds nobody, and would wait for it."""
    loaders = shared(lambda rank: Pipeline(range(6)).batch(2 if rank < 2 else 3), 4, timeout=1e6)
    asked = [Started(partial(outcomes(face), loader)) for loader in loaders[:2]]
    wait_until(lambda: came == [1])
    asked.append(Started(partial(outcomes(face), loaders[2])))
    for (error,) in [one.outcome() for one in asked]:
        assert isinstance(error, ValueError)
        assert "all ranks must read the same" in str(error)


@on_both_faces
def test_a_guest_that_gives_up_before_all_have_come_may_come_again(face: Face, came: list[int]) -> None:
    loaders = shared(lambda _: Pipeline(range(6)).batch(2, collate_fn=list), 3)
    host = Started(lambda: collect(loaders[0], face))
    with Steps(loaders[1], "for") as steps:
        asked = steps.ask()
        wait_until(lambda: came == [1])
        loaders[1].close()
        with pytest.raises(LoaderClosedError):
            asked()
    others = [Started(partial(collect, loader, face)) for loader in shared_again(loaders)]
    assert [one.outcome() for one in (host, *others)] == [[[0, 1], [2, 3], [4, 5]]] * 3


def shared_again(loaders: list[Pipeline]) -> list[Pipeline]:
    """Those of the guests once more: a loader that was closed stays so."""
    again = [Pipeline(range(6)).batch(2, collate_fn=list).share(range(len(loaders))) for _ in loaders[1:]]
    for rank, (new, old) in enumerate(zip(again, loaders[1:], strict=True), 1):
        object.__setattr__(new._plan.stages[-1], "number", old._plan.stages[-1].number)  # type: ignore[attr-defined]
        object.__setattr__(new._plan.stages[-1], "rank", rank)
    return again


def test_a_state_of_another_place_is_refused() -> None:
    calls = Calls()

    def build(rank: int) -> Pipeline:
        return Pipeline(range(6)).map(calls.rows(rank)).batch(2)

    state = build(9)
    next(iter(state))
    loaders = shared(build, 2)
    loaders[1].load_state_dict(state.state_dict())
    found = together(loaders, outcomes("for"))
    print(found)
    for (error,) in found:
        assert isinstance(error, ValueError)
        assert "from the beginning on" in str(error)


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What three processes say, and three of which the first one is killed."""
    running = []
    for what in ("read", "die"):
        folder = tmp_path_factory.mktemp(what)
        for rank in range(3):
            command = [sys.executable, "-m", "tests._share_worker", str(rank), "3", str(folder), what]
            environ = {**os.environ, "MASTER_PORT": f"{os.getpid()}-{what}"}
            running.append((what, rank, folder, subprocess.Popen(command, env=environ)))
    said: dict[str, list[dict[str, Any]]] = {"read": [], "die": []}
    for what, rank, folder, process in running:
        process.wait(DEADLINE * 4)
        if (path := Path(folder) / f"{rank}.json").exists():
            said[what].append(json.loads(path.read_text()))
    return said


def test_processes_get_the_same_and_one_reads(processes: dict[str, list[dict[str, Any]]]) -> None:
    said = processes["read"]
    assert [one["calls"] for one in said] == [20, 0, 0]
    assert [one["seen"] for one in said] == [[[n, n + 1] for n in range(0, 20, 2)]] * 3
    assert all(not one["failed"] for one in said)


def test_the_death_of_the_one_that_reads_is_an_error_after_what_it_gave(
    processes: dict[str, list[dict[str, Any]]],
) -> None:
    said = processes["die"]
    assert [one["rank"] for one in said] == [1, 2]
    for one in said:
        assert one["seen"] == [[n, n + 1] for n in range(0, 20, 2)][: len(one["seen"])]
        assert "rank 0" in one["failed"]
        assert "has died" in one["failed"]


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "error", "said"),
    [
        ([], ValueError, "each of them once"),
        ([0, 0], ValueError, "each of them once"),
        ([0, -1], ValueError, "each rank of the group"),
        ([0, "1"], TypeError, "each rank of the group"),
        ("tp", TypeError, "each rank of the group"),
        (None, TypeError, "mesh"),
        (3, TypeError, "mesh"),
    ],
)
def test_groups_that_are_none(group: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Pipeline(range(4)).share(group)


def test_what_does_not_fit_around_it() -> None:
    one = Pipeline(range(4)).batch(2).share([0, 1])
    with pytest.raises(ValueError, match="share"):
        one.share([0, 1])
    with pytest.raises(ValueError, match="shard"):
        one.shard(0, 2)
    with pytest.raises(ValueError, match="share"):
        one.in_process()
    with pytest.raises(ValueError, match="share"):
        Pipeline(range(4)).map(abs).share([0, 1]).batch(2).max_staleness(1)
    with pytest.raises(ValueError, match="timeout"):
        Pipeline(range(4)).share([0, 1], timeout=0)
    with pytest.raises(ValueError, match="host memory"):
        Pipeline(range(4)).batch(2).to("cpu").share([0, 1])
