"""A Ray cluster of three nodes on this machine, for all tests that need one, and the ways to hurt it.

The head has no CPUs, so no actor runs there, and each of the others can be killed. Nodes have more CPUs than the
machine: they only count what actors hold.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
NODES = 2  # beside the head
NODE_CPUS = 4
STORE_BYTES = 128 << 20

_SMALL = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a default that will change
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_num_prestart_python_workers": "0",
    "RAY_prestart_worker_first_driver": "0",
}
"""Processes for tasks that nobody will send."""


class RayCluster:
    """The cluster, to which this process is connected.

    Attributes:
        address: Of its head.
        nodes: Those with CPUs.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(_SMALL)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for functions of tests
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
            shutdown_at_exit=False,
        )
        self.nodes: list[Any] = []
        for _ in range(NODES):
            self.add_node(wait=False)
        self._cluster.wait_for_nodes()
        self.address: str = self._cluster.address
        self.connect()

    def connect(self) -> None:
        """Connect this process."""
        import ray

        ray.init(address=self.address, log_to_driver=False, configure_logging=False)

    def close(self) -> None:
        """End all of it."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def add_node(self, *, wait: bool = True) -> Any:
        """One more node."""
        node = self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES, wait=wait)
        self.nodes.append(node)
        return node

    def kill_node(self, node_id: str) -> None:
        """As when the machine is gone: its raylet and all that it has started, in one blow."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def heal(self) -> None:
        """Have as many living nodes again as in the beginning, and a connection."""
        import ray

        if not ray.is_initialized():
            self.connect()
        for node in list(self.nodes):
            if not node.any_processes_alive() or node.dead_processes():
                self.nodes.remove(node)
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self.nodes) < NODES:
            self.add_node()

    @contextmanager
    def left(self) -> Iterator[None]:
        """The block is a program that has no connection yet."""
        import ray

        ray.shutdown()
        try:
            yield
        finally:
            ray.shutdown()
            self.connect()


def actor_processes() -> dict[int, str]:
    """The actors that live: their pids and titles."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = process.cmdline()[:1]
            if title and is_actor(title[0]):
                found[process.pid] = title[0].strip()
    return found


def is_actor(command: str) -> bool:
    """Whether a command line is that of an actor, and not of a part of Ray or of an idle worker."""
    return command.startswith("ray::") and not command.startswith(("ray::IDLE", "ray::Dash", "ray::RuntimeEnv"))


def kill(pid: int) -> None:
    """Kill an actor."""
    os.kill(pid, signal.SIGKILL)
