"""Actors: asked for, waited for, lost and ended. All of it is called in the thread of `RayThread`."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from aioloader.executors.processes.freed_memory import keep_freed_memory
from aioloader.executors.ray.same_host import OpenFile, probe
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.workers import RayWorkers

__all__ = [
    "GRACE_SECONDS",
    "LATE_SECONDS",
    "MOST_START_FAILURES",
    "ActorBase",
    "Place",
    "Shortage",
    "begin_actor",
    "cancel_call",
    "end_actors",
    "is_loss",
    "is_unreachable",
    "kill_actor",
    "result_is_lost",
    "words_of",
]

GRACE_SECONDS: Final = 1.0  # for what actors are at, before they are killed
LATE_SECONDS: Final = 10.0  # after which somebody is told that an actor does not run yet
MOST_START_FAILURES: Final = 3  # of actors in one place, in a row


class Place(NamedTuple):
    """Where an actor runs.

    Attributes:
        pid: Of its process.
        node: The address of its node.
        node_id: Of Ray.
        file: By which a process on the same host finds out that it is; None: it cannot.
    """

    pid: int
    node: str
    node_id: str
    file: OpenFile | None = None

    def __str__(self) -> str:
        return f"pid {self.pid}, node {self.node}"


class ActorBase:
    """What all of our actors have."""

    def place(self) -> Place:
        """Where it runs. The first call, which says that it does."""
        import ray

        keep_freed_memory()
        context = ray.get_runtime_context()
        return Place(os.getpid(), ray.util.get_node_ip_address(), context.get_node_id(), probe())


class Shortage(NamedTuple):
    """Why an actor does not run yet.

    Attributes:
        words: What was asked for and what the cluster has, for a sentence.
        hopeless: No node has so much, not even an idle one.
        free: A node has so much to spare now.
    """

    words: str
    hopeless: bool
    free: bool = False


def begin_actor(
    thread: RayThread,
    kind: type[ActorBase],
    args: Sequence[Any],
    workers: RayWorkers,
    *,
    ready: Callable[[Any, Place | BaseException], None],
    late: Callable[[Any, Shortage], None],
    **options: Any,
) -> Any:
    """Ask for an actor; returns its handle at once.

    It gets no work before it runs. One that waits for a free CPU may wait for ever, for instance after a node is lost,
    and whoever needs the results in order would wait with it.

    Args:
        thread: Where the callbacks are called.
        kind: Its class.
        args: Of its constructor.
        workers: What it needs.
        ready: Called once with the handle and where the actor runs, or why it has died before it did.
        late: Called with the handle, each time that it does not run after `LATE_SECONDS` more.
        options: More of Ray's.

    Raises:
        Exception: Ray refuses.
    """
    import ray

    handle = _remote(kind).options(**workers.options(**options)).remote(*args)
    waits = [True]

    def began(future: Any) -> None:
        thread.call(tell, future)

    def tell(future: Any) -> None:
        waits.clear()
        error = future.exception()
        ready(handle, future.result() if error is None else error)

    def look(looks: int) -> None:
        if not waits or not ray.is_initialized():
            return
        why = None
        if thread.head_answers:  # without its head the cluster answers nobody
            with suppress(Exception):  # not even then, if it goes at this moment
                why = shortage(workers)
        thread.later(LATE_SECONDS, look, looks + 1)
        # It may be on its way: to start one takes long on a busy machine. Where nothing is free, nobody knows for sure.
        if why is not None and not why.free and (why.hopeless or looks > 1 or not _has_room(handle)):
            late(handle, why)

    handle.place.remote().future().add_done_callback(began)
    thread.later(LATE_SECONDS, look, 1)
    return handle


def _remote(kind: type[ActorBase]) -> Any:
    """Once for each class: for another one of the same class Ray would ask the head again, which may have gone."""
    if kind not in _remotes:
        import ray

        _remotes[kind] = ray.remote(kind)
    return _remotes[kind]


_remotes: dict[type[ActorBase], Any] = {}


def _has_room(handle: Any) -> bool:
    """Whether a node may have been found for an actor, so that a process there is at work on its start.

    Ray has but this private way to tell, and it is not sure.
    """
    with suppress(Exception):
        from ray._private.state import actors

        return bool(actors(handle._actor_id.hex())["Address"]["Port"])
    return False


def shortage(workers: RayWorkers) -> Shortage:
    """Why an actor may not run yet: what it needs, and what the cluster has, as of now."""
    import ray

    asked = workers.asked()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def fits(resources: Iterable[Mapping[str, float]]) -> bool:
        return any(all(node.get(name, 0.0) >= amount for name, amount in asked.items()) for node in resources)

    free = ray.available_resources()
    spare: Iterable[Mapping[str, float]] = (free,)
    with suppress(Exception):  # private, and better, since it knows nodes
        from ray._private.state import available_resources_per_node

        spare = list(available_resources_per_node().values())
    names = sorted({*asked, "CPU"})
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
    has = ", ".join(f"{free.get(name, 0.0):g} of {total[name]:g} {name} free" for name in names)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in asked.items()) or "nothing"
    where = f"its {len(nodes)} nodes have {has}" if len(nodes) > 1 else f"its node has {has}"
    if fits(nodes):
        words = f"each actor needs {wanted}, and the cluster is busy: {where}"
        return Shortage(words, hopeless=False, free=fits(spare))
    return Shortage(f"each actor needs {wanted}, and no node of the cluster has that: {where}", hopeless=True)


def is_loss(error: BaseException) -> bool:
    """Whether a call failed since its actor, its node or its result was lost, and not by what it did.

    A lost node shows as `ActorUnavailableError` first: the actor may live on. Whoever is told of a loss must give the
    actor up all the same, end it, and ignore what it still says.
    """
    from ray import exceptions

    return isinstance(
        error,
        exceptions.RayActorError
        | exceptions.ObjectLostError
        | exceptions.WorkerCrashedError
        | exceptions.NodeDiedError
        | exceptions.OutOfMemoryError
        | exceptions.RaySystemError
        | exceptions.GetTimeoutError,
    )


def is_unreachable(error: BaseException) -> bool:
    """Whether an actor cannot be reached, so that nobody knows yet whether it has died."""
    from ray import exceptions

    return isinstance(error, exceptions.ActorUnavailableError)


def result_is_lost(error: BaseException) -> bool:
    """Whether a call was made and only its result is lost, with the node that had it."""
    from ray import exceptions

    return isinstance(error, exceptions.ObjectLostError)


def words_of(error: BaseException) -> str:
    """How an actor was lost, for a sentence: the first line of what Ray says that has words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def end_actors(handles: Iterable[Any], seconds: float = GRACE_SECONDS) -> None:
    """End actors: those that are idle now, busy ones after their calls, or after `seconds`, since they are killed then.

    `ray.cancel` does not stop the running method of an actor.
    """
    import ray

    handles = list(handles)
    if not handles or not ray.is_initialized():
        return
    ending = []
    for handle in handles:
        with suppress(Exception):  # it has died
            ending.append(handle.__ray_terminate__.remote())
    try:
        if ending and seconds > 0:
            ray.wait(ending, num_returns=len(ending), timeout=seconds, fetch_local=False)
    finally:
        for handle in handles:
            kill_actor(handle)


def kill_actor(handle: Any) -> None:
    """Kill it now, whatever it is at."""
    import ray

    if ray.is_initialized():  # else Ray would join any cluster that it finds
        with suppress(Exception):  # it has died
            ray.kill(handle, no_restart=True)


def cancel_call(ref: Any) -> None:
    """Let an actor not begin a call; one that has begun goes on."""
    import ray

    if ray.is_initialized():
        with suppress(Exception):
            ray.cancel(ref)
