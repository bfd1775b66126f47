"""The stage whose work runs in actors of a Ray cluster, and how many of these there are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aioloader.core.checks import check_count
from aioloader.core.typevars import T_co
from aioloader.executors.ray.readers import Readers
from aioloader.executors.ray.thread import ray_thread_of
from aioloader.loader import Loader
from aioloader.pipeline.described import Described
from aioloader.plan.for_ray import check_in_ray, check_pool, scaled, with_parts_of, workers_for
from aioloader.stages.in_ray import PARTS_PER_ACTOR, InRay

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Actors"]


class Actors(Described[T_co]):
    """Parts of a pipeline in actors."""

    def in_ray(
        self,
        actors: int = 4,
        *,
        parts: int | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        ahead: int = 2,
        retries: int = 3,
        spread: bool = True,
        address: str | None = None,
        pool: Any = None,
    ) -> "Pipeline[T_co]":
        """Run everything before this in actors of a Ray cluster: many machines read, and this process trains.

        What is before it is dealt into `parts`, and each part is a pipeline of its own: part i has every `parts`-th
        sample, from number i on; of sources that read files, every `parts`-th file, where there are so many. The parts
        give their batches one each in turn; one that has ended drops out of the turn. So the order depends on `parts`,
        and neither on the actors nor on time. With `batch` before it, each part has batches of its own.

        Actors only host the parts. There may be more or fewer of them at any resume, and while the loader runs
        (`scale`). When an actor dies, or its node, its parts go on elsewhere from what has come, and nothing is lost,
        repeated or reordered; `BatchInfo.attempts` says what was begun again. Order, errors at their place, states and
        pauses are those of the parts. With `.shard()` before it, ranks read disjoint samples; with a `pool` they share
        its actors.

        As for `in_process`, all of it is pickled, and async functions run on the actor's event loop. `docs/ray.md` has
        what to size, and what is promised when machines die.

        Args:
            actors: How many, at least 1. 0: the parts run in this process, without Ray, with the same batches and
                states.
            parts: At least `actors`. It is in the state, which loads into a loader with as many parts only. Default: 4
                times `actors`, and what a state says when one is loaded.
            num_cpus: CPUs of the cluster that each actor holds, at least 0.
            num_gpus: GPUs that each holds.
            resources: Other resources that each holds, by name.
            runtime_env: Ray's description of what the actors need: packages, files, variables.
            ahead: Batches of each part that are made and have not been handed out, beside those that are made in its
                actor; at least 1. Fewer where Ray's object store is small. Of samples that are not batched it is 64.
            retries: How many deaths of its actor a sample survives; then it fails at its place with `WorkerDiedError`.
            spread: Ask Ray to spread the actors over its nodes.
            address: The cluster; None: that of `ray.init(...)`, else of RAY_ADDRESS. `"local"`: one of the loader's
                own, which ends with it.
            pool: A `RayPool`, whose actors other ranks and loaders use, too. None: the actors are the loader's own,
                and end with it.

        Raises:
            ImportError: Ray is not installed.
            TypeError, ValueError: Something before this cannot go there, or has gone already, or would be another thing
                in each part; or an argument does not fit.
        """
        actors = check_count("actors", actors, least=0)
        check_in_ray(self._plan, repr(self))
        number = PARTS_PER_ACTOR * max(1, actors) if parts is None else check_count("parts", parts, least=1)
        if number < actors:
            raise ValueError(f"each actor runs whole parts, so there are at least as many, got {actors=} and {parts=}")
        stage = InRay(
            actors,
            number,
            parts is not None,
            check_count("ahead", ahead, least=1),
            workers_for(actors, num_cpus, num_gpus, resources, runtime_env, retries, spread, address),
            check_pool(pool),
        )
        return self._then(stage)

    def scale(self, *, actors: int) -> None:
        """Let what is before `in_ray` run in so many actors from now on. Safe in any thread, at any time.

        No sample moves. New actors take over parts as they begin to run; those that are too many go on with nothing.

        Args:
            actors: At least 1, and at most as many as there are parts.

        Raises:
            TypeError, ValueError: There is no `in_ray` with actors, or the number does not fit.
        """
        self._plan = scaled(self._plan, check_count("actors", actors, least=1))
        with self._lock:
            processes = self._processes
        if processes is not None:
            for readers in ray_thread_of(processes).kept(Readers):
                readers.scale(actors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        before, self._plan = self._plan, with_parts_of(self._plan, state)
        try:
            super().load_state_dict(state)
        except BaseException:
            self._plan = before
            raise

    load_state_dict.__doc__ = Loader.load_state_dict.__doc__
