"""`in_ray` in actors of a Ray cluster: the same batches as here, and alive when machines die."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader import LoaderClosedError, Pipeline, WorkerDiedError
from aioloader.ray import RayPool
from tests._ray import RayCluster, actor_processes, kill
from tests._support import DEADLINE, Face, Started, Steps, collect, notes, on_both_faces

ACTORS = 2
PARTS = 4

pytestmark = pytest.mark.filterwarnings("ignore:.* actors of in_ray run")  # they take long on a busy machine


def plus_one(sample: int) -> int:
    return sample + 1


def image(sample: int) -> torch.Tensor:
    return torch.full((300, 300), float(sample))


def plain(batches: list[Any]) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]


def small(actors: int = ACTORS, parts: int | None = PARTS, **options: Any) -> Pipeline[Any]:
    return Pipeline(range(40)).shuffle(seed=3).map(plus_one).batch(3).in_ray(actors, parts=parts, **options)


def pids(loader: Pipeline[Any]) -> list[int]:
    """Of the actors that run."""
    actors = [actor for stage in loader.stats().stages for actor in stage.actors]
    return [actor.pid for actor in actors if actor.pid is not None]


def wait_for(what: Any) -> Any:
    """What `what` gives, as soon as it gives something."""
    deadline = time.monotonic() + DEADLINE
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def gone(ended: list[int]) -> None:
    """Ray kills without waiting: processes end soon after."""
    wait_for(lambda: not set(ended) & set(actor_processes()))


# -- a smoke -----------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_same_parts_here(ray_cluster: RayCluster) -> None:
    """Epoch after epoch; actors stay from one to the next, and end with the loader."""
    here = small(actors=0)
    with small() as loader:
        for _ in range(2):
            assert plain(list(loader)) == plain(list(here))
        first = pids(loader)
        assert 1 <= len(first) <= ACTORS  # one may be late
        assert plain(collect(loader, "async for")) == plain(list(here))
        assert set(first) <= set(pids(loader))
        running = pids(loader)
    gone(running)


def test_a_killed_actor_costs_nothing(ray_cluster: RayCluster) -> None:
    """What it had goes on elsewhere from what has come: nothing is lost, repeated or reordered."""
    here = plain(list(Pipeline(range(400)).shuffle(seed=3).map(plus_one).batch(3).in_ray(0, parts=PARTS)))
    loader = Pipeline(range(400)).shuffle(seed=3).map(plus_one).batch(3).in_ray(ACTORS, parts=PARTS).with_info()
    attempts = []
    found = []
    with loader:
        for number, (batch, info) in enumerate(loader):
            if number == 20:
                kill(pids(loader)[0])
            attempts.append(info.attempts)
            found.append(batch.tolist())
        (stage,) = (stage for stage in loader.stats().stages if stage.actors)
    assert found == here
    assert max(attempts) == 2
    assert sum(actor.restarts for actor in stage.actors) == 1


# -- more of it --------------------------------------------------------------------------------------------------------

PIPELINES: dict[str, Any] = {
    "samples": lambda: Pipeline(range(300)).map(plus_one),
    "stream": lambda: Pipeline(numbers).map(plus_one).shuffle(buffer_size=5).batch(4),
    "folds": lambda: Pipeline(range(40)).filter(lambda x: x % 3).flat_map(lambda x: [x] * (x % 3)),
    "random numbers": lambda: Pipeline(range(30)).with_seed(5).map(noise).batch(4),
    "own state": lambda: Pipeline(Counts(30)).map(plus_one).batch(3),
    "nothing": lambda: Pipeline([]),
}


def numbers() -> Iterator[int]:
    yield from range(25)


def noise(sample: int) -> torch.Tensor:
    from aioloader import sample_rng

    return torch.rand(3, generator=sample_rng()) + sample


class Counts:
    """Keeps its place in itself, so that parts need one each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.count:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.ray
@pytest.mark.parametrize("name", PIPELINES)
@on_both_faces
def test_two_epochs_are_the_same_as_here(ray_cluster: RayCluster, face: Face, name: str) -> None:
    """With more stages after it, too."""
    make = PIPELINES[name]
    with make().in_ray(0, parts=3).map(plus_nothing) as here, make().in_ray(2, parts=3).map(plus_nothing) as there:
        for _ in range(2):
            assert plain(collect(there, face)) == plain(collect(here, face))


def plus_nothing(sample: Any) -> Any:
    return sample


@pytest.mark.ray
def test_a_state_goes_on_with_another_number_of_actors_at_every_step(ray_cluster: RayCluster) -> None:
    """From 2 actors to 4, from 4 to 1, from there to this process, and back to actors."""
    here = plain(list(small(actors=0)))
    with small(2) as two, small(4) as four, small(1) as one, small(0) as none:
        for step in range(len(here)):
            state = ""
            found: list[Any] = []
            for loader, count in ((two, step), (four, 1), (one, 1), (none, 1), (two, len(here))):
                if state:
                    loader.load_state_dict(json.loads(state))
                else:
                    loader.set_epoch(0)
                batches = iter(loader)
                found += [batch.tolist() for batch in islice(batches, min(count, len(here) - len(found)))]
                state = json.dumps(loader.state_dict())
                del batches
                if len(found) == len(here):
                    break
            assert found == here
    assert len(state) < 1000


@pytest.mark.ray
def test_parts_move_to_more_actors_and_from_fewer_while_they_run(ray_cluster: RayCluster) -> None:
    """`scale`: nothing is lost, repeated or reordered."""

    def make(actors: int) -> Pipeline[Any]:
        return Pipeline(range(900)).map(plus_one).batch(3).in_ray(actors, parts=6)

    here = plain(list(make(0)))
    found = []
    with make(1) as loader:
        batches = iter(loader)
        found += [next(batches).tolist() for _ in range(10)]
        loader.scale(actors=3)
        wait_for(lambda: len(pids(loader)) == 3)
        found += [next(batches).tolist() for _ in range(100)]
        three = pids(loader)
        assert all(actor.samples for stage in loader.stats().stages for actor in stage.actors)
        loader.scale(actors=2)
        found += [next(batches).tolist() for _ in range(50)]
        wait_for(lambda: three[2] not in actor_processes())
        found += [batch.tolist() for batch in batches]
        assert found == here
        assert len(pids(loader)) == 2
        assert repr(loader).endswith("in_ray(actors=2, parts=6)")


@pytest.mark.ray
def test_a_killed_node_costs_nothing(ray_cluster: RayCluster) -> None:
    """Its raylet and all that ran there, in one blow."""
    here = plain(list(Pipeline(range(900)).map(slowly).batch(3).in_ray(0, parts=6)))
    found = []
    with Pipeline(range(900)).map(slowly).batch(3).in_ray(4, parts=6) as loader:
        for number, batch in enumerate(loader):
            found.append(batch.tolist())
            if number == 30:
                wait_for(lambda: len(pids(loader)) == 4)
                ray_cluster.kill_node(ray_cluster.nodes[0].node_id)
    assert found == here


def slowly(sample: int) -> int:
    time.sleep(0.002)
    return sample


@pytest.mark.ray
@pytest.mark.parametrize("retries", [0, 2])
def test_a_sample_that_kills_its_actors_fails_at_its_place(ray_cluster: RayCluster, retries: int) -> None:
    """It is named, and costs its own batch alone."""

    def deadly(sample: int) -> int:
        if sample == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample

    here = plain(list(Pipeline(range(60)).batch(5).in_ray(0, parts=PARTS)))
    loader = Pipeline(range(60)).map(deadly).batch(5).in_ray(ACTORS, parts=PARTS, retries=retries)
    with loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    bad = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert [33 in here[number] for number in bad] == [True]
    error = outcomes[bad[0]]
    assert isinstance(error, WorkerDiedError)
    assert "in map(" in str(error)
    assert "with key 33" in str(error)
    assert "node" in str(error)
    good = [number for number in range(len(here)) if number not in bad]
    assert [outcomes[number].tolist() for number in good] == [here[number] for number in good]


@pytest.mark.ray
def test_a_source_that_kills_its_actors_ends_its_part(ray_cluster: RayCluster) -> None:
    """No sample is to blame; the other parts go on."""
    loader = Pipeline(Deadly()).in_ray(1, parts=2, retries=1)
    with loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    errors = [outcome for outcome in outcomes if isinstance(outcome, WorkerDiedError)]
    assert len(errors) == 2
    assert all("in_ray(actors=1, parts=2)" in str(error) for error in errors)


class Deadly:
    def __iter__(self) -> Iterator[int]:
        yield from range(4)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
@on_both_faces
def test_errors_stand_at_their_place(ray_cluster: RayCluster, face: Face) -> None:
    """The user's own, with the notes of both sides; the next batch follows."""

    def fails(sample: int) -> int:
        if sample == 7:
            raise KeyError("seven")
        return sample

    with Pipeline(range(20)).map(fails).batch(5).in_ray(1, parts=2) as loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [type(outcome) for outcome in outcomes] == [torch.Tensor, KeyError, torch.Tensor, torch.Tensor]
    assert "stage map(fails), key 7, epoch 0, position 7" in notes(outcomes[1])
    assert "in Ray reader (pid" in notes(outcomes[1])


@pytest.mark.ray
def test_batches_are_the_readers_own(ray_cluster: RayCluster) -> None:
    """Written to, and kept after the actors are gone."""
    with Pipeline(range(12)).map(image).batch(4).in_ray(1, parts=2) as loader:
        first = list(loader)
        for batch in first:
            batch.add_(1)
        second = list(loader)
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after + 1)


@pytest.mark.ray
def test_closing_waits_for_no_call(ray_cluster: RayCluster) -> None:
    """Nor do a break, or dropping the loader; nothing of it is left."""

    def sleeps(sample: int) -> int:
        time.sleep(30)
        return sample

    loader = Pipeline(range(8)).map(sleeps).in_ray(ACTORS, parts=2)
    asked = Started(lambda: next(iter(loader)))
    running = wait_for(lambda: len(found := pids(loader)) == ACTORS and found)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2.5
    gone(running)
    with pytest.raises(LoaderClosedError):
        asked.outcome()


@pytest.mark.ray
def test_a_dropped_loader_ends_its_actors(ray_cluster: RayCluster) -> None:
    """And a dropped iterator lets them stay."""
    loader = small()
    for _ in loader:
        break
    running = pids(loader)
    assert set(running) <= set(actor_processes())
    del loader
    wait_for(lambda: gc.collect() is not None and not set(running) & set(actor_processes()))


@pytest.mark.ray
@on_both_faces
def test_nothing_begins_while_it_is_paused(ray_cluster: RayCluster, face: Face, tmp_path: Path) -> None:
    """Nor in parts that begin meanwhile."""
    log = tmp_path / "begun"

    def begun(sample: int) -> int:
        with log.open("a") as file:
            file.write("x")
        return sample

    import asyncio

    async def main(loader: Pipeline[Any]) -> None:
        batches = aiter(loader)
        await anext(batches)
        async with loader.paused(drain=True):
            before = log.stat().st_size
            await asyncio.sleep(0.3)
            assert log.stat().st_size == before
        assert len([batch async for batch in batches]) == 99

    with Pipeline(range(200)).map(begun).batch(2).in_ray(ACTORS, parts=PARTS) as loader:
        if face == "async for":
            asyncio.run(main(loader))
            return
        with loader.paused():
            asked = Started(lambda: list(loader))
            wait_for(lambda: len(pids(loader)) == ACTORS)
            time.sleep(1.0)
            assert not log.exists()
        assert len(asked.outcome()) == 100


@pytest.mark.ray
def test_loaders_share_the_actors_of_a_pool(ray_cluster: RayCluster) -> None:
    """Closing one ends what it has there, and no actor."""
    pool = RayPool("shared")
    try:
        here = plain(list(small(actors=0)))
        with small(pool=pool) as one, small(pool=pool) as other:
            first, second = iter(one), iter(other)
            found = [next(first).tolist()], [next(second).tolist()]
            running = wait_for(lambda: len(pids(one)) == ACTORS and pids(one))
            assert wait_for(lambda: len(pids(other)) == ACTORS and pids(other)) == running
            one.close()
            assert [*found[1], *(batch.tolist() for batch in second)] == here
            assert set(running) <= set(actor_processes())
    finally:
        pool.close()
    gone(running)


@pytest.mark.ray
def test_an_actor_of_a_pool_that_is_killed_is_made_anew(ray_cluster: RayCluster) -> None:
    """By whoever asks first; all go on from what has come."""
    pool = RayPool("mortal")

    def make(actors: int) -> Pipeline[Any]:
        return Pipeline(range(300)).map(plus_one).batch(3).in_ray(actors, parts=PARTS, pool=pool)

    try:
        here = plain(list(make(0)))
        with make(ACTORS) as one, make(ACTORS) as other:
            first, second = iter(one), iter(other)
            found: tuple[list[Any], list[Any]] = ([], [])
            for number in range(len(here)):
                found[0].append(next(first).tolist())
                found[1].append(next(second).tolist())
                if number == 10:
                    kill(wait_for(lambda: len(pids(one)) == ACTORS and pids(one))[1])
            assert found == (here, here)
    finally:
        pool.close()


RANK = """
import json, os, sys
from itertools import islice
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)
from aioloader import Pipeline
from aioloader.ray import RayPool

def plus_one(sample):
    return sample + 1

def make():
    samples = Pipeline(range(96)).shuffle(seed=4).shard().map(plus_one).batch(3)
    return samples.in_ray(actors=2, parts=4, pool=RayPool("job"))

def say(batches, loader):
    found = [batch.tolist() for batch in batches]
    pids = [actor.pid for actor in loader.stats().stages[-1].actors]
    print(json.dumps([found, loader.state_dict(), pids]), flush=True)
    return json.loads(sys.stdin.readline())

with make() as loader, make() as other:
    other.load_state_dict(say(islice(loader, 5), loader))
    say(other, other)
"""


@pytest.mark.ray
def test_ranks_of_a_job_share_a_pool_and_no_sample(ray_cluster: RayCluster) -> None:
    """Each sample comes once; at a step all have one state, from which each goes on; nothing is left at the end."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_ADDRESS": ray_cluster.address, "RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    first = [tell(rank) for rank in ranks]
    assert first[0][1] == first[1][1]
    for rank in ranks:
        tell(rank, first[1][1])
    rest = [tell(rank) for rank in ranks]
    for rank in ranks:
        rank.communicate("0\n", timeout=DEADLINE)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert rest[0][2] == rest[1][2]
    seen = [sample for found, *_ in (*first, *rest) for batch in found for sample in batch]
    assert sorted(seen) == list(range(1, 97))
    gone([pid for *_, its in (*first, *rest) for pid in its if pid is not None])


def tell(rank: "subprocess.Popen[str]", word: Any = None) -> Any:
    """Send a word, or read what the process says."""
    assert rank.stdin is not None
    assert rank.stdout is not None
    if word is None:
        return json.loads(rank.stdout.readline())
    rank.stdin.write(json.dumps(word) + "\n")
    return rank.stdin.flush()


DRIVER = """
import os, sys, time
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)
from aioloader import Pipeline

loader = Pipeline(range(1000)).batch(3).in_ray(actors=2)
batches = iter(loader)
next(batches)
running = [None]
while None in running:  # one may be late
    (stage,) = (stage for stage in loader.stats().stages if stage.actors)
    running = [actor.pid for actor in stage.actors]
    time.sleep(0.01)
print(*running, flush=True)
time.sleep(60)
"""


@pytest.mark.ray
def test_the_death_of_the_program_ends_its_actors(ray_cluster: RayCluster) -> None:
    """kill -9."""
    program = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
    )
    assert program.stdout is not None
    running = [int(pid) for pid in program.stdout.readline().split()]
    assert set(running) <= set(actor_processes())
    program.kill()
    program.wait()
    program.stdout.close()
    gone(running)


@pytest.mark.ray
def test_ctrl_c_ends_the_program_and_its_actors(ray_cluster: RayCluster) -> None:
    """In bounded time, also in the middle of a call."""
    code = DRIVER.replace("Pipeline(range(1000))", "Pipeline(range(1000)).map(lambda x: time.sleep(x) or x)")
    code = code.replace("time.sleep(60)", "list(batches)")
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
    )
    assert program.stdout is not None
    running = [int(pid) for pid in program.stdout.readline().split()]
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=DEADLINE)
    assert program.returncode in (1, 130, -signal.SIGINT)  # 1 is Ray's: it imports while it ends
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1, said
    gone(running)


@pytest.mark.ray
def test_what_the_cluster_lacks_is_told(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of waiting for ever."""
    monkeypatch.setattr("aioloader.executors.ray.actors.LATE_SECONDS", 0.2)
    words = r"0 of 2 actors of in_ray run: .*no node of the cluster has"
    with small(resources={"unobtainium": 1}) as loader, pytest.raises(ValueError, match=words):
        next(iter(loader))


@pytest.mark.ray
def test_without_a_cluster_it_says_what_to_do(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first next()."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_cluster.left(), small() as loader, pytest.raises(ValueError, match=r"call ray\.init\('local'\)"):
        next(iter(loader))


@pytest.mark.ray
def test_a_connection_that_has_gone_is_told_once(ray_cluster: RayCluster) -> None:
    """And closing does not wait for it."""
    with small() as loader:
        batches = iter(loader)
        next(batches)
        with ray_cluster.left():
            with pytest.raises(WorkerDiedError, match="the connection to Ray has ended"):
                list(batches)
            assert list(batches) == []
            began = time.monotonic()
            loader.close()
            assert time.monotonic() - began < 2.5


@pytest.mark.ray
def test_few_entries_are_in_a_small_object_store(ray_cluster: RayCluster) -> None:
    """No more than a share of it, so that it never spills."""
    from aioloader.executors.ray.readers import Readers

    asked: list[int] = []
    real = Readers._room

    def room(*args: Any) -> int:
        asked.append(real(*args))
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readers, "_room", room)
        with Pipeline(range(24)).map(large).in_ray(1, parts=2, ahead=8).batch(2) as loader:
            assert len(list(loader)) == 12
    assert max(asked) <= 2


def large(sample: int) -> torch.Tensor:
    return torch.full((4 << 20,), float(sample % 7), dtype=torch.float32)
