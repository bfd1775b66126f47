"""Whose Ray cluster it is: the user's, one that was named, or one of ours; and never another one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import psutil
import pytest

from aioloader.executors.ray.actors import ActorBase, Place, Shortage, begin_actor, end_actors
from aioloader.executors.ray.cluster import join_cluster
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import pack, unpack
from aioloader.ray import RayWorkers
from tests._ray import RayCluster, actor_processes


def test_ray_is_not_imported_before_it_is_asked_for() -> None:
    """Not even by a description of what actors need."""
    code = "import sys; from aioloader.ray import RayWorkers; RayWorkers(); print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """At construction."""
    monkeypatch.setattr("aioloader.executors.ray.cluster.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'aioloader\[ray\]'"):
        RayWorkers()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"cpus": -1}, ValueError, "cpus must be at least 0 and finite, got -1"),
        ({"cpus": "2"}, TypeError, "cpus must be a number, got '2'"),
        ({"gpus": float("inf")}, ValueError, "gpus must be at least 0 and finite, got inf"),
        ({"retries": -1}, ValueError, "retries must be at least 0, got -1"),
        ({"resources": ["a"]}, TypeError, "resources must be a mapping"),
        ({"resources": {"GPU": 1}}, ValueError, "pass gpus=1"),
        ({"resources": {"tpu": True}}, TypeError, "must be a number, got True"),
        ({"runtime_env": "pip"}, TypeError, "runtime_env must be a mapping"),
        ({"address": 1}, TypeError, "address must be a str"),
        ({"address": "ray://head:10001"}, ValueError, "run the program on a node of the cluster"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    """The rule, and what was found."""
    with pytest.raises(error, match=words):
        RayWorkers(**arguments)


def test_equal_descriptions_are_equal() -> None:
    """And have the same hash, in spite of their mappings."""
    one, other = RayWorkers(resources={"a": 1}), RayWorkers(resources={"a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one != RayWorkers(resources={"a": 2})


def test_nobody_joins_a_cluster_that_was_not_named(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a file in Ray's temporary folder names one, which `ray.init()` would join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    with ray_cluster.left(), pytest.raises(ValueError, match=r"call ray\.init\('local'\)"):
        join_cluster(None)
    assert ray.is_initialized()


def test_the_connection_of_the_user_stays(ray_cluster: RayCluster) -> None:
    """However many have used it."""
    import ray

    membership = join_cluster(None)
    assert membership.alive
    membership.leave()
    membership.leave()
    join_cluster(ray_cluster.address).leave()
    join_cluster("auto").leave()
    assert ray.is_initialized()


@pytest.mark.ray
def test_the_connection_by_ray_address_ends_with_its_last_user(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the program meanwhile included."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    with ray_cluster.left():
        first, second = join_cluster(None), join_cluster(None)
        first.leave()
        assert second.alive
        second.leave()
        state = second.alive, ray.is_initialized()
        assert state == (False, False)


@pytest.mark.ray
def test_a_connection_that_the_user_made_meanwhile_is_not_ended(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another one, even to the same cluster."""
    import ray

    with ray_cluster.left():
        ours = join_cluster(ray_cluster.address)
        ray.shutdown()
        ray_cluster.connect()
        assert not ours.alive
        ours.leave()
        assert ray.is_initialized()


@pytest.mark.parametrize("address", ["local", "127.0.0.1:1", "nowhere:6379"])
def test_another_cluster_than_that_of_the_process_is_refused(ray_cluster: RayCluster, address: str) -> None:
    """Ray has one connection per process."""
    with pytest.raises(ValueError, match=r"connected to the Ray cluster at .* leave address out"):
        join_cluster(address)


LOCAL = """
import psutil, ray
from aioloader.executors.ray.cluster import join_cluster

own = join_cluster("local")
begun = psutil.Process().children(recursive=True)
assert ray.cluster_resources()["CPU"] >= 1
join_cluster(None).leave()  # another loader, for a while
assert ray.is_initialized()
own.leave()
assert not ray.is_initialized()
gone, left = psutil.wait_procs(begun, timeout=10)
print(len(gone) > 0, left)
"""


@pytest.mark.ray
def test_a_cluster_of_ones_own_ends_with_it() -> None:
    """`address="local"`: begun, and ended, with all its processes.

    In a process of its own: one that has had such a cluster cannot use actors of another one afterwards, as Ray is.
    """
    ran = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=90)
    assert ran.stdout.splitlines()[-1:] == ["True []"], ran.stderr


def test_what_arrives_is_a_copy(ray_cluster: RayCluster) -> None:
    """Writing to a tensor over a result of Ray would change it for all who read it, in silence."""
    import ray
    import torch

    ref = ray.put(pack({"x": torch.zeros(1 << 20), "y": [torch.zeros(3)]}))
    first = unpack(ray.get(ref))
    first["x"].add_(1)
    first["y"][0].add_(1)
    again = unpack(ray.get(ref))
    assert float(again["x"].sum()) == 0
    assert float(again["y"][0].sum()) == 0


class Sleeper(ActorBase):
    """Does what it is told."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def ray_thread(ray_cluster: RayCluster) -> Iterator[RayThread]:
    """One that is connected."""
    thread = RayThread()
    thread.call(thread.join_cluster, None)
    yield thread
    thread.close()
    assert thread.join(10)


def begin(thread: RayThread, workers: RayWorkers) -> "SimpleQueue[Any]":
    """Ask for an actor; what is told of it comes into the queue."""
    told: SimpleQueue[Any] = SimpleQueue()

    def ask() -> None:
        begin_actor(
            thread, Sleeper, (), workers, ready=lambda *told_of: told.put(told_of), late=lambda *why: told.put(why)
        )

    thread.call(ask)
    return told


@pytest.mark.ray
def test_an_actor_says_when_it_runs_and_ends_when_it_is_told(ray_cluster: RayCluster, ray_thread: RayThread) -> None:
    """It is given work only then."""
    handle, place = begin(ray_thread, RayWorkers()).get(timeout=30)
    assert isinstance(place, Place)
    assert place.pid in actor_processes()
    assert place.node_id in {node.node_id for node in ray_cluster.nodes}
    ray_thread.call(end_actors, [handle])


@pytest.mark.ray
def test_a_busy_actor_ends_after_a_grace(ray_cluster: RayCluster, ray_thread: RayThread) -> None:
    """Cancelling would not stop it."""
    handle, place = begin(ray_thread, RayWorkers()).get(timeout=30)
    handle.sleep.remote(30)
    began = time.monotonic()
    ray_thread.call(end_actors, [handle], 0.1)
    psutil.wait_procs([psutil.Process(place.pid)], timeout=10)
    assert not psutil.pid_exists(place.pid)
    assert time.monotonic() - began < 20


@pytest.mark.ray
@pytest.mark.parametrize(
    ("workers", "hopeless", "words"),
    [
        (RayWorkers(resources={"unobtainium": 1}), True, "no node of the cluster has that"),
        (RayWorkers(cpus=1000), True, "each actor needs 1000 CPU"),
    ],
    ids=["none", "more"],
)
def test_an_actor_for_which_there_is_no_room_is_told_of(
    ray_thread: RayThread, monkeypatch: pytest.MonkeyPatch, workers: RayWorkers, hopeless: bool, words: str
) -> None:
    """With what was asked for and what the cluster has, and nobody waits for ever."""
    monkeypatch.setattr("aioloader.executors.ray.actors.LATE_SECONDS", 0.2)
    handle, why = begin(ray_thread, workers).get(timeout=30)
    assert isinstance(why, Shortage)
    assert why.hopeless is hopeless
    assert words in why.words
    assert "8 CPU free" in why.words
    ray_thread.call(end_actors, [handle], 0)
