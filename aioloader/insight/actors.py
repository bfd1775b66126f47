"""What is known of actors in a cluster."""

from dataclasses import dataclass

__all__ = ["ActorStats"]


@dataclass(frozen=True, slots=True)
class ActorStats:
    """One actor of a stage that runs on a Ray cluster, or the place of one that waits for room there.

    Attributes:
        name: `Ray worker 0`; one that replaces another has its name.
        node: The address of its node; empty while it does not run.
        pid: Of its process there; None while it does not run.
        running: Whether it runs.
        samples: What it has made, and those before it in its place.
        busy_seconds: The time that they have spent in the user's functions; of `in_ray`, the CPU time of their
            processes.
        running_seconds: How long it has run.
        restarts: How many in its place were lost.
        received_bytes: The size of what came from them.
    """

    name: str
    node: str = ""
    pid: int | None = None
    running: bool = False
    samples: int = 0
    busy_seconds: float = 0.0
    running_seconds: float = 0.0
    restarts: int = 0
    received_bytes: int = 0
