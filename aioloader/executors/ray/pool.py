"""Actors that several loaders read from: the ranks of a job, or training and validation."""

from dataclasses import dataclass

from aioloader.executors.ray.cluster import check_ray
from aioloader.executors.ray.reader_seats import NAMESPACE, seat_name

__all__ = ["RayPool"]


@dataclass(frozen=True)
class RayPool:
    """Actors with names, which all loaders with a pool of this name share: `in_ray(pool=RayPool("readers"))`.

    The ranks of a job make it alike, and each runs its own parts there. An actor is made by whichever rank asks first
    for it, and ends with the process of that rank; then the others make it anew, and go on from what has come. So
    nothing is left when all of them have ended. Closing a loader ends what it has in the actors, and no actor.

    Args:
        name: Other jobs on the same cluster have others.

    Raises:
        ImportError: Ray is not installed.
        TypeError, ValueError: The name is no string, or empty.
    """

    name: str

    def __post_init__(self) -> None:
        check_ray("RayPool")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, the same in all processes of a job, got {self.name!r}")
        if not self.name:
            raise ValueError("name must not be empty: a pool is found by it")

    def close(self) -> None:
        """End its actors now, in whatever process they were made. Loaders that still use them make them anew."""
        import ray

        if not ray.is_initialized():
            return
        prefix = seat_name(self.name, 0)[:-1]
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix):
                try:
                    ray.kill(ray.get_actor(actor["name"], NAMESPACE))
                except ValueError:  # it has ended meanwhile
                    continue
