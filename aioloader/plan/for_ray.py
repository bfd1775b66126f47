"""What `in_ray` may stand after, and how many parts and actors there are. Pure."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Final

from aioloader.core.source import CursorSource
from aioloader.engine.ops import OnRay
from aioloader.errors import StateError
from aioloader.executors.ray.pool import RayPool
from aioloader.executors.ray.workers import RayWorkers
from aioloader.plan.elsewhere import check_may_leave
from aioloader.plan.parts import streams_of
from aioloader.plan.plan import Plan, flows_of, walk
from aioloader.plan.ranks import check_one_order
from aioloader.plan.state import contents_of
from aioloader.sources.resolve import source_name
from aioloader.stages.base import Stage
from aioloader.stages.in_ray import InRay

__all__ = ["check_in_ray", "check_pool", "scaled", "with_parts_of", "workers_for"]


MOST_PARTS: Final = 1 << 20
"""In a state: more are none."""


def check_in_ray(plan: Plan, shown: str) -> None:
    """Refuse a plan that cannot run in actors, part by part.

    Args:
        plan: What is before `in_ray`.
        shown: The pipeline, for errors.

    Raises:
        ValueError: Why.
    """
    for stage in plan.stages:
        if stage.here_only or stage.on_device:
            raise ValueError(f"in_ray() must come before {stage.label}, got {shown}; put it first, once")
    check_may_leave(plan, "in_ray()", "other processes")
    for stream in streams_of(plan):
        if isinstance(stream.make, CursorSource) and (stream.make.live or not stream.make.replayable):
            raise ValueError(
                f"in_ray() reads its source in other processes, in parts, and what comes into "
                f"{source_name(stream.make)} comes here, once; put the stages that work on it into map(fn, "
                f"executor='ray') instead"
            )
    for part in walk(plan):
        for stage in part.stages:
            _check_executor(stage)
        _check_parts(part)
    check_one_order(plan)


def _check_executor(stage: Stage) -> None:
    """Refuse a stage whose function runs where an actor cannot have it."""
    if isinstance(stage.executor, OnRay):
        raise ValueError(
            f"in_ray() runs {stage.label} in actors, got one that runs in actors of its own; leave its "
            f"executor out, or put it after in_ray()"
        )
    if isinstance(stage.executor, Executor):
        raise ValueError(
            f"in_ray() sends {stage.label} to other processes, and its executor, {stage.executor!r}, is one of this "
            f"process; leave it out, or put that stage after in_ray()"
        )


def _check_parts(plan: Plan) -> None:
    """Refuse stages that would mean another thing in each part."""
    for stage, before in zip(plan.stages, flows_of(plan), strict=False):
        if stage.part_by_part or (stage.reorders and before.by_key) or (stage.caches and before.keyed):
            continue
        if stage.caches:
            raise ValueError(
                "in_ray() runs what is before it once for each part, and cache() would know samples by their positions "
                "in it, which each part has; put cache() after in_ray(), or right after maps of an indexable source"
            )
        raise ValueError(
            f"in_ray() runs what is before it once for each part, and {stage.label} would count in each of them; "
            f"put it after in_ray()"
        )


def check_pool(pool: Any) -> str | None:
    """The name of a `RayPool`.

    Raises:
        TypeError: It is none.
    """
    if pool is None:
        return None
    if not isinstance(pool, RayPool):
        raise TypeError(f"pool must be a RayPool of aioloader.ray, got {pool!r}")
    return pool.name


def workers_for(
    actors: int,
    num_cpus: float,
    num_gpus: float,
    resources: Mapping[str, float] | None,
    runtime_env: Mapping[str, Any] | None,
    retries: int,
    spread: bool,
    address: str | None,
) -> RayWorkers | None:
    """What each actor needs; None: there are none.

    Raises:
        ImportError: Ray is not installed.
        TypeError, ValueError: An argument does not fit.
    """
    if not actors:
        return None
    return RayWorkers(num_cpus, num_gpus, resources, runtime_env, retries, bool(spread), address)


def scaled(plan: Plan, actors: int) -> Plan:
    """`plan` with so many actors.

    Raises:
        ValueError: It has none, or fewer parts.
    """
    return _with(plan, lambda stage: _scaled(stage, actors), "scale() changes how many actors in_ray() has")


def _scaled(stage: InRay, actors: int) -> InRay:
    if not stage.actors:
        raise ValueError(
            f"scale() changes how many actors there are, and {stage.label} has none; pass in_ray(actors=1)"
        )
    if actors > stage.parts:
        raise ValueError(f"each actor runs whole parts, so there are at least as many, got {actors=} for {stage.label}")
    return replace(stage, actors=actors)


def with_parts_of(plan: Plan, state: Any) -> Plan:
    """`plan` with as many parts as `state` is of, where the user has not said how many. Others are refused later."""
    stage = next((stage for stage in plan.stages if isinstance(stage, InRay)), None)
    if stage is None or stage.pinned:
        return plan
    try:
        shape = contents_of(state)["pipeline"]
    except StateError:
        return plan  # it is said later
    found = [part.get("parts") for part in shape if isinstance(part, dict) and part.get("stage") == "in_ray"]
    if len(found) == 1 and type(found[0]) is int and 1 <= found[0] <= MOST_PARTS:
        return _with(plan, lambda stage: stage.with_parts(found[0]), "")
    return plan


def _with(plan: Plan, change: Any, what: str) -> Plan:
    if not any(isinstance(stage, InRay) for stage in plan.stages):
        raise ValueError(f"{what}, and this pipeline has none")
    return replace(plan, stages=tuple(change(stage) if isinstance(stage, InRay) else stage for stage in plan.stages))
