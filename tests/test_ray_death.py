"""What dies in a Ray cluster, what becomes of its samples, and what is left when the loader ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from aioloader import Pipeline, WorkerDiedError
from aioloader.ray import RayWorkers
from tests._ray import ROOT, RayCluster, actor_processes
from tests._support import Steps, on_both_faces

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def slowly(key: int) -> int:
    time.sleep(0.005)
    return key


def nodes_of(loader: Pipeline) -> list[str]:
    """The nodes whose actors have something to do."""
    found = []
    for pid in actor_processes():
        raylet = psutil.Process(pid).parent()
        assert raylet is not None
        command = " ".join(raylet.cmdline())
        found.append(command.split("--node-id=")[1].split()[0])
    return found


@pytest.mark.usefixtures("distance")
def test_a_node_that_dies_loses_nothing(ray_cluster: RayCluster) -> None:
    """Complete, in order, none twice: what its actor had is made again elsewhere."""
    with Pipeline(range(1500)).map(slowly, executor="ray", concurrency=2).batch(10) as loader:
        found: list[int] = []
        gaps = []
        last = time.monotonic()
        for number, batch in enumerate(loader):
            now = time.monotonic()
            gaps.append(now - last)
            last = now
            found += batch.tolist()
            if number == 20:
                victims = nodes_of(loader)
                ray_cluster.kill_node(victims[0])
        restarts = sum(actor.restarts for actor in loader.stats().stages[1].actors)
    assert found == list(range(1500))
    assert restarts >= 1
    print("longest gap", max(gaps[1:]))


@pytest.mark.usefixtures("distance")
@on_both_faces
def test_close_during_a_long_call_does_not_wait_for_it(face: Any) -> None:
    """After a grace the actors are killed, and nothing of the loader is left."""
    loader = Pipeline(range(4)).map(sleep_thirty, executor="ray", concurrency=2)
    before = actor_processes()
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        began = time.monotonic()
        if face == "for":
            loader.close()
        else:
            assert steps._runner is not None
            steps._runner.run(loader.aclose())
        took = time.monotonic() - began
    left = [psutil.Process(pid) for pid in actor_processes() if pid not in before]
    psutil.wait_procs(left, timeout=10)
    assert not [pid for pid in actor_processes() if pid not in before]
    assert took < 10  # 2 s on a machine that has nothing else to do
    print("took", took)


def sleep_thirty(key: int) -> int:
    if key:
        time.sleep(30)
    return key


@pytest.mark.usefixtures("distance")
def test_a_shutdown_in_the_middle_is_told_once(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of before is ever answered: the consumer does not wait for ever, and a later epoch works again."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    loader = Pipeline(range(1000)).map(slowly, executor="ray", concurrency=2)
    with loader:
        it = iter(loader)
        assert next(it) == 0
        ray.shutdown()
        with pytest.raises(WorkerDiedError, match="connection to Ray has ended"):
            for _ in it:
                pass
        assert list(it) == []
        ray_cluster.connect()
        assert list(loader) == list(range(1000))


@pytest.mark.usefixtures("distance")
def test_a_replacement_that_finds_no_room_holds_nobody_up(ray_cluster: RayCluster) -> None:
    """After a node is lost, those that run do all the work: chunks wait for no actor that may never come."""
    cpus = 4
    workers = RayWorkers(cpus=cpus)
    with Pipeline(range(600)).map(slowly, executor=workers, concurrency=2) as loader:
        found = []
        for key in loader:
            found.append(key)
            if key == 100:
                while sum(actor.running for actor in loader.stats().stages[1].actors) < 2:
                    time.sleep(0.01)
                ray_cluster.kill_node(nodes_of(loader)[0])
        assert found == list(range(600))


DRIVER = """
    import sys, time
    import ray
    from aioloader import Pipeline

    def fn(key):
        time.sleep(0.1 if key < 3 else 600)
        return key

    ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    loader = Pipeline(range(100)).map(fn, executor="ray", concurrency=2)
    it = iter(loader)
    print(next(it), next(it), flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("time.sleep(600)", -signal.SIGKILL),
        ("next(it), next(it)", -signal.SIGINT),
        ("", 0),
    ],
    ids=["killed", "ctrl-c", "exit"],
)
def test_actors_end_with_their_driver(ray_cluster: RayCluster, end: str, code: int) -> None:
    """However it ends."""
    before = actor_processes()
    program = textwrap.dedent(DRIVER).format(end=end)
    with subprocess.Popen(
        [sys.executable, "-c", program, ray_cluster.address], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        # Ray prints there, too, of nodes that other tests have killed.
        assert "0 1\n" in iter(driver.stdout.readline, "")
        actors = [psutil.Process(pid) for pid in actor_processes() if pid not in before]
        assert len(actors) >= 1 or not end
        if code:
            driver.send_signal(-code)
        # Ray's own exit imports modules, and CPython forgets then that it was to die of Ctrl-C.
        assert driver.wait(30) in (code, 1 if code == -signal.SIGINT else code)
        _, alive = psutil.wait_procs(actors, timeout=30)
        assert not alive


def test_the_example_trains_on_though_an_actor_is_killed(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Two ranks under torchrun: each image once in each epoch, and some made again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = str(ROOT / "examples" / "ray_decode.py")
    done = subprocess.run(
        [*command, example, "--kill-at", "3", "--trace", str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": ray_cluster.address, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=95,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "killed an actor, pid" in done.stdout
    seen: dict[str, list[str]] = {"0": [], "1": []}
    for rank in ("0", "1"):
        for line in (tmp_path / f"{rank}.txt").read_text().splitlines():
            epoch, *names = line.split()
            seen[epoch] += names
    for names in seen.values():
        assert len(names) == len(set(names)) == 160


def test_a_cluster_that_has_not_what_is_asked_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first batch, with what it has; the loader works again with a cluster that has it."""
    monkeypatch.setattr("aioloader.executors.ray.actors.LATE_SECONDS", 0.2)
    workers = RayWorkers(resources={"unobtainium": 1})
    with (
        Pipeline(range(3)).map(abs, executor=workers, concurrency=2) as loader,
        pytest.raises(ValueError, match="needs 1 CPU and 1 unobtainium, and no node of the cluster has that"),
    ):
        next(iter(loader))


def test_actors_that_find_no_room_are_told_of_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds the CPUs: nobody would know why it is slow."""
    monkeypatch.setattr("aioloader.executors.ray.actors.LATE_SECONDS", 1.0)
    with Pipeline(range(3000)).map(slowly, executor=RayWorkers(cpus=4), concurrency=3) as loader:
        with pytest.warns(
            RuntimeWarning, match="of 3 Ray workers run: each actor needs 4 CPU, and the cluster is busy"
        ):
            found = list(loader)
        assert found == list(range(3000))
        assert sum(actor.running for actor in loader.stats().stages[1].actors) == 2
