"""The connection of this process to a Ray cluster: the user's, or one that is made for as long as loaders need it.

Ray has one connection per process, so all loaders share it. What the user has made with `ray.init` is used and never
ended. What is made here, since RAY_ADDRESS or `address=` named a cluster, ends with the last loader that uses it.

`ray.init()` without an address joins whatever cluster a file in the temporary folder names, also a dead one, and else
begins one. So it is never called without an address.
"""

import os
import socket
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["Membership", "check_named", "check_ray", "connected", "join_cluster", "words_of_named"]


def check_ray(what: str) -> None:
    """Refuse `what` where Ray is not installed. Imports nothing.

    Raises:
        ImportError: It is not; says what to install.
    """
    if find_spec("ray") is None or find_spec("cloudpickle") is None:
        raise ImportError(f"{what} needs the packages ray and cloudpickle: pip install 'aioloader[ray]'")


def check_named(address: str | None) -> None:
    """Refuse to go on where nobody has named a cluster. Quick: nothing is connected.

    Args:
        address: See `RayWorkers`.

    Raises:
        ValueError: There is neither a connection nor an address.
    """
    if address is None and not os.environ.get("RAY_ADDRESS") and not connected():
        raise ValueError(
            "Ray actors need a cluster, and this process is connected to none; call ray.init('local') for "
            "one on this machine or ray.init(address=...), set RAY_ADDRESS, or pass RayWorkers(address='local')"
        )


def words_of_named() -> str:
    """Which cluster is named, and whether somebody answers there; for people. Imports nothing, and joins nothing."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "none named: call ray.init(...), or set RAY_ADDRESS"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return f"{address} (RAY_ADDRESS)"
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        return f"{address} (RAY_ADDRESS) does not answer: {error}"
    return f"{address} (RAY_ADDRESS) answers"


def connected() -> bool:
    """Whether this process has a connection now."""
    ray = sys.modules.get("ray")  # whoever made one has imported it
    return ray is not None and bool(ray.is_initialized())


@dataclass(eq=False)
class _Ours:
    """The connection that was made here.

    Attributes:
        address: By which.
        identity: Of the connection: after the user's own `ray.shutdown()` and `ray.init()` it is another one.
        users: Loaders that use it.
    """

    address: str
    identity: tuple[Any, ...]
    users: int = 0


_lock = threading.Lock()
_ours: _Ours | None = None


class Membership:
    """That somebody uses the connection.

    Args:
        ours: The connection, if it was made here.
        identity: See `_Ours`.
    """

    def __init__(self, ours: _Ours | None, identity: tuple[Any, ...]) -> None:
        self._ours = ours
        self._identity = identity

    @property
    def alive(self) -> bool:
        """Whether that connection is still there."""
        return connected() and _identity() == self._identity

    def head_answers(self) -> bool:
        """Whether the head of the cluster takes connections. May take a second."""
        host, _, port = str(self._identity[0]).rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except (OSError, ValueError):
            return False
        return True

    def leave(self) -> None:
        """Use it no more; the last one ends what was made here. Idempotent; may take a second."""
        global _ours
        import ray

        ours, self._ours = self._ours, None
        if ours is None:
            return
        with _lock:
            ours.users -= 1
            if ours.users:
                return
            if _ours is ours:
                _ours = None
            if connected() and _identity() == ours.identity:
                ray.shutdown()


def join_cluster(address: str | None) -> Membership:
    """Use the cluster at `address`, see `RayWorkers`. May take seconds, and `"local"` some more.

    Raises:
        ValueError: Nobody has named a cluster, or this process is connected to another one.
        ConnectionError: It does not answer.
    """
    global _ours
    import ray

    with _lock:
        check_named(address)
        ours = _ours
        if connected():
            if ours is None or ours.identity != _identity():
                _check_same(address)
                return Membership(None, _identity())
            if address not in (None, ours.address):
                _check_same(address)
        else:
            named = address or os.environ["RAY_ADDRESS"]
            if named.startswith("ray://"):
                raise ValueError(
                    f"RAY_ADDRESS must be that of a cluster whose node this process runs on, got {named!r} of the Ray "
                    f"client; run the program on a node of the cluster"
                )
            options: dict[str, Any] = {"include_dashboard": False} if named == "local" else {}
            ray.init(address=named, configure_logging=False, **options)
            ours = _ours = _Ours(named, _identity())
        ours.users += 1
        return Membership(ours, ours.identity)


def _identity() -> tuple[Any, ...]:
    import ray

    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id(), os.getpid()


def _check_same(address: str | None) -> None:
    """Refuse an address that is not that of the connection."""
    if address in (None, "auto"):
        return
    import ray

    found = ray.get_runtime_context().gcs_address
    if address == "local" or not _is_same(str(address), found):
        raise ValueError(
            f"this process is connected to the Ray cluster at {found} already, and Ray has one connection per process, "
            f"got address={address!r}; leave address out, or call ray.shutdown() before"
        )


def _is_same(address: str, found: str) -> bool:
    if address == found:
        return True
    host, _, port = address.rpartition(":")
    there, _, its_port = found.rpartition(":")
    try:
        return port == its_port and {socket.gethostbyname(host)} & {there, socket.gethostbyname(there)} != set()
    except OSError:
        return False
