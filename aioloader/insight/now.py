"""What the consumer waits for now, in words: for an epoch that is too young for averages, and when nothing comes."""

from collections.abc import Iterator
from typing import Final

from aioloader.insight.explain_policies import per_second
from aioloader.insight.stats import StageStats, Stats

__all__ = ["now", "stands_still"]

LONG_SECONDS: Final = 1.0  # a shorter wait is not worth a word, when there are averages
LONG: Final = 5  # times as long as a batch took before
MOST: Final = 3  # stages that are named


def stands_still(stats: Stats) -> bool:
    """Whether the consumer waits for a batch, and for much longer than for those before."""
    if not stats.batches:
        return stats.waiting_seconds > 0
    each = (stats.seconds - stats.waiting_seconds) / stats.batches
    return stats.waiting_seconds >= max(LONG_SECONDS, LONG * each)


def now(stats: Stats) -> str | None:
    """Say what is under way since when, what a predicate has left out, and which source gives nothing.

    Returns:
        A sentence; None if there is nothing to say.
    """
    at_work = [*_left_out(stats), *_under_way(stats), *_wait_for_policies(stats)]
    sources = [stage for stage in stats.stages if _is_source(stage) and stage.under_way]
    numbers = f"({_many(stats.batches, 'batch', 'batches')} in {stats.seconds:.2f} s)"
    if stats.waiting_for_ranks:
        at_work.insert(
            0, "this rank waits for the others, one of which has not asked for its batch yet or has none ready"
        )
    if stats.paused:
        at_work.insert(0, "the loader is paused, and no sample begins")
    if sources and not at_work and all(stage.live for stage in sources):
        whose = "The source is" if len(sources) == 1 else "The sources are"
        since = "; ".join(_gives_nothing(stage, named=len(sources) > 1) for stage in sources)
        return f"{whose} idle: {since}; nothing in the loader is the limit {numbers}."
    if at_work:  # then a source is only worth a word if it takes long
        sources = [stage for stage in sources if stage.oldest_seconds >= LONG_SECONDS]
    if not (facts := [*at_work, *(_gives_nothing(stage, named=True) for stage in sources)]):
        return None
    if stats.batches < 2:
        begin = "Only one batch has come so far" if stats.batches else "No batch has come yet"
    else:
        begin = f"No batch has come for {stats.waiting_seconds:.1f} s"
    return f"{begin}: {'; '.join(facts)} {numbers}."


def _left_out(stats: Stats) -> Iterator[str]:
    """Predicates that have let nothing pass."""
    for stage in stats.stages:
        names = [part for part in stage.name.split(" + ") if part.startswith(("filter(", "drop_if("))]
        if names and stage.dropped and not stats.batches and stage.dropped + stage.errors >= stage.samples:
            how = "sent back" if "requeue=True" in names[-1] else "left out"
            which = f"all {stage.dropped:,} samples" if stage.dropped > 1 else "the only sample"
            yield f"{' + '.join(names)} has {how} {which} so far"


def _under_way(stats: Stats) -> Iterator[str]:
    """Stages that are at work, first the one that has been so longest."""
    at_work = [stage for stage in stats.stages if stage.under_way and not _is_source(stage)]
    for stage in sorted(at_work, key=lambda stage: -stage.oldest_seconds)[:MOST]:
        of_batches = stage.oldest_key.startswith("[")
        what = _many(stage.under_way, *(("batch", "batches") if of_batches else ("sample", "samples")))
        has = "has" if stage.under_way == 1 else "have"
        said = f"{what} {has} been under way in {stage.name} for {stage.oldest_seconds:.1f} s"
        if stage.oldest_key:
            which = f"keys {stage.oldest_key}" if of_batches else f"key {stage.oldest_key}"
            said += f", {which}" if stage.under_way == 1 else f", the oldest is {which}"
        yield said


def _wait_for_policies(stats: Stats) -> Iterator[str]:
    """Samples that nobody works on, since they wait for their next attempt or for a rate; and for second calls."""
    for stage in stats.stages:
        if (policies := stage.policies) is None:
            continue
        if count := policies.waiting_for_attempt:
            what = _many(count, "sample waits for its next attempt", "samples wait for their next attempts")
            after = f" (mostly after {policies.retried_after})" if policies.retried_after else ""
            if policies.next_attempt_seconds is None:
                yield f"{what} in {stage.name}{after}"
            else:
                first = "" if count == 1 else "the first "
                yield f"{what} in {stage.name}, {first}in {policies.next_attempt_seconds:.1f} s{after}"
        if count := policies.waiting_for_rate:
            what = _many(count, "sample waits", "samples wait")
            yield f"{what} for the rate of {stage.name}, which is {per_second(policies)}"
        if count := policies.waiting_for_second_call:
            yield (
                f"{_many(count, 'second call finds', 'second calls find')} no place in {stage.name}, whose "
                f"{stage.concurrency} are taken: only a timeout ends calls that hang"
            )


def _gives_nothing(stage: StageStats, *, named: bool) -> str:
    """Of a source that is being read."""
    what = "no sample" if stage.samples else "nothing"
    whence = f" from {stage.name}" if named or not stage.samples else ""
    return f"{what} has come{whence} for {stage.oldest_seconds:.1f} s"


def _is_source(stage: StageStats) -> bool:
    """Whether it has no samples at hand, as `flat_map` has, which is read likewise."""
    return stage.kind == "source" and not stage.oldest_key


def _many(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"
