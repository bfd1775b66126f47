"""Processes that have something open in an actor of a pool, and whether they still live."""

from contextlib import suppress
from typing import NamedTuple

__all__ = ["Owner", "is_gone", "this_process"]


class Owner(NamedTuple):
    """A process of a cluster.

    Attributes:
        job: The program that it belongs to.
        actor: Which actor it is; None: it is that program.
    """

    job: str
    actor: str | None


def this_process() -> Owner:
    """The one that asks. It must be connected."""
    import ray

    context = ray.get_runtime_context()
    return Owner(context.get_job_id(), context.get_actor_id())


def is_gone(owner: Owner) -> bool:
    """Whether it has ended, as far as the cluster knows. May take long if the head does not answer.

    Ray has but private ways to tell; where they fail, it has not.
    """
    with suppress(Exception):
        from ray._private.state import actors, jobs

        if owner.actor is not None:
            return bool(actors(owner.actor)["State"] == "DEAD")
        return any(job["IsDead"] for job in jobs() if job["JobID"] == owner.job)
    return False
