"""What a pipeline is: its sources and stages, and what can be told of them without running anything."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from aioloader.sources.files import Files
from aioloader.sources.order import is_order_stage
from aioloader.sources.resolve import Indexable, Stream, describe_content, source_name
from aioloader.stages.base import Stage, UnknownLengthError
from aioloader.stages.batch import Batch
from aioloader.stages.cache import Cache
from aioloader.stages.drop_if import DropIf
from aioloader.stages.map import Filter, Map
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle

__all__ = [
    "DEFAULT_PREFETCH",
    "Combined",
    "Plan",
    "Repeat",
    "Single",
    "any_order",
    "depends_on_time",
    "in_front_of_cache",
    "is_permutable",
    "length_of",
    "placed",
]

DEFAULT_PREFETCH = 2


@dataclass(frozen=True)
class Single:
    """One source.

    Attributes:
        data: What it is.
        sampler: Gives the keys of an epoch instead of 0, 1, 2, ...
        name: In statistics; None: that of the user's object.
        keys: `data` gives keys, or the keys of batches.
        ahead: Of these so many may be read before they are asked for.
        tells_epoch: A stream with `set_epoch` is told the number of each epoch, as a sampler is.
    """

    data: Indexable | Stream
    sampler: Stream | None = None
    name: str | None = None
    keys: bool = False
    ahead: int = 0
    tells_epoch: bool = False

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        return self.data.length if self.sampler is None else self.sampler.length

    @property
    def indexable(self) -> bool:
        """Whether order stages are arithmetic on its keys."""
        return self.sampler is None and isinstance(self.data, Indexable)


@dataclass(frozen=True)
class Combined:
    """Several pipelines as one source."""

    how: Literal["interleave", "merge", "mix", "zip"]
    plans: tuple["Plan", ...]
    weights: tuple[float, ...] = ()
    seed: int = 0

    indexable = False

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        lengths = [length_of(plan) for plan in self.plans]
        return min(lengths) if self.how == "zip" else sum(lengths)


@dataclass(frozen=True)
class Repeat(Stage):
    """All that is before it, again and again."""

    times: int | None

    @property
    def label(self) -> str:
        return f"repeat({'' if self.times is None else self.times})"

    def length(self, upstream: int) -> int:
        if self.times is None:
            raise UnknownLengthError("repeat() without a number is endless")
        return upstream * self.times


@dataclass(frozen=True)
class Plan:
    """A pipeline's description.

    Attributes:
        source: Where samples come from.
        stages: What is done to them.
        prefetch: Finished batches held ahead; None: 2, and for samples that are not batched what their window holds.
        room: Batches being made and finished together; None: decided here.
        seed: Of the random numbers of samples (`sample_rng`); None: the loader draws one.
        gives_info: What is handed out are pairs of a batch and its `BatchInfo`.
    """

    source: Single | Combined
    stages: tuple[Stage, ...] = ()
    prefetch: int | None = None
    room: int | None = None
    seed: int | None = None
    gives_info: bool = False


def length_of(plan: Plan) -> int:
    """Entries per epoch.

    Raises:
        TypeError: Unknown before it has run.
    """
    length = plan.source.length()
    for stage in plan.stages:
        length = stage.length(length)
    return length


def any_order(source: Single | Combined, stages: Sequence[Stage]) -> bool:
    """Whether samples come in another order each time."""
    if isinstance(source, Combined) and (
        (source.how == "merge" and len(source.plans) > 1)
        or any(any_order(inner.source, inner.stages) for inner in source.plans)
    ):
        return True
    return any(isinstance(stage, Map) and not stage.ordered and stage.replay_order is None for stage in stages)


def depends_on_time(plan: Plan) -> bool:
    """Whether it is a matter of time which samples a batch holds."""
    inner = plan.source.plans if isinstance(plan.source, Combined) else ()
    return any(map(depends_on_time, inner)) or any(
        isinstance(stage, DropIf) or (isinstance(stage, Batch) and stage.max_wait is not None) for stage in plan.stages
    )


def placed(plan: Plan) -> Plan:
    """The plan with each `shard` as it is now: looked up once, so that a whole epoch is of one rank.

    Raises:
        ValueError: `shard(even="error")`, and it is known that the samples do not share out evenly; or the rank that
            the environment names is none.
    """
    source = plan.source
    if isinstance(source, Combined):
        source = replace(source, plans=tuple(placed(inner) for inner in source.plans))
    plan = replace(plan, source=source)
    for at, stage in enumerate(plan.stages):
        if isinstance(stage, Shard):
            shard = stage.placed()
            plan = replace(plan, stages=(*plan.stages[:at], shard, *plan.stages[at + 1 :]))
            if shard.even == "error":
                with suppress(UnknownLengthError, TypeError):  # then the end of the stream tells
                    length_of(replace(plan, stages=plan.stages[: at + 1]))
    return plan


def is_permutable(plan: Plan) -> bool:
    """Whether `shuffle` without a buffer may follow: each entry so far is one sample of an indexable source."""
    return plan.source.indexable and all(
        isinstance(stage, Map | Cache) or is_order_stage(stage) for stage in plan.stages
    )


def in_front_of_cache(plan: Plan) -> str:
    """What is in front of a cache behind `plan`, in words: a cache on disk belongs to one such pipeline.

    Raises:
        ValueError: The next epoch would give other samples, or in another order, and nothing else tells them apart.
    """
    if isinstance(plan.source, Single) and isinstance(plan.source.data, Indexable) and _is_keyed(plan):
        data = plan.source.data
        if isinstance(data.data, Files):
            first = f"samples by name of Files(read={data.data.read!r}, with_path={data.data.with_path})"
        elif data.load is None and isinstance(data.data, list | tuple):
            first = "samples by name"
        else:
            first = f"samples by index of {source_name(data.data)}({data.length})"
        return " > ".join([first, *(stage.label for stage in plan.stages if isinstance(stage, Map | Filter))])
    return " > ".join(["samples by position", *_in_order(plan)])


def _is_keyed(plan: Plan) -> bool:
    """Whether entries are samples of the source by its keys: nothing but order stages, then maps and filters."""
    one_for_one = True
    for stage in plan.stages:
        if isinstance(stage, Filter):
            one_for_one = False
        elif not isinstance(stage, Map | Cache) and not (
            one_for_one and is_order_stage(stage) and plan.source.indexable
        ):
            return False
    return True


def _in_order(plan: Plan) -> list[str]:
    """`plan` in words, if its epochs are all the same."""
    if isinstance(plan.source, Combined):
        if plan.source.how not in ("zip", "interleave"):
            raise ValueError(
                f"cache() behind {plan.source.how}() cannot tell samples apart: they come in another order in each "
                f"epoch; put cache() into each of the pipelines that are combined"
            )
        words = [f"{plan.source.how}({', '.join(' > '.join(_in_order(part)) for part in plan.source.plans)})"]
    else:
        if plan.source.sampler is not None:
            raise ValueError(
                "cache() cannot tell samples apart here: the sampler may give another order in each epoch, and what is "
                "between it and cache() is more than map and filter; put cache() before that"
            )
        words = [describe_content(plan.source.data)]
    for stage in plan.stages:
        if isinstance(stage, DropIf) or (isinstance(stage, Batch) and stage.max_wait is not None):
            raise ValueError(
                f"cache() behind {stage.label} cannot tell samples apart: which ones come is a matter of time, in each "
                f"epoch; put cache() before it"
            )
        if isinstance(stage, Shuffle) or (isinstance(stage, Map) and not stage.ordered):
            raise ValueError(
                f"cache() behind {stage.label} cannot tell samples apart: they come in another order in each epoch; "
                f"put cache() before it"
            )
        if isinstance(stage, Shard):
            rank, world_size = stage.place()
            words.append(f"shard({rank}, {world_size})")
        elif not isinstance(stage, Cache):
            words.append(stage.label)
    return words
