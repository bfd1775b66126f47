"""The mixes by names in a plan: where they are, and which one somebody means."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aioloader.core.address import Address
from aioloader.core.mixture import Mixture
from aioloader.core.safe_text import safe_repr
from aioloader.plan.plan import Combined, Plan, length_of
from aioloader.stages.repeat import Repeat

__all__ = ["epoch_lengths", "mixture_named", "mixtures_of"]


def mixtures_of(plan: Plan, path: Address = ()) -> dict[str, Mixture]:
    """Each by its address, as text."""
    source = plan.source
    if not isinstance(source, Combined):
        return {}
    found = {} if source.mixture is None else {".".join(map(str, path)): source.mixture}
    for number, inner in enumerate(source.plans):
        found |= mixtures_of(inner, (*path, number))
    return found


def epoch_lengths(source: Combined) -> tuple[int | None, ...]:
    """How many samples each of the sources has in an epoch of its own, without `repeat`; None: nobody knows."""
    return tuple(map(_epoch_length, source.plans))


def _epoch_length(plan: Plan) -> int | None:
    once = replace(plan, stages=tuple(stage for stage in plan.stages if not isinstance(stage, Repeat)))
    try:
        return length_of(once)
    except Exception:  # unknown, or the user's `__len__` fails, which is no reason for a mix to fail
        return None


def mixture_named(plan: Plan, weights: Any) -> tuple[str, Mixture]:
    """The one whose sources `weights` names, and its address.

    Raises:
        TypeError: They are no dict.
        ValueError: There is none, or more than one, or it is at work in another process.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"set_weights takes a dict of names and weights, got {safe_repr(weights)}")
    mixtures = mixtures_of(plan)
    found = [item for item in mixtures.items() if set(item[1].names) == set(weights)]
    if not found:
        known = "; ".join(", ".join(map(repr, mixture.names)) for mixture in mixtures.values())
        there = f"the sources of its mixes are {known}" if known else "it has none: write Pipeline.mix({'a': ..., ...})"
        raise ValueError(
            f"set_weights names all sources of one mix of this pipeline, got {', '.join(map(safe_repr, weights))}; "
            f"{there}"
        )
    if len(found) > 1:
        raise ValueError(
            f"set_weights names all sources of one mix, but {len(found)} have the sources "
            f"{', '.join(map(safe_repr, weights))}; give them other names"
        )
    if any(stage.encloses and stage.here_only for stage in plan.stages):
        raise ValueError(
            "set_weights does not reach a mix in another process; leave in_process() or in_ray() out, or mix after it"
        )
    return found[0]
