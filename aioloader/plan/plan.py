"""What a pipeline is: its sources and stages, and what can be told of them without running anything."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from aioloader.core.limit import Limit
from aioloader.core.mixture import Mixture
from aioloader.core.source import CursorSource
from aioloader.engine.resumable import tells_state
from aioloader.sources.file_source import FileSource
from aioloader.sources.files import Files
from aioloader.sources.resolve import Indexable, StreamData, describe_content, source_name
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import generators_of, is_repeatable
from aioloader.stages.base import Stage, UnknownLengthError
from aioloader.stages.flow import STRENGTH, Again, Flow, Guarantee, Ranks, Shared, Steps
from aioloader.stages.part import Part

__all__ = [
    "DEFAULT_PREFETCH",
    "Combined",
    "Plan",
    "Single",
    "before_cache",
    "flow_of",
    "flows_of",
    "forgets_numbers",
    "functions_of",
    "length_of",
    "may_tune",
    "part_of",
    "walk",
    "with_ranks",
    "without_reports",
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
        check: Of keys: refuses a place in them that is none, see `sampler_order.check_place`.
        tells_epoch: A stream with `set_epoch` is told the number of each epoch, as a sampler is.
        concurrency: Of an indexable source: how many samples are loaded at once; None: not said.
    """

    data: Indexable | StreamData
    sampler: StreamData | None = None
    name: str | None = None
    keys: bool = False
    ahead: int = 0
    check: Callable[[Any, int], None] | None = None
    tells_epoch: bool = False
    concurrency: int | Limit | None = None

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        return self.data.length if self.sampler is None else self.sampler.length

    @property
    def indexable(self) -> bool:
        """Whether order stages are arithmetic on its keys."""
        return self.sampler is None and isinstance(self.data, Indexable)


@dataclass(frozen=True)
class Combined:
    """Several pipelines as one source.

    Attributes:
        how: In which way.
        plans: They.
        weights: Of a `mix`.
        seed: Likewise.
        mixture: Of a `mix` by names, in place of `weights`.
    """

    how: Literal["interleave", "merge", "mix", "zip"]
    plans: tuple["Plan", ...]
    weights: tuple[float, ...] = ()
    seed: int = 0
    mixture: Mixture | None = None

    indexable = False

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        if self.mixture is not None and self.mixture.by_function is not None:
            raise UnknownLengthError("mix has no length: it ends where the function of its weights says 0 for all")
        lengths = [length_of(plan) for plan in self.plans]
        return min(lengths) if self.how == "zip" else sum(lengths)


@dataclass(frozen=True)
class Plan:
    """A pipeline's description.

    Attributes:
        source: Where samples come from.
        stages: What is done to them.
        prefetch: Finished batches held ahead; None: 2, and for samples that are not batched what their window holds.
        room: Batches being made and finished together; None: decided here.
        grows: More than `room` while a slow one at the front holds finished ones up.
        nbytes: Fewer than `room` where finished ones would take more bytes than that.
        staleness: Batches that samples may begin before their own is asked for; None: it is for room alone to say.
        seed: Of the random numbers of samples (`sample_rng`); None: the loader draws one.
        gives_info: What is handed out are pairs of a batch and its `BatchInfo`.
        told_length: How many entries an epoch has, as the user has said, and after how many stages; None: nothing said.
    """

    source: Single | Combined
    stages: tuple[Stage, ...] = ()
    prefetch: int | None = None
    room: int | None = None
    grows: bool = False
    nbytes: int | None = None
    staleness: int | None = None
    seed: int | None = None
    gives_info: bool = False
    told_length: tuple[int, int] | None = None


def functions_of(plan: "Plan") -> list[Any]:
    """The user's datasets and functions that work for `plan`, in an order that a copy of it shares."""
    if isinstance(plan.source, Combined):
        functions = [function for inner in plan.source.plans for function in functions_of(inner)]
    else:
        data = plan.source.data
        functions = [data.data if isinstance(data, Indexable) else data.make]
    return functions + [function for stage in plan.stages for function in stage.functions]


def may_tune(plan: Plan) -> bool:
    """Whether anything in it may have places for several calls, or room."""
    loads = (part.source.data for part in walk(plan) if isinstance(part.source, Single))
    loads_by_key = any(isinstance(data, Indexable) and data.load is not None for data in loads)
    calls = any(stage.functions for part in walk(plan) for stage in part.stages)
    return loads_by_key or calls or flow_of(plan).batch_size is not None or flow_of(plan).one_a_step


def walk(plan: Plan) -> Iterator[Plan]:
    """`plan`, and those that are combined in it."""
    yield plan
    if isinstance(plan.source, Combined):
        for inner in plan.source.plans:
            yield from walk(inner)


def length_of(plan: Plan) -> int:
    """Entries per epoch.

    Raises:
        TypeError: Unknown before it has run.
    """
    told, stages = plan.told_length, plan.stages
    at = max((at for at, stage in enumerate(stages) if stage.parts), default=-1)
    if told is not None and at < told[1] <= len(stages):  # else it was said of a part of the plan
        length, stages = told[0], stages[told[1] :]
    elif at < 0:
        length = plan.source.length()
    else:  # each part has stages of its own
        before, parts = replace(plan, stages=stages[:at]), stages[at].parts
        length, stages = sum(length_of(part_of(before, number, parts)) for number in range(parts)), stages[at + 1 :]
    for stage in stages:
        length = stage.length(length)
    return length


def flow_of(plan: Plan) -> Flow:
    """What is known of the samples that `plan` gives."""
    flow = flows_of(plan)[-1]
    return flow.limited(Shared.SAME_RANK, flow.completion_order) if flow.completion_order else flow


def flows_of(plan: Plan) -> list[Flow]:
    """What is known of the samples before each stage of `plan`, and after the last one."""
    flow = _combined(plan.source) if isinstance(plan.source, Combined) else _single(plan.source)
    flows = [flow]
    for stage in plan.stages:
        flows.append(flow := stage.flow(flow))
    return flows


def _single(source: Single) -> Flow:
    flow = Flow(by_key=source.indexable, keyed=isinstance(source.data, Indexable), again=_again(source))
    if isinstance(source.data, Sampled):
        return flow.at_least(_guarantee_of_sampled(source.data))
    if source.sampler is None:
        return flow.at_least(_guarantee_of_stream(source.data.make)) if isinstance(source.data, StreamData) else flow
    # If an epoch ends before its keys do, a resumed one may take no more of them, and then draws nothing. Where the
    # sampler's own generator is by then, no state tells: later epochs have another order.
    sampler = source.sampler.make
    flow = replace(flow, guarantee_if_cut="replayed" if generators_of(sampler) else "exact")
    return flow if is_repeatable(sampler) else flow.at_least("replayed")


def _guarantee_of_sampled(data: Sampled) -> Guarantee:
    if data.turns is not None:
        return "replayed" if data.in_order else "at-least-once"
    if data.iterable:
        return _guarantee_of_stream(data.dataset)
    return "exact" if data.sampling.repeatable else "replayed"


def _again(source: Single) -> Again:
    data = source.data
    if isinstance(data, StreamData) and isinstance(data.make, CursorSource) and not data.make.replayable:
        return "none"
    # A sampler may draw another order when it is iterated once more.
    once = source.sampler is not None or (isinstance(data, StreamData) and data.single_use)
    return "all" if once else "head"


def _combined(source: Combined) -> Flow:
    """Several sources, some of which may have been dealt to ranks."""
    label = f"Pipeline.{source.how}(...)"
    parts = [flow_of(plan).cut() for plan in source.plans]
    as_they_come = label if source.how == "merge" and len(parts) > 1 else ""
    order = as_they_come or next((part.completion_order for part in parts if part.completion_order), "")
    orders = [part.closed().rank_order for part in parts]
    agains = {part.again for part in parts}
    flow = Flow(
        again="none" if "none" in agains else "all" if "all" in agains else "head",
        completion_order=order,
        timed=next((part.timed for part in parts if part.timed), ""),
        rank_order=as_they_come or next(filter(None, orders), ""),
        guarantee=max((part.guarantee for part in parts), key=STRENGTH.index),
        steady=all(part.steady for part in parts),
        steps=Steps(input_order=order),
    )
    dealt = [(part.ranks, part.batch_size) for part in parts if part.ranks is not None]
    if not dealt:
        return flow
    in_step = source.how == "zip" and len(dealt) == len(parts)
    return _dealt(flow, dealt, label, as_they_come=bool(as_they_come), in_step=in_step)


def _dealt(flow: Flow, dealt: list[tuple[Ranks, int | None]], label: str, *, as_they_come: bool, in_step: bool) -> Flow:
    """`flow` of several sources, of which some were dealt to ranks.

    Args:
        flow: What is known of it otherwise.
        dealt: The ranks of each that was, and the size of its batches.
        label: How they are combined.
        as_they_come: In an order that time decides.
        in_step: One of each at a time, and all were dealt.
    """
    ranks, batch_size = max(dealt, key=lambda one: one[0].shared)
    flow = replace(flow, ranks=ranks, batch_size=batch_size)
    if as_they_come or any((its.rank, its.world_size) != (ranks.rank, ranks.world_size) for its, _ in dealt):
        return flow.limited(Shared.SAME_RANK, label)
    if in_step and len({size for _, size in dealt}) == 1:
        return flow
    return flow.limited(Shared.SAME_WORLD, label)


def forgets_numbers(plan: Plan) -> bool:
    """Whether a resume after one of several sources has failed gives some samples again.

    That source takes part again then, so that numbers would be those of other entries: stages that know entries by
    number forget them.
    """
    inner = plan.source.plans if isinstance(plan.source, Combined) else ()
    counts = any(not stage.exact_in_any_order for stage in plan.stages) or bool(flow_of(plan).completion_order)
    return counts or any(map(forgets_numbers, inner))


def _guarantee_of_stream(stream: Any) -> Guarantee:
    """Whether `stream` can be entered in the middle."""
    if isinstance(stream, CursorSource) and not stream.replayable:
        return "live"
    return "exact" if isinstance(stream, CursorSource) or tells_state(stream) else "replayed"


def with_ranks(plan: Plan) -> Plan:
    """The plan with each `shard` as it is now: looked up once, so that a whole epoch is of one rank.

    Raises:
        ValueError: `shard(even="error")`, and it is known that the samples do not share out evenly; or there are fewer
            files than ranks; or the rank that the environment names is none.
    """
    source = plan.source
    if isinstance(source, Combined):
        source = replace(source, plans=tuple(with_ranks(inner) for inner in source.plans))
    stages: tuple[Stage, ...] = ()
    for stage in plan.stages:
        now = stage.with_ranks()
        stages = (*stages, now)
        if isinstance(source, Single) and isinstance(source.data, StreamData):
            part = now.deal(source.data.make)
            if part is not source.data.make:
                source = replace(source, data=replace(source.data, make=part))
        if now is not stage:
            with suppress(UnknownLengthError, TypeError):  # then the end of the stream tells
                length_of(replace(plan, source=source, stages=stages))
    if source is plan.source and all(now is before for now, before in zip(stages, plan.stages, strict=True)):
        return plan
    return replace(plan, source=source, stages=stages)


def part_of(plan: Plan, number: int, of: int) -> Plan:
    """One of the parts that `in_ray` deals `plan` into, as it is on this rank.

    Where order stages are arithmetic on keys, a part is every `of`-th key after them. Of a source that reads files, it
    is every `of`-th file, if there are so many; of any other stream, every `of`-th sample.

    Args:
        plan: What is dealt; `with_ranks`, where it is to be run.
        number: From 0.
        of: How many parts there are.
    """
    return _part_of(plan, number, of, may_deal_files=True)


def _part_of(plan: Plan, number: int, of: int, *, may_deal_files: bool) -> Plan:
    source = plan.source
    if isinstance(source, Combined):  # by samples where these are paired up
        by_files = may_deal_files and source.how != "zip"
        parts = (_part_of(inner, number, of, may_deal_files=by_files) for inner in source.plans)
        return replace(plan, source=replace(source, plans=tuple(parts)), told_length=None)
    at = max((at for at, flow in enumerate(flows_of(plan)) if flow.by_key), default=0)
    part = Part(number, of)
    if isinstance(source.data, StreamData) and isinstance(source.data.make, FileSource):
        files = source.data.make.part(number, of) if may_deal_files else None
        if files is not None:
            part, source = Part(number, of, by_file=True), replace(source, data=replace(source.data, make=files))
    stages = (*plan.stages[:at], part, *plan.stages[at:])
    return replace(plan, source=source, stages=stages, told_length=None)  # which is that of all parts


def without_reports(plan: Plan) -> Plan:
    """`plan`, but nothing is written down of what is left out: it makes samples a second time."""
    source = plan.source
    if isinstance(source, Combined):
        source = replace(source, plans=tuple(without_reports(inner) for inner in source.plans))
    return replace(plan, source=source, stages=tuple(stage.without_report() for stage in plan.stages))


def before_cache(plan: Plan) -> str:
    """What is before a cache that comes after `plan`, in words: a cache on disk belongs to one such pipeline.

    Raises:
        ValueError: The next epoch would give other samples, or in another order, and nothing else tells them apart.
    """
    if isinstance(plan.source, Single) and isinstance(plan.source.data, Indexable) and flows_of(plan)[-1].keyed:
        data = plan.source.data
        if isinstance(data.data, Files):
            first = f"samples by name of Files(read={data.data.read!r}, with_path={data.data.with_path})"
        elif data.load is None and isinstance(data.data, list | tuple):
            first = "samples by name"
        else:
            first = f"samples by index of {source_name(data.data)}({data.length})"
        changes = [stage.label for stage in plan.stages if not stage.keeps_samples]
        return " > ".join([first, *changes])
    return " > ".join(["samples by position", *_in_order(plan)])


def _in_order(plan: Plan) -> list[str]:
    """`plan` in words, if its epochs are all the same."""
    if isinstance(plan.source, Combined):
        if plan.source.how not in ("zip", "interleave"):
            raise ValueError(
                f"cache() after {plan.source.how}() cannot tell samples apart: they come in another order in each "
                f"epoch; put cache() into each of the pipelines that are combined"
            )
        words = [f"{plan.source.how}({', '.join(' > '.join(_in_order(part)) for part in plan.source.plans)})"]
    else:
        if plan.source.sampler is not None:
            raise ValueError(
                "cache() cannot tell samples apart here: the sampler may give another order in each epoch, and what is "
                "between it and cache() is more than map and filter; put cache() before that"
            )
        stream = plan.source.data.make if isinstance(plan.source.data, StreamData) else None
        if isinstance(stream, CursorSource) and not stream.same_each_epoch:
            raise ValueError(
                f"cache() cannot tell samples apart here: {source_name(stream)} gives them in another order in each "
                f"epoch; leave its shuffle=True out, and use shuffle(buffer_size) after cache()"
            )
        words = [describe_content(plan.source.data)]
    for stage in plan.stages:
        if not stage.same_each_epoch:
            raise ValueError(
                f"cache() after {stage.label} cannot tell samples apart: the next epoch may give others, or give them "
                f"in another order; put cache() before it"
            )
        if not stage.caches:
            words.append(stage.cache_label)
    return words
