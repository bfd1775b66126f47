"""What goes away in a real cluster besides an actor: the head, a rank, a connection, a node while actors come."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from aioloader import DataLoader, Pipeline, Skip, WorkerDiedError
from aioloader.ray import RayPool, RayWorkers
from tests._ray import RayCluster, kill
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces
from tests._work import DeadlyHoles, collate_deadly
from tests.test_ray_readers import gone, pids, plain, plus_one, slowly, tell, wait_for
from tests.test_skip_errors import lines_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore:.* actors of in_ray run"),  # they take long on a busy machine
]

PARTS = 4


def parts(actors: int, count: int = 300, **options: Any) -> Pipeline[Any]:
    return Pipeline(range(count)).map(slowly).batch(3).in_ray(actors, parts=PARTS, **options)


# -- the head ----------------------------------------------------------------------------------------------------------

HEAD = """
import asyncio, os, signal, sys
from ray.cluster_utils import Cluster
import ray

cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 4, "object_store_memory": 128 << 20, "include_dashboard": False},
)
ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)

from aioloader import Pipeline, WorkerDiedError
from aioloader.executors.ray import lookout
lookout.LOOK_SECONDS, lookout.SILENT_SECONDS = 0.2, 1.0

def waits(key):
    if key == 7:
        import time
        time.sleep(600)
    return key

async def first_of(loader):
    batches = aiter(loader)
    return batches, await anext(batches)

async def error_of(batches):
    try:
        async for _ in batches:
            pass
    except WorkerDiedError as error:
        return error

def main():
    loaders = [
        Pipeline(range(100)).map(waits, executor="ray", concurrency=1),
        Pipeline(range(100)).map(waits).in_ray(actors=1, parts=1),
        Pipeline(range(100)).map(waits).in_ray(actors=1, parts=1),
    ]
    with asyncio.Runner() as runner:
        begun = [iter(loader) for loader in loaders[:2]]
        print([next(samples) for samples in begun])
        awaited, found = runner.run(first_of(loaders[2]))
        print(found, flush=True)
        cluster.head_node.kill_gcs_server()
        if sys.argv[1:] == ["actor"]:  # its replacement cannot be asked for either
            for stage in loaders[1].stats().stages:
                for actor in stage.actors:
                    os.kill(actor.pid, signal.SIGKILL)
        for samples in begun:
            try:
                for _ in samples:
                    pass
            except WorkerDiedError as error:
                print(error)
        print(runner.run(error_of(awaited)))
        print([loader.state_dict()["epoch"] for loader in loaders], flush=True)
    os._exit(0)  # Ray would wait for its head

main()
"""


@pytest.mark.parametrize("how", ["alone", "actor"])
def test_without_its_head_a_cluster_is_told_of(tmp_path: Path, how: str) -> None:
    """Whoever waits hears of it, and can save its state: Ray would end the program."""
    program = subprocess.Popen(
        [sys.executable, "-c", HEAD, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        said, wrong = program.communicate(timeout=90)
        lines = [line for line in said.splitlines() if "head" in line or line.startswith(("[", "0"))]
        assert lines[:2] == ["[0, 0]", "0"], wrong
        assert all("the head of the Ray cluster has not answered for 1 s" in line for line in lines[2:5]), said + wrong
        assert lines[5:] == ["[0, 0, 0]"]
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()


# -- the connection ----------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_consumer_that_waits_is_told_when_the_connection_ends(
    ray_cluster: RayCluster, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; no answer would ever come, and Ray is not called any more, or it would begin a cluster."""

    def waits(sample: int) -> int:
        if sample:
            time.sleep(600)
        return sample

    monkeypatch.setattr("aioloader.executors.ray.readers.SETTLE_SECONDS", 0.0)  # nothing else is due
    with Pipeline(range(100)).map(waits).in_ray(1, parts=1) as loader, Steps(loader, face) as steps:
        assert steps.next() == 0
        asked = Started(steps.next)
        with ray_cluster.left():
            with pytest.raises(WorkerDiedError, match="the connection to Ray has ended"):
                asked.outcome()
            assert not ray.is_initialized()


# -- ranks -------------------------------------------------------------------------------------------------------------

RANK = """
import json, os, sys
from itertools import islice
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)
from aioloader import Pipeline
from aioloader.ray import RayPool

def plus_one(sample):
    return sample + 1

samples = Pipeline(range(300)).shuffle(seed=4).shard().map(plus_one).batch(3)
loader = samples.in_ray(actors=2, parts=4, pool=RayPool("left"))
batches = iter(loader)
print(json.dumps([batch.tolist() for batch in islice(batches, 5)]), flush=True)
sys.stdin.readline()
print(json.dumps([batch.tolist() for batch in batches]), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_a_rank_that_goes_costs_the_others_nothing(ray_cluster: RayCluster, how: str) -> None:
    """Though the actors that it has made for all of them end with it."""

    def begin(rank: int) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_ADDRESS": ray_cluster.address, "RANK": str(rank), "WORLD_SIZE": "2"},
        )

    first = begin(0)
    its = tell(first)
    other = begin(1)
    found = tell(other)
    if how == "dies":
        first.kill()
    else:
        first.communicate("\n\n", timeout=DEADLINE)
    first.wait(DEADLINE)
    tell(other, 0)
    found += tell(other)
    other.communicate("\n", timeout=DEADLINE)
    whole = [
        [
            batch.tolist()
            for batch in Pipeline(range(300)).shuffle(seed=4).shard(rank, 2).map(plus_one).batch(3).in_ray(0, parts=4)
        ]
        for rank in range(2)
    ]
    assert its == whole[0][:5]
    assert found == whole[1]
    for rank in (first, other):
        for pipe in (rank.stdin, rank.stdout):
            assert pipe is not None
            pipe.close()


def test_parts_of_a_rank_that_was_killed_end_in_the_pool(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """When somebody begins an epoch there: nobody else would ever end them."""
    mark = tmp_path / "closed"
    pool = RayPool("orphans")
    try:
        with small_pool(pool) as keeper:
            next(iter(keeper))  # the actor is this process's
            code = RANK.replace('"left"', '"orphans"').replace("actors=2, parts=4", "actors=1, parts=2")
            code = code.replace("Pipeline(range(300)).shuffle(seed=4).shard()", "Pipeline(noted)")
            code = code.replace("samples =", NOTED.format(path=str(mark)) + "\nsamples =")
            rank = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
            )
            tell(rank)
            rank.kill()
            rank.communicate()
            wait_for(lambda: [list(small_pool(pool)), mark.exists()][1])
    finally:
        pool.close()


NOTED = """
import itertools

def noted():
    try:
        yield from itertools.count()
    finally:
        open({path!r}, "a").close()
"""


def small_pool(pool: RayPool) -> Pipeline[Any]:
    return Pipeline(range(12)).batch(3).in_ray(1, parts=2, pool=pool)


# -- nodes, while something else happens -------------------------------------------------------------------------------


def test_a_node_that_dies_while_actors_come_costs_nothing(ray_cluster: RayCluster) -> None:
    """And when there are to be fewer than had something to do."""
    here = plain(list(Pipeline(range(900)).map(slowly).batch(3).in_ray(0, parts=8)))
    found = []
    with Pipeline(range(900)).map(slowly).batch(3).in_ray(2, parts=8) as loader:
        for number, batch in enumerate(loader):
            found.append(batch.tolist())
            if number == 30:
                loader.scale(actors=6)
                ray_cluster.kill_node(ray_cluster.nodes[0].node_id)
            if number == 150:
                loader.scale(actors=1)
    assert found == here


def test_a_state_that_is_saved_while_a_part_is_made_again_is_exact(ray_cluster: RayCluster) -> None:
    """At each batch after a death: it says what was handed out, and nothing of what is under way."""
    here = plain(list(parts(0, 120)))
    with parts(2, 120) as loader, parts(1, 120) as other:
        batches = iter(loader)
        found = [next(batches).tolist() for _ in range(10)]
        kill(pids(loader)[0])
        for number in range(10, len(here)):
            state = json.dumps(loader.state_dict())
            other.load_state_dict(json.loads(state))
            again = iter(other)
            assert next(again).tolist() == here[number]
            again.close()
            found.append(next(batches).tolist())
    assert found == here


@on_both_faces
def test_an_epoch_after_a_death_is_as_the_one_before(ray_cluster: RayCluster, face: Face) -> None:
    """Actors that have died between two epochs, too."""
    mapped = Pipeline(range(300)).map(slowly, executor="ray", concurrency=2).batch(3)
    for loader in (mapped, parts(2)):
        with loader, Steps(loader, face) as steps:
            whole = (
                [batch.tolist() for batch in Pipeline(range(300)).batch(3)]
                if loader is mapped
                else plain(list(parts(0)))
            )
            found = [steps.next().tolist() for _ in range(10)]
            kill(pids(loader)[0])
            found += [batch.tolist() for batch in steps.outcomes()]
            assert found == whole
            for pid in pids(loader):
                kill(pid)
            assert plain(collect(loader, face)) == whole


def test_actors_of_other_parts_make_room_for_the_new_ones(ray_cluster: RayCluster) -> None:
    """A state may be of another number of parts; the actors of before hold all CPUs."""
    with Pipeline(range(96)).batch(3).in_ray(actors=4, num_cpus=2) as loader:
        assert len(list(loader)) == 32
        before = wait_for(lambda: len(found := pids(loader)) == 4 and found)
        state = Pipeline(range(96)).batch(3).in_ray(0, parts=3).state_dict()
        loader.load_state_dict(state)
        assert plain(list(loader)) == plain(list(Pipeline(range(96)).batch(3).in_ray(0, parts=3)))
        gone(before)
        assert len([actor for stage in loader.stats().stages for actor in stage.actors]) == 3  # one for each part


# -- who is to blame ---------------------------------------------------------------------------------------------------


async def deadly(key: int) -> int:
    if key == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return key


def test_what_is_awaited_beside_a_deadly_sample_does_not_pay_for_it() -> None:
    """Nobody knows which of them it was, so each is made again alone, whatever `retries` is."""
    workers = RayWorkers(retries=0)
    with Pipeline(range(30)).map(deadly, executor=workers, concurrency=8) as loader, Steps(loader, "for") as steps:
        found = steps.outcomes()
    assert [outcome for outcome in found if type(outcome) is int] == [key for key in range(30) if key != 7]
    assert isinstance(found[7], WorkerDiedError)


@on_both_faces
def test_a_sample_that_ends_its_actor_costs_no_other_one(face: Face, tmp_path: Path) -> None:
    """`skip_errors`: those of its batch are tried one by one, and the batch is made without it."""
    skip = Skip(report=tmp_path / "skipped.jsonl")
    workers = RayWorkers(retries=0)
    with (
        DataLoader(DeadlyHoles(), batch_size=4, num_workers=2, worker_type=workers, skip_errors=skip) as loader,
        Steps(loader, face) as steps,
    ):
        found = [outcome if isinstance(outcome, BaseException) else outcome.tolist() for outcome in steps.outcomes()]
    assert found == [[0, 1, 3], [4, 7], [12, 13, 14], [16, 17, 18, 19]]
    deaths = [line for line in lines_of(tmp_path / "skipped.jsonl") if line["error"].startswith("WorkerDiedError")]
    assert [(line["key"], line["position"]) for line in deaths] == [(5, 5), (6, 6), (15, 15)]
    assert all(line["error"].endswith(f", with key {line['key']}") for line in deaths)


def test_a_batch_whose_actor_dies_otherwise_raises() -> None:
    """While it is collated: none of its samples is to blame alone."""
    workers = RayWorkers(retries=0)
    with (
        DataLoader(
            Holed(), batch_size=4, num_workers=1, worker_type=workers, collate_fn=collate_deadly, skip_errors=True
        ) as loader,
        Steps(loader, "for") as steps,
    ):
        kinds = [isinstance(outcome, WorkerDiedError) for outcome in steps.outcomes()]
    assert kinds == [False, True, False]


class Holed(DeadlyHoles):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> int:
        return key
