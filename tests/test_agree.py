"""`shard(even="agree")`: ranks agree before each batch that all of them have it.

Most ranks here are threads of one process, whose all-reduce is a fake that answers with torch's own futures. Real
processes and a real gloo group are in `test_torchrun`.
"""

import asyncio
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.futures import Future

from aioloader import LoaderClosedError, Pipeline, RankError, StateError
from aioloader.core.entry import Entry
from aioloader.engine import agreement
from aioloader.engine.agreement import Agreement, Have, Question, _newest
from aioloader.engine.faces import Batches
from aioloader.engine.progress import Progress
from aioloader.engine.sync_delivery import SyncDelivery
from aioloader.pipeline import described
from aioloader.plan.plan import Plan
from aioloader.stages.shard import Shard
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, turns, until, wait_until

Build = Callable[[int], Pipeline]
Outcome = list[Any] | str
"""What one `next()` gave: the batch, or the first words of its error."""


class Group:
    """As many ranks as there are threads; each question is answered when the last rank has asked it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.asked = [0] * size
        self.answered = 0
        self._lock = threading.Lock()
        self._open: list[dict[int, tuple[torch.Tensor, Future[Any]]]] = []
        self.gone: BaseException | None = None  # what questions fail with from now on

    def ask(self, rank: int, numbers: torch.Tensor) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            number = self.asked[rank]
            self.asked[rank] += 1
            if number == len(self._open):
                self._open.append({})
            asking = self._open[number]
            asking[rank] = numbers, future
            if self.gone is not None:
                future.set_exception(self.gone)
            elif len(asking) == self.size:
                self.answered += 1
                least = torch.stack([each for each, _ in asking.values()]).amin(0)
                for each, its in asking.values():
                    each.copy_(least)
                    its.set_result(None)
        return future

    def fail(self, error: BaseException) -> None:
        """What has been asked and not answered is never answered."""
        with self._lock:
            self.gone = error
            for asking in self._open:
                for _, future in asking.values():
                    if not future.done():
                        future.set_exception(error)


class Member:
    """The group, as one rank sees it."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank


class Work:
    def __init__(self, future: "Future[Any]") -> None:
        self.get_future = lambda: future


@pytest.fixture(autouse=True)
def threads_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(numbers: torch.Tensor, *, op: Any, group: Member, async_op: bool) -> Work:
        assert op == torch.distributed.ReduceOp.MIN
        assert async_op
        return Work(group.group.ask(group.rank, numbers))

    def member_of(plan: Plan) -> Member | None:
        return next((stage.member for stage in plan.stages if hasattr(stage, "member")), None)

    monkeypatch.setattr(described, "agreeing_group", member_of)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank)


def agreeing(build: Build, size: int) -> tuple[list[Pipeline], Group]:
    group = Group(size)
    loaders = []
    for rank in range(size):
        loader = build(rank)
        (shard,) = [stage for stage in loader._plan.stages if isinstance(stage, Shard)]
        object.__setattr__(shard, "member", Member(group, rank))
        loaders.append(loader)
    return loaders, group


def together(programs: list[Callable[[], Any]]) -> list[Any]:
    """What each returns, all at the same time."""
    results: list[Any] = [None] * len(programs)

    def run(number: int) -> None:
        try:
            results[number] = programs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), results
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def outcomes(loader: Pipeline, face: Face, *, most: int = 1 << 30) -> list[Outcome]:
    """What `next()` gives until the end, or for `most` calls."""
    if face == "async for":
        return asyncio.run(_outcomes(loader, most))
    seen: list[Outcome] = []
    batches = iter(loader)
    while len(seen) < most:
        try:
            seen.append(next(batches))
        except StopIteration:
            assert next(batches, None) is None
            break
        except (ValueError, RuntimeError) as error:
            seen.append(str(error).split(";")[0])
    batches.close()
    return seen


async def _outcomes(loader: Pipeline, most: int) -> list[Outcome]:
    seen: list[Outcome] = []
    batches = aiter(loader)
    while len(seen) < most:
        try:
            seen.append(await anext(batches))
        except StopAsyncIteration:
            assert await anext(batches, None) is None
            break
        except (ValueError, RuntimeError) as error:
            seen.append(str(error).split(";")[0])
    await batches.aclose()
    return seen


class World:
    """Samples that a filter leaves out, and samples that fail, by a seed; and what ranks should get of them."""

    def __init__(self, seed: int, *, fails: float) -> None:
        self.draw = random.Random(seed)
        self.size = self.draw.choice([2, 2, 3])
        count = self.draw.randrange(40)
        self.keys = range(count)
        self.kept = {key for key in self.keys if self.draw.random() < 0.6}
        self.failing = {key for key in self.kept if self.draw.random() < fails}
        self.batch = self.draw.choice([1, 2, 3])
        self.drop_last = self.draw.random() < 0.5
        self.concurrency = self.draw.choice([1, 3])
        self.prefetch = self.draw.choice([0, 1, 2, 5])
        self.by_async = self.draw.random() < 0.5

    def load(self, key: int) -> int:
        if key in self.failing:
            raise ValueError(f"bad {key}")
        return key

    async def load_async(self, key: int) -> int:
        return self.load(key)

    def build(self, rank: int) -> Pipeline:
        return (
            Pipeline(self.keys)
            .shuffle(seed=3)
            .shard(rank, self.size, even="keep")
            .filter(lambda key: key in self.kept)
            .map(self.load_async if self.by_async else self.load, concurrency=self.concurrency)
            .batch(self.batch, drop_last=self.drop_last, collate_fn=list)
            .prefetch(self.prefetch)
        )

    def expected(self) -> list[list[Outcome]]:
        alone = [outcomes(self.build(rank), "for") for rank in range(self.size)]
        steps = min(len(each) for each in alone)
        expected: list[list[Outcome]] = [[] for _ in alone]
        for step in range(max(len(each) for each in alone)):
            now = [each[step] if step < len(each) else None for each in alone]
            failed = [rank for rank, one in enumerate(now) if isinstance(one, str)]
            if not failed and step >= steps:
                break
            for rank, one in enumerate(now):
                if not failed or isinstance(one, str):
                    assert one is not None
                    expected[rank].append(one)
                else:
                    expected[rank].append(f"rank {failed[0]} of the group failed at batch {step} of epoch 0")
        return expected


@pytest.mark.parametrize("seed", range(60))
def test_all_ranks_end_together_and_errors_are_seen_by_all(seed: int) -> None:
    """Against a plain model: random filters, failures, faces and prefetch."""
    world = World(seed, fails=0.1 if seed % 2 else 0.0)
    loaders, group = agreeing(world.build, world.size)
    faces: list[Face] = [world.draw.choice(["for", "async for"]) for _ in loaders]
    seen = together([partial(outcomes, loader, face) for loader, face in zip(loaders, faces, strict=True)])
    assert seen == world.expected()
    assert len(set(group.asked)) == 1, "each rank asks the same questions"
    assert group.answered == group.asked[0]


@pytest.mark.parametrize("seed", range(12))
def test_a_resume_at_every_step_gives_what_was_to_come(seed: int) -> None:
    world = World(seed, fails=0.05)
    expected = world.expected()
    for step in range(len(expected[0]) + 1):
        loaders, _ = agreeing(world.build, world.size)
        together([partial(outcomes, loader, "for", most=step) for loader in loaders])
        states = [loader.state_dict() for loader in loaders]
        again, _ = agreeing(world.build, world.size)
        for loader, state in zip(again, states, strict=True):
            loader.load_state_dict(state)
        # After the last batch nobody knows yet that it was: a resume there finds that all end, and begins an epoch.
        rest = together([partial(outcomes, loader, "async for") for loader in again])
        if step and step < len(expected[0]):
            assert rest == [each[step:] for each in expected], step
        assert len({len(each) for each in rest}) == 1


@on_both_faces
def test_a_ready_batch_waits_for_no_question_of_its_own(face: Face) -> None:
    """Where batches are ready in time, one question for each, asked while the one before is handed out."""
    loaders, group = agreeing(lambda rank: Pipeline(range(64)).shard(rank, 2, even="keep").batch(2).prefetch(32), 2)

    def first_then_all(loader: Pipeline) -> int:
        """All batches after the first one are ready when the second one is asked for."""

        async def by_async_for() -> int:
            batches = aiter(loader)
            await anext(batches)
            assert batches._delivery is not None
            delivery = batches._delivery
            await until(lambda: delivery.run.output.held + delivery._in_hand == 15)
            return len([batch async for batch in batches])

        if face == "async for":
            return asyncio.run(by_async_for())
        batches = iter(loader)
        next(batches)
        assert isinstance(batches, Batches)
        delivery = batches._delivery
        assert isinstance(delivery, SyncDelivery)
        wait_until(lambda: delivery._queued() + delivery._in_hand == 15)
        return len(list(batches))

    assert together([partial(first_then_all, loader) for loader in loaders]) == [15, 15]
    # An early question for each batch after the first and for the end; a full one for the first, for the end, and for
    # the second, which may not have been there when the first was handed out.
    assert group.asked[0] == group.asked[1]
    assert 16 + 2 <= group.asked[0] <= 16 + 3


@pytest.mark.asyncio
async def test_a_cancelled_call_loses_nothing_and_asks_nothing_twice() -> None:
    """Whatever it waited for: its batch, or the answer of the others."""
    (mine, other), group = agreeing(
        lambda rank: Pipeline(range(12)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2
    )
    batches = aiter(mine)
    for _ in range(5):
        call = asyncio.ensure_future(anext(batches))
        await until(lambda: group.asked[0] > 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert group.asked == [1, 0]
    seen: list[Outcome] = []
    thread = threading.Thread(target=lambda: seen.extend(outcomes(other, "for")))
    thread.start()
    assert [batch async for batch in batches] == [[0, 2], [4, 6], [8, 10]]
    await asyncio.to_thread(thread.join)
    assert seen == [[1, 3], [5, 7], [9, 11]]
    assert group.asked[0] == group.asked[1]


@pytest.mark.asyncio
@on_both_faces
async def test_close_wakes_a_call_that_waits_for_other_ranks(face: Face) -> None:
    (mine, _), group = agreeing(lambda rank: Pipeline(range(12)).shard(rank, 2, even="keep").batch(2), 2)
    if face == "async for":
        call = asyncio.ensure_future(anext(aiter(mine)))
        await until(lambda: group.asked[0] > 0)
        await mine.aclose()
        with pytest.raises(LoaderClosedError):
            await call
    else:
        batches = iter(mine)
        future = asyncio.get_running_loop().run_in_executor(None, next, batches)
        await until(lambda: group.asked[0] > 0)
        await asyncio.to_thread(mine.close)
        with pytest.raises(LoaderClosedError):
            await future


@on_both_faces
def test_who_waits_for_other_ranks_is_told_so(face: Face) -> None:
    loaders, _ = agreeing(lambda rank: Pipeline(range(8)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)
    with Steps(loaders[0], face) as steps:
        first = Started(steps.next)
        wait_until(lambda: loaders[0].stats().waiting_for_ranks)
        assert "No batch has come yet: this rank waits for the others" in loaders[0].explain()
        other = Started(partial(outcomes, loaders[1], face))
        assert first.outcome() == [0, 2]
        assert not loaders[0].stats().waiting_for_ranks
        assert steps.rest() == [[4, 6]]
    assert other.outcome() == [[1, 3], [5, 7]]


@on_both_faces
def test_ranks_at_different_places_are_told(face: Face) -> None:
    """One has loaded a state that another has not; both hear of it, once, and the epoch is over."""

    def build(rank: int) -> Pipeline:
        return Pipeline(range(12)).shard(rank, 2, even="keep").batch(2, collate_fn=list)

    ahead, _ = agreeing(build, 2)
    together([partial(outcomes, loader, face, most=1) for loader in ahead])
    loaders, _ = agreeing(build, 2)
    loaders[1].load_state_dict(ahead[1].state_dict())
    seen = together([partial(outcomes, loader, face) for loader in loaders])
    for rank, place in enumerate(("batch 0", "batch 1")):
        (said,) = seen[rank]
        assert f"this one is at {place} of epoch 0" in said
        assert "in epoch 0, at batches 0 to 1" in said


@on_both_faces
def test_a_rank_that_is_gone_is_an_error_and_the_end(face: Face) -> None:
    loaders, group = agreeing(lambda rank: Pipeline(range(12)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)

    def dies() -> list[Outcome]:
        seen = outcomes(loaders[1], face, most=2)
        group.fail(RuntimeError("Connection closed by peer"))
        return seen

    seen, others = together([lambda: outcomes(loaders[0], face), dies])
    assert others == [[1, 3], [5, 7]]
    *given, said = seen
    # The third batch had been agreed on already if both had it in time.
    assert given in ([[0, 2], [4, 6]], [[0, 2], [4, 6], [8, 10]])
    assert f"could not agree on batch {len(given)} of epoch 0: one of them is gone" in str(said)


@on_both_faces
def test_a_break_at_another_step_is_told_to_all(face: Face) -> None:
    """By the first rank's next epoch; to the last one in its own, or before, if it still waits for the first one."""
    loaders, group = agreeing(lambda rank: Pipeline(range(20)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)

    def program(rank: int) -> Outcome:
        seen = outcomes(loaders[rank], face, most=2 + rank)
        return seen[-1] if isinstance(seen[-1], str) else outcomes(loaders[rank], face)[-1]

    for said in together([partial(program, rank) for rank in range(2)]):
        assert "others elsewhere: they are in epochs 0 to 1" in str(said)
    assert group.asked[0] == group.asked[1]


def test_the_answer_to_a_question_that_was_left_is_looked_at() -> None:
    """It alone says that another rank has left one step before, and nobody will ask for more."""
    group = Group(2)
    members: list[Any] = [Member(group, rank) for rank in range(2)]
    epochs = [Agreement(member, Progress(0)) for member in members]

    def agreed(epoch: Agreement) -> None:
        steps, mine = epoch.step(), None
        try:
            while True:
                question = steps.send(mine)
                assert question is None or question.answered
                mine = Entry("a batch", None, None, 0) if question is None else None
        except StopIteration as done:
            epoch._progress.hand_out(done.value, 0.0)

    for epoch in epochs:
        epoch.look_ahead(Entry("batch 0", None, None, 0))
    for epoch in epochs:
        agreed(epoch)
        epoch.look_ahead(Entry("batch 1", None, None, 0))
    agreed(epochs[1])
    epochs[1].look_ahead(Entry("batch 2", None, None, 0))
    for rank, place in enumerate(("batch 0 of epoch 1", "batch 2 of epoch 0")):
        with pytest.raises(RankError, match=f"this one is at {place}, others elsewhere: they are in epochs 0 to 1"):
            agreed(Agreement(members[rank], Progress(1)))
    assert group.asked[0] == group.asked[1]
    assert not any(member in _newest for member in members), "what was looked at is forgotten"


@on_both_faces
def test_several_iterators_ask_in_turn(face: Face) -> None:
    """What one of them has asked ahead is answered before another one begins, and counts for the first one."""
    loaders, group = agreeing(lambda rank: Pipeline(range(20)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)

    def in_turn(loader: Pipeline) -> list[tuple[Outcome, Outcome]]:
        with Steps(loader, face) as one, Steps(loader, face) as other:
            return [(one.next(), other.next()) for _ in range(5)]

    for rank, pairs in enumerate(together([partial(in_turn, loader) for loader in loaders])):
        assert pairs == [([n, n + 2], [n, n + 2]) for n in range(rank, 20, 4)]
    assert group.asked[0] == group.asked[1]


@on_both_faces
def test_two_iterators_that_ask_at_the_same_time_are_told(face: Face) -> None:
    """From two tasks, or two threads. The second one asks nothing, and may come later."""
    loaders, group = agreeing(lambda rank: Pipeline(range(8)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)

    async def by_async_for() -> tuple[list[Outcome], Outcome]:
        one, other = aiter(loaders[0]), aiter(loaders[0])
        asked = asyncio.ensure_future(anext(one))
        await until(lambda: group.asked[0] == 1)
        with pytest.raises(RankError, match="another iterator of this process is asking the same group"):
            await anext(other)
        assert group.asked == [1, 0]
        there = Started(partial(outcomes, loaders[1], face))
        seen = [await asked, *[batch async for batch in one]]
        await asyncio.to_thread(there.outcome)
        there = Started(partial(outcomes, loaders[1], face, most=1))
        later = await anext(other)
        await asyncio.to_thread(there.outcome)
        return seen, later

    def by_for() -> tuple[list[Outcome], Outcome]:
        one, other = iter(loaders[0]), iter(loaders[0])
        asked = Started(partial(next, one))
        wait_until(lambda: group.asked[0] == 1)
        with pytest.raises(RankError, match="another iterator of this process is asking the same group"):
            next(other)
        assert group.asked == [1, 0]
        there = Started(partial(outcomes, loaders[1], face))
        seen = [asked.outcome(), *one]
        there.outcome()
        there = Started(partial(outcomes, loaders[1], face, most=1))
        later = next(other)
        there.outcome()
        return seen, later

    seen, later = by_for() if face == "for" else asyncio.run(by_async_for())
    assert seen == [[0, 2], [4, 6]]
    assert later == [0, 2]


@on_both_faces
def test_iterators_in_another_order_on_another_rank_are_told(face: Face) -> None:
    """Two loaders that ask for the same epochs and steps. The next epoch hears of it, too, but none after that."""

    def build(rank: int) -> Pipeline:
        return Pipeline(range(40)).shard(rank, 2, even="keep").batch(2, collate_fn=list)

    loaders, group = agreeing(build, 2)
    others = [build(rank) for rank in range(2)]
    for loader, other in zip(loaders, others, strict=True):
        object.__setattr__(other._plan.stages[0], "member", loader._plan.stages[0].member)  # type: ignore[attr-defined]

    def program(rank: int) -> str:
        with Steps(loaders[rank], face) as one, Steps(others[rank], face) as other:
            for steps in (one, other):
                steps.next()
            first, second = (one, other) if rank == 0 else (other, one)
            with pytest.raises(RankError) as caught:  # noqa: PT012 - whichever hears of it first
                for steps in (first, second) * 3:
                    steps.next()
        (again,) = outcomes(loaders[rank], face)
        assert "in the same order" in str(again)
        assert len(outcomes(loaders[rank], face)) == 10
        return str(caught.value)

    for rank, said in enumerate(together([partial(program, rank) for rank in range(2)])):
        assert "in the same order" in said
        assert f"iterator {rank + 1} of its group, and others for iterators 1 to 2" in said
    assert group.asked[0] == group.asked[1]


def test_the_process_ends_after_answers_that_torch_is_about_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread must not come into an interpreter that is torn down. But nobody waits for ever."""
    monkeypatch.setattr(agreement, "_heard", WeakSet())
    group, told = Group(2), threading.Event()
    question = Question(Member(group, 0), Have.BATCH, 0, 0, 0, early=False)  # type: ignore[arg-type]
    question.when_answered(told.set)
    ending = Started(agreement._hear_answers)
    group.fail(RuntimeError("Connection closed by peer"))
    ending.outcome()
    assert told.is_set()
    monkeypatch.setattr(agreement, "CLOSE_SECONDS", 0.0)
    group.gone = None
    Question(Member(group, 0), Have.BATCH, 0, 0, 1, early=False).when_answered(told.set)  # type: ignore[arg-type]
    agreement._hear_answers()
    group.fail(RuntimeError("Connection closed by peer"))


@pytest.mark.asyncio
async def test_an_iterator_belongs_to_its_loop_when_ranks_agree() -> None:
    loaders, _ = agreeing(lambda rank: Pipeline(range(8)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)
    other = Started(partial(outcomes, loaders[1], "for"))
    batches = aiter(loaders[0])
    assert await anext(batches) == [0, 2]
    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, anext(batches))
    assert await anext(batches) == [4, 6]
    assert await anext(batches, None) is None
    assert await asyncio.to_thread(other.outcome) == [[1, 3], [5, 7]]


@on_both_faces
def test_a_replay_asks_nobody(face: Face) -> None:
    loaders, group = agreeing(lambda rank: Pipeline(range(12)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)
    together([partial(outcomes, loader, face, most=2) for loader in loaders])
    asked = list(group.asked)
    assert loaders[0].replay(1) == [4, 6]
    assert group.asked == asked


@on_both_faces
def test_a_batch_in_hand_keeps_its_place(face: Face) -> None:
    """It is taken out of the window so that ranks can be asked for it, and nothing is made in its place meanwhile."""
    made: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def collate(samples: list[int]) -> list[int]:
        loops.append(asyncio.get_running_loop())
        made.append(samples[0])
        return samples

    def build(rank: int) -> Pipeline[list[int]]:
        collates: Any = collate if rank == 0 else list
        return Pipeline(range(40)).shard(rank, 2, even="keep").batch(2, collate_fn=collates).prefetch(2)

    (mine, other), group = agreeing(build, 2)
    with Steps(mine, face) as steps:

        def settle() -> None:
            steps.settle(loops[0]) if face == "for" else steps.do(turns)

        asked = steps.ask()
        if face == "for":
            wait_until(lambda: group.asked[0] == 1)
        settle()
        assert (group.asked[0], len(made)) == (1, 3)  # one that is asked for, and two that are prefetched
        assert outcomes(other, "for", most=1) == [[1, 3]]
        assert asked() == [0, 2]
        delivery = steps._iterator._delivery
        if face == "for":
            delivery._report(waits=False)  # as that of the first batch may come only now
        settle()
        assert delivery._in_hand == 1
        assert len(made) == 3
        del delivery
        mine.close() if face == "for" else steps.do(mine.aclose)


@on_both_faces
def test_a_rank_that_has_ended_is_in_step_until_all_end(face: Face) -> None:
    """Another one fails where it has ended: both are after that step in the same epoch, and then in the next one."""

    def fail(key: int) -> int:
        if key > 2:
            raise ValueError(f"bad {key}")
        return key

    keys = [[0], [2, 4]]

    def build(rank: int) -> Pipeline[Any]:
        return Pipeline(lambda: iter(keys[rank])).map(fail).shard(0, 1, even="keep").batch(1)

    loaders, _ = agreeing(build, 2)
    together([partial(outcomes, loader, face, most=2) for loader in loaders])
    states = [loader.state_dict() for loader in loaders]
    assert [(state["epoch"], state["batches"]) for state in states] == [(0, 2), (0, 2)]
    for loader, state in zip(loaders, states, strict=True):
        loader.load_state_dict(state)


@on_both_faces
def test_a_loader_that_breaks_on_one_rank_is_an_error_on_all(face: Face) -> None:
    """Its engine has failed, not a sample: it raises that once, the others hear of it, and all end."""
    loaders, _ = agreeing(lambda rank: Pipeline(range(12)).shard(rank, 2, even="keep").batch(2, collate_fn=list), 2)

    async def by_async_for() -> list[Any]:
        batches = aiter(loaders[0])
        await anext(batches)
        assert batches._delivery is not None
        batches._delivery.run.fail(OSError("broken"))
        found: list[Any] = []
        while not found or isinstance(found[-1], list):
            try:
                found.append(await anext(batches))
            except OSError as error:
                found.append(error)
        return [found[-1], await anext(batches, None)]

    def by_for() -> list[Any]:
        batches: Any = iter(loaders[0])
        next(batches)
        delivery: Any = batches._delivery
        delivery.run.loop.call_soon_threadsafe(delivery.run.fail, OSError("broken"))
        found: list[Any] = []
        while not found or isinstance(found[-1], list):
            try:
                found.append(next(batches))
            except OSError as error:
                found.append(error)
        return [found[-1], next(batches, None)]

    breaks = by_for if face == "for" else lambda: asyncio.run(by_async_for())
    (error, end), seen = together([breaks, partial(outcomes, loaders[1], face)])
    assert (str(error), end) == ("broken", None)
    assert str(seen[-1]).startswith("rank 0 of the group failed at batch")


# -- keep, and what is refused -------------------------------------------------------------------------------------


@on_both_faces
def test_keep_gives_each_rank_what_it_has(face: Face) -> None:
    """By keys, and of a stream."""
    for source in (range(10), lambda: iter(range(10))):
        parts = [collect(Pipeline(source).shard(rank, 4, even="keep"), face) for rank in range(4)]
        assert parts == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
        assert len(Pipeline(range(10)).shard(1, 4, even="keep")) == 3
        assert len(Pipeline(range(10)).shard(2, 4, even="keep")) == 2


@pytest.mark.parametrize("before", [lambda: Pipeline(range(10)), lambda: Pipeline(range(20)).shard(0, 2)])
def test_a_state_of_keep_is_that_of_its_rank(before: Callable[[], Pipeline[int]]) -> None:
    """Ranks are at different places once the last round is dealt; likewise in a second shard."""
    loader = before().shard(1, 4, even="keep")
    next(iter(loader))
    state = loader.state_dict()
    before().shard(1, 4, even="keep").load_state_dict(state)
    with pytest.raises(StateError, match="the state is that of rank"):
        before().shard(2, 4, even="keep").load_state_dict(state)


@pytest.mark.parametrize("given", [{"rank": 0, "world_size": 2}, {}])
def test_several_ranks_need_a_group(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without a process group"):
        Pipeline(range(10)).shard(**given, even="agree")


@on_both_faces
def test_one_rank_agrees_with_itself(face: Face) -> None:
    loader = Pipeline(range(5)).shard(0, 1, even="agree").batch(2, collate_fn=list)
    assert collect(loader, face) == [[0, 1], [2, 3], [4]]
    with pytest.raises(TypeError, match="it turns out how many batches all ranks have"):
        len(loader)
