"""Failures against a plain model: random pipelines, faults, policies, cancels, breaks and resumes, on both faces.

Nothing is lost, repeated or reordered; each sample ends as given, raised or reported, once. Time is virtual, so calls
that hang and waits of hours cost nothing.
"""

import asyncio
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioloader import Pipeline
from tests._failures_model import LOST, Broken, Busy, Case, Lost, Outcome
from tests._support import FACES, Face, Started, until_no_task_left
from tests._virtual_loop import Clock, VirtualLoop, virtual_time

SEEDS = 400
"""Of `make test`; in blocks, so that a failure names a few."""

SOAK_SEEDS = 10_000
BLOCK = 25


class Functions:
    """The functions of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._attempts: Counter[tuple[int, int]] = Counter()
        self._passes: Counter[int] = Counter()
        self._lock = threading.Lock()
        self.called: set[int] = set()

    def _begins(self, number: int, key: int) -> str:
        """A call begins; what it comes to."""
        with self._lock:
            self.called.add(key)
            self._attempts[number, key] += 1
            attempt = self._attempts[number, key]
            fault = self.case.fault(number, key, attempt)
            if not self.case.works[number].may_try_again(fault, attempt):
                del self._attempts[number, key]  # what comes next is another journey
        if fault == "busy":
            raise Busy
        if fault == "broken":
            raise Broken
        return fault

    def map(self, number: int) -> Callable[[int], Any]:
        async def fetch(key: int) -> int:
            draw = random.Random(f"{self.case.seed} {number} {key} time")
            await asyncio.sleep(draw.choice((0.0, 0.01, 0.2)))
            fault = self._begins(number, key)
            if fault == "hang":
                await asyncio.get_running_loop().create_future()
            elif fault == "slow":
                await asyncio.sleep(draw.uniform(0.5, 1.5))
            return key

        def decode(key: int) -> int:
            self._begins(number, key)
            return key

        return fetch if self.case.works[number].asynchronous else decode

    def keeps(self, number: int) -> Callable[[int], bool]:
        return lambda key: not self.case.refuses(number, key)

    def refuses(self, key: int) -> bool:
        """Whether a sample is to be begun again."""
        with self._lock:
            self._passes[key] += 1
            return bool((self._passes[key] - 1) % (self.case.sent_back(key) + 1) < self.case.sent_back(key))


def source_of(case: Case) -> Pipeline:
    keys = range(case.samples)
    if case.source == "one of two fails":

        async def broken() -> Any:  # not in a thread, whose five seconds for closing would be over at once
            for key in case.given():
                if key % 2 and key >= 0:
                    yield key
            raise Lost

        return Pipeline.interleave(list(keys[::2]) or Pipeline(lambda: iter(())), broken)
    if case.source == "list":
        return Pipeline(list(keys))
    if case.source == "two lists" and case.samples:
        return Pipeline.interleave(list(keys[::2]), list(keys[1::2])) if case.samples > 1 else Pipeline(list(keys))
    if case.source == "generator":
        return Pipeline(lambda: iter(keys))

    async def generate() -> Any:
        for key in keys:
            await asyncio.sleep(0)
            yield key

    return Pipeline(generate)


def pipeline_of(case: Case, functions: Functions, report: Path | None) -> Pipeline:
    pipeline = source_of(case)
    for number, work in enumerate(case.works):
        pipeline = pipeline.map(functions.map(number), concurrency=work.width, ordered=case.ordered, **work.policies)
        if work.refuses:
            pipeline = pipeline.filter(functions.keeps(number))
    if case.requeue:
        pipeline = pipeline.drop_if(functions.refuses, requeue=True)
    if case.cache:
        pipeline = pipeline.cache(memory_bytes=1 << 20)
    if case.skip is not None:
        name = None if report is None else str(report)
        pipeline = pipeline.skip_errors(case.skip, max_errors=case.max_errors, max_share=None, report=name)
    pipeline = pipeline.batch(case.size, drop_last=case.drop_last, collate_fn=list).prefetch(case.prefetch)
    return pipeline if case.staleness is None else pipeline.max_staleness(case.staleness)


_KEY = re.compile(r"aioloader: stage .*?, key (\d+)")


def named(error: Exception) -> tuple[str, int]:
    """The type and the key of an error."""
    if isinstance(error, Lost):
        return "Lost", -1
    keys = [match[1] for note in getattr(error, "__notes__", ()) if (match := _KEY.match(note))]
    assert keys, f"{error!r} names no sample: {getattr(error, '__notes__', ())}"
    return type(error).__name__, int(keys[-1])


class Epochs:
    """Runs epochs of one loader, or a part of the first one, on one face."""

    def __init__(self, case: Case, clock: Clock, state: str | None = None, *, report: Path | None = None) -> None:
        self.case = case
        self.clock = clock
        self.functions = Functions(case)
        self.loader = pipeline_of(case, self.functions, report)
        if state is not None:
            self.loader.load_state_dict(json.loads(state))

    def run(self, face: Face, stop: int | None = None) -> tuple[list[Outcome], str]:
        """The outcomes of an epoch, at most `stop`, and the state after them."""
        if face == "for":
            done: tuple[list[Outcome], str] = Started(lambda: self._for(stop)).outcome()
            return done
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(self.clock)) as runner:
            return runner.run(self._async_for(stop))

    def _for(self, stop: int | None) -> tuple[list[Outcome], str]:
        outcomes: list[Outcome] = []
        iterator = iter(self.loader)
        while stop is None or len(outcomes) < stop:
            try:
                outcomes.append(next(iterator))
            except StopIteration:
                break
            except Exception as error:
                outcomes.append(named(error))
        state = json.dumps(self.loader.state_dict())
        if stop is not None:
            self.loader.close()
        return outcomes, state

    async def _async_for(self, stop: int | None) -> tuple[list[Outcome], str]:
        outcomes: list[Outcome] = []
        draw = random.Random(f"{self.case.seed} consumer")
        iterator = aiter(self.loader)
        while stop is None or len(outcomes) < stop:
            asked = asyncio.ensure_future(anext(iterator))
            if draw.random() < 0.2:
                for _ in range(draw.choice((1, 3, 20))):
                    await asyncio.sleep(draw.choice((0.0, 0.3)))
                asked.cancel()
                await asyncio.wait({asked})
                if asked.cancelled():
                    continue
            try:
                outcomes.append(await asked)
            except StopAsyncIteration:
                break
            except Exception as error:
                outcomes.append(named(error))
        state = json.dumps(self.loader.state_dict())
        if stop is not None:
            await self.loader.aclose()
        await until_no_task_left({asyncio.current_task()})
        loop: Any = asyncio.get_running_loop()
        names = [str(getattr(timer._args[0], "__qualname__", timer)) for timer in loop.timers]
        left = [name for name in names if not name.endswith(("._look", "._look_again"))]  # those ring in 2 ms
        assert not left, f"timers are left: {left}"
        return outcomes, state

    def stat(self, name: str) -> int:
        return sum(getattr(stage, name) for stage in self.loader.stats().stages)


def check_possible(case: Case, outcomes: list[Outcome], reported: set[int] | None) -> None:
    """Each sample ends once, in a way that is possible where a budget may refuse retries.

    Args:
        case: The case.
        outcomes: Of one epoch.
        reported: Those that were skipped; None: nobody has counted.
    """
    ends: list[tuple[str, int]] = []
    for outcome in outcomes:
        ends += [outcome] if isinstance(outcome, tuple) else [("given", key) for key in outcome]
    found = {key: how for how, key in ends}
    assert len(found) == len(ends), "a sample comes twice"
    if case.ordered:
        assert [key for _, key in ends if key >= 0] == sorted(key for _, key in ends if key >= 0)
    for key in case.given():
        if key < 0:
            assert found[key] == "Lost"
            continue
        possible = case.possible(key)
        if key in found:
            assert found[key] in possible
            assert reported is None or key not in reported
        elif reported is not None and key in reported:
            assert possible - {"given", "refused"}
        else:
            assert "refused" in possible or (reported is None and case.skip is not None and possible != {"given"})


def check_outcomes(case: Case, outcomes: list[Outcome], reported: set[int] | None = None) -> None:
    if not case.exact:
        check_possible(case, outcomes, reported)
        return
    if case.ordered:
        assert outcomes == case.outcomes()
        return
    found = Counter(one for outcome in outcomes for one in ([outcome] if isinstance(outcome, tuple) else outcome))
    assert found == Counter(case.samples_out()[0])


def key_of(key: Any) -> Any:
    """In a report, of one of several sources or not."""
    return int(key.split()[0]) if isinstance(key, str) else key


def reported_in(report: Path) -> set[int]:
    """The samples that were left out."""
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    keys = [key_of(line["key"]) for line in lines]
    assert len(keys) == len(set(keys)), "a sample is reported twice"
    return set(keys)


def check_counts(case: Case, epochs: Epochs, report: Path) -> None:
    """Of a whole first epoch."""
    if not case.exact:
        return
    if case.requeue or any(work.hedge is not None for work in case.works):
        return  # more calls than the model makes
    fates = [case.fate_of(key) for key in case.given() if key >= 0]
    assert epochs.stat("retries") == sum(fate.retries for fate in fates)
    assert epochs.stat("timeouts") == sum(fate.timeouts for fate in fates)
    if case.skip is not None:
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        assert sorted((key_of(line["key"]), line["attempts"]) for line in lines) == sorted(case.samples_out()[1])
        assert epochs.stat("skipped") == len(lines)


def check(seed: int, face: Face, folder: Path) -> None:
    """One case: two whole epochs, and one that is left and gone on with."""
    case = Case.of(seed)
    draw = random.Random(f"{seed} resume")
    report = folder / f"{seed} by {face}.jsonl"
    with virtual_time() as clock:
        whole = Epochs(case, clock, report=report)
        outcomes, _ = whole.run(face)
        check_outcomes(case, outcomes, reported_in(report))
        check_counts(case, whole, report)
        if case.cache:
            again, _ = whole.run(face)
            check_outcomes(case, again)
        whole.loader.close()
        if len(outcomes) < 2 or LOST in outcomes:  # a resume tries a source again that has failed
            return
        first, state = Epochs(case, clock).run(face, draw.randrange(1, len(outcomes)))
        resumed = Epochs(case, clock, state)
        rest, _ = resumed.run(draw.choice(FACES))
        check_outcomes(case, first + rest)
        if case.ordered and isinstance(first[-1], list):  # what was skipped before it is not tried again
            assert min(resumed.functions.called, default=first[-1][-1] + 1) > first[-1][-1]


def blocks(count: int) -> list[range]:
    return [range(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)]


@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
@pytest.mark.parametrize("seeds", blocks(SEEDS), ids=str)
def test_failures_are_those_of_the_model(seeds: range, tmp_path: Path) -> None:
    """Whatever the stages, faults, policies, and who gives up when."""
    for seed in seeds:
        try:
            check(seed, FACES[seed % 2], tmp_path)
        except BaseException as error:
            error.add_note(f"{Case.of(seed)} by {FACES[seed % 2]!r}")
            raise


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
@pytest.mark.parametrize("seeds", blocks(SOAK_SEEDS), ids=str)
def test_failures_are_those_of_the_model_for_long(seeds: range, tmp_path: Path) -> None:
    """The same, on both faces, for thousands."""
    for seed in seeds:
        for face in FACES:
            check(SEEDS + seed, face, tmp_path)
