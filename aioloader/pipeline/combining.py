"""Several sources as one."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar, overload

from aioloader.core.checks import check_integer
from aioloader.core.mixture import Mixture, Schedule
from aioloader.core.typevars import T_co
from aioloader.loader import Loader
from aioloader.pipeline.described import Described
from aioloader.pipeline.start import plan_of
from aioloader.plan.plan import Combined, Plan
from aioloader.signatures import NamedWeights, Source
from aioloader.sources.resolve import describe, is_one_source

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Combining"]

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class Combining(Described[T_co]):
    """Each makes a pipeline."""

    @overload
    @classmethod
    def merge(cls, *sources: Source[A]) -> "Pipeline[A]": ...

    @overload
    @classmethod
    def merge(cls, *sources: Source[Any]) -> "Pipeline[Any]": ...

    @classmethod
    def merge(cls, *sources: Any) -> "Pipeline[Any]":
        """Give samples of all sources, as they come. Ends when all have ended.

        When a source fails, its error is raised once, and the others go on; a resume tries it again.
        """
        return cls._of(Plan(Combined("merge", _plans("merge", sources))))

    @overload
    @classmethod
    def interleave(cls, *sources: Source[A]) -> "Pipeline[A]": ...

    @overload
    @classmethod
    def interleave(cls, *sources: Source[Any]) -> "Pipeline[Any]": ...

    @classmethod
    def interleave(cls, *sources: Any) -> "Pipeline[Any]":
        """Give one sample of each source in turn, the first source's first; goes on with the others when one ends.

        When a source fails, its error is raised in its turn, and the others go on; a resume tries it again.
        """
        return cls._of(Plan(Combined("interleave", _plans("interleave", sources))))

    @overload
    @classmethod
    def mix(cls, sources: Sequence[Source[A]], weights: Sequence[float], *, seed: int = 0) -> "Pipeline[A]": ...

    @overload
    @classmethod
    def mix(cls, sources: Mapping[str, Source[A]], weights: NamedWeights, *, seed: int = 0) -> "Pipeline[A]": ...

    @overload
    @classmethod
    def mix(cls, sources: Sequence[Source[Any]], weights: Sequence[float], *, seed: int = 0) -> "Pipeline[Any]": ...

    @overload
    @classmethod
    def mix(cls, sources: Mapping[str, Source[Any]], weights: NamedWeights, *, seed: int = 0) -> "Pipeline[Any]": ...

    @classmethod
    def mix(
        cls,
        sources: Sequence[Any] | Mapping[str, Any],
        weights: Sequence[float] | NamedWeights,
        *,
        seed: int = 0,
    ) -> "Pipeline[Any]":
        """Give samples of several sources, each drawn by weight; goes on with the others when one ends.

        When a source fails, its error is raised where it is drawn, and the others go on; a resume tries it again.

        Args:
            sources: Anything that `Pipeline` takes; or a dict of such by names, whose weights may change.
            weights: One positive number for each; they need not add up to 1. Of named sources a dict, in which some may
                be 0, a `Schedule`, or a function from the step, which is the number of the draw in this epoch, to such
                a dict; see also `set_weights`. The function is called in a thread, some hundred steps ahead, and what
                it gives must depend on the step alone. The mix ends where it gives 0 to all sources that have not.
            seed: The draws depend on it and on the epoch.

        Raises:
            TypeError, ValueError: The weights do not fit the sources.
        """
        if isinstance(sources, Mapping):
            return cls._of(_mix_by_names(sources, weights, check_integer("seed", seed)))
        if is_one_source(sources) or isinstance(sources, range) or is_one_source(weights):
            raise TypeError(
                f"mix takes a list of sources and a list of weights, got {describe(sources)} and {describe(weights)}; "
                f"write for instance mix([a, b], [3, 1])"
            )
        plans = _plans("mix", sources)
        return cls._of(Plan(Combined("mix", plans, _weights(weights, len(plans)), check_integer("seed", seed))))

    @overload
    @classmethod
    def zip(cls, a: Source[A], /) -> "Pipeline[tuple[A]]": ...

    @overload
    @classmethod
    def zip(cls, a: Source[A], b: Source[B], /) -> "Pipeline[tuple[A, B]]": ...

    @overload
    @classmethod
    def zip(cls, a: Source[A], b: Source[B], c: Source[C], /) -> "Pipeline[tuple[A, B, C]]": ...

    @overload
    @classmethod
    def zip(cls, a: Source[A], b: Source[B], c: Source[C], d: Source[D], /) -> "Pipeline[tuple[A, B, C, D]]": ...

    @overload
    @classmethod
    def zip(cls, *sources: Source[Any]) -> "Pipeline[tuple[Any, ...]]": ...

    @classmethod
    def zip(cls, *sources: Any) -> "Pipeline[Any]":
        """Give tuples with one sample of each source; ends with the shortest, and when one fails."""
        return cls._of(Plan(Combined("zip", _plans("zip", sources))))


def _plans(how: str, sources: Sequence[Any]) -> tuple[Plan, ...]:
    if isinstance(sources, str | bytes) or not hasattr(sources, "__iter__"):
        raise TypeError(f"{how} takes a list of sources, got {describe(sources)}")
    if not sources:
        raise ValueError(f"{how} needs at least one source, got none")
    if how != "mix" and len(sources) == 1 and _holds_pipelines(sources[0]):
        raise TypeError(
            f"{how} takes its sources one by one, got one {type(sources[0]).__name__} of {len(sources[0])} that has "
            f"pipelines in it; write {how}(*sources)"
        )
    return tuple(_plan_of_part(how, source) for source in sources)


def _plan_of_part(how: str, source: Any) -> Plan:
    """That of one of several sources."""
    plan = plan_of(source)
    if plan.gives_info:
        raise ValueError(f"{how} combines samples, got pairs with their info; put .with_info() after .{how}()")
    if plan.staleness is not None:
        raise ValueError(f"max_staleness counts the batches that are handed out; put .max_staleness() after .{how}()")
    if any(stage.on_device for stage in plan.stages):
        raise ValueError(f"{how} combines samples in host memory, got {source!r}; put .to() after .{how}()")
    return plan


def _holds_pipelines(source: Any) -> bool:
    """Whether a list of pipelines was passed for several; other lists may be meant as samples."""
    return isinstance(source, list | tuple) and any(isinstance(sample, Loader) for sample in source)


def _mix_by_names(sources: Mapping[str, Any], weights: Any, seed: int) -> Plan:
    for name in sources:
        if not isinstance(name, str):
            raise TypeError(f"the names of sources must be str, got {name!r}")
    names = tuple(sources)
    plans = _plans("mix", tuple(sources.values()))
    return Plan(Combined("mix", plans, (), seed, Mixture.of(names, weights)))


def _weights(weights: Any, count: int) -> tuple[float, ...]:
    if isinstance(weights, Mapping | Schedule) or callable(weights):
        raise TypeError(
            f"weights by names, a Schedule or a function of the step are for sources with names, got a list of "
            f"{count}; write Pipeline.mix({{'a': ..., 'b': ...}}, weights)"
        )
    try:
        values = tuple(weights)
    except TypeError:
        raise TypeError(f"weights must be a list of numbers, got {weights!r}") from None
    if len(values) != count:
        raise ValueError(f"weights must have one number per source, got {len(values)} for {count} sources")
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"weights must be numbers, got {value!r}")
        if not (isfinite(value) and value > 0):
            raise ValueError(f"weights must be positive and finite, got {list(values)}; leave out a source of weight 0")
    return tuple(float(value) for value in values)
