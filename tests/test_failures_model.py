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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from aioloader import Hedge, Pipeline, Rate, Retry
from tests._support import FACES, Face, Started, until_no_task_left
from tests._virtual_loop import Clock, VirtualLoop, virtual_time

SEEDS = 400
"""Of `make test`; in blocks, so that a failure names a few."""

SOAK_SEEDS = 10_000
BLOCK = 25
TIMEOUT = 5.0
SOURCES = ("list", "list", "generator", "async generator", "two lists", "one of two fails")

Outcome: TypeAlias = "list[int] | tuple[str, int]"
"""A batch, or the type and the key of an error."""


class Busy(Exception):  # noqa: N818 - the model speaks of it as a value
    """What is retried."""


class Broken(Exception):  # noqa: N818
    """What is not."""


class Lost(Exception):  # noqa: N818
    """Of a source."""


LOST: Outcome = ("Lost", -1)


@dataclass(frozen=True)
class Work:
    """A `map`.

    Attributes:
        asynchronous: Its function is async.
        width: Its concurrency.
        attempts: Of `retry`; None: it is not given.
        retries_timeouts: They are in its `on`.
        timeout: It is given.
        hedge: Its `after`; None: it is not given. Then all calls for a sample come to the same.
        rate: Calls a second; None: it is not given.
        refuses: A filter follows.
    """

    asynchronous: bool
    width: int
    attempts: int | None
    retries_timeouts: bool
    timeout: bool
    hedge: float | str | None
    rate: float | None
    refuses: bool

    @classmethod
    def of(cls, draw: random.Random) -> "Work":
        asynchronous = draw.random() < 0.75
        return cls(
            asynchronous,
            draw.choice((1, 2, 3, 8, 30)),
            draw.choice((None, 1, 2, 3, 4)),
            draw.random() < 0.6,
            asynchronous and draw.random() < 0.5,
            draw.choice((None, None, 0.5, "p90")) if asynchronous else None,
            draw.choice((None, None, 2.0, 1000.0)),
            draw.random() < 0.3,
        )

    def may_try_again(self, fault: str, done: int) -> bool:
        """Whether there is another attempt after attempt `done` has come to `fault`."""
        tried = fault == "busy" or (fault == "hang" and self.retries_timeouts)
        return tried and done < (self.attempts or 1)

    @property
    def policies(self) -> dict[str, Any]:
        on = (Busy, TimeoutError) if self.retries_timeouts else Busy
        return {
            "retry": None if self.attempts is None else Retry(self.attempts, on, wait_initial=0.5, wait_max=3.0),
            "timeout": TIMEOUT if self.timeout else None,
            "hedge": None if self.hedge is None else Hedge(self.hedge, budget=1.0),
            "rate": None if self.rate is None else Rate(self.rate),
        }


@dataclass(frozen=True)
class Fate:
    """What becomes of a sample.

    Attributes:
        error: The name of its type; None: there is none.
        kept: No filter refuses it.
        retries: How often it is tried again, in all maps.
        timeouts: How many of its attempts take too long.
    """

    error: str | None = None
    kept: bool = True
    retries: int = 0
    timeouts: int = 0


@dataclass(frozen=True)
class Case:
    """A pipeline, drawn by its seed.

    Attributes:
        seed: What everything here is drawn from.
        samples: Of the source.
        source: A list, a generator, an async one, or two in turn, of which one may fail in its middle.
        works: The maps.
        ordered: Whether results come in the order of the input.
        requeue: Samples are sent back.
        cache: Samples are kept for the second epoch.
        skip: The types that `skip_errors` leaves out; None: the stage is not there.
        max_errors: Of `skip_errors`.
        size: Of a batch.
        drop_last: As of `batch`.
        prefetch: As the stage.
        staleness: As the stage; None: there is none.
    """

    seed: int
    samples: int
    source: str
    works: tuple[Work, ...]
    ordered: bool
    requeue: bool
    cache: bool
    skip: tuple[type[Exception], ...] | None
    max_errors: int | None
    size: int
    drop_last: bool
    prefetch: int
    staleness: int | None

    @classmethod
    def of(cls, seed: int) -> "Case":
        draw = random.Random(f"failures {seed}")
        ordered = draw.random() < 0.6
        skip = draw.choice((None, (Exception,), (Exception,), (Busy, TimeoutError), (Broken,)))
        all_skipped = skip == (Exception,)
        requeue = draw.random() < 0.25
        cached = ordered and not requeue and draw.random() < 0.3
        return cls(
            seed=seed,
            samples=draw.randrange(0, 30),
            source="list" if cached else draw.choice(SOURCES),
            works=tuple(Work.of(draw) for _ in range(draw.choice((1, 1, 2)))),
            ordered=ordered,
            requeue=requeue,
            cache=cached,
            skip=skip,
            max_errors=draw.choice((None, None, 0, 2)) if ordered else None,
            size=draw.choice((1, 2, 3, 5)) if ordered or all_skipped else 1,
            drop_last=ordered and draw.random() < 0.3,
            prefetch=draw.choice((0, 1, 2)),
            staleness=None if cached else draw.choice((None, None, 0, 1, 3)),
        )

    # -- what is decided about each sample -------------------------------------------------------------------------

    def fault(self, number: int, key: int, attempt: int) -> str:
        """What a call comes to."""
        work = self.works[number]
        if work.hedge is not None:
            attempt = 0
        chance = random.Random(f"{self.seed} {number} {key} {attempt}").random()
        if chance < 0.7:
            return "fast"
        if chance < 0.8:
            return "slow"
        if chance < 0.9:
            return "busy"
        return "hang" if work.timeout and chance < 0.96 else "broken"

    def refuses(self, number: int, key: int) -> bool:
        return self.works[number].refuses and random.Random(f"{self.seed} {number} {key} filter").random() < 0.25

    def sent_back(self, key: int) -> int:
        """How often."""
        return random.Random(f"{self.seed} {key} back").choice((0, 0, 1, 2)) if self.requeue else 0

    # -- the model ---------------------------------------------------------------------------------------------------

    def fate_of(self, key: int) -> Fate:
        retries = timeouts = 0
        for number, work in enumerate(self.works):
            attempt = 1
            while (fault := self.fault(number, key, attempt)) not in ("fast", "slow"):
                timeouts += fault == "hang"
                if not work.may_try_again(fault, attempt):
                    error = {"busy": "Busy", "broken": "Broken", "hang": "TimeoutError"}[fault]
                    return Fate(error, True, retries, timeouts)
                attempt += 1
                retries += 1
            if self.refuses(number, key):
                return Fate(None, False, retries, timeouts)
        return Fate(None, True, retries, timeouts)

    def is_skipped(self, fate: Fate) -> bool:
        names = [] if self.skip is None else [kind.__name__ for kind in self.skip]
        return fate.error is not None and (fate.error in names or "Exception" in names)

    def given(self) -> list[int]:
        """What the source gives; -1: it fails, and goes on."""
        if self.source != "one of two fails":
            return list(range(self.samples))
        fails_at = self.samples // 4
        found: list[int] = []
        for key in range(self.samples + 2):
            if key % 2 and key // 2 >= fails_at:
                found += [-1] if key // 2 == fails_at else []
            elif key < self.samples:
                found.append(key)
        return found

    def samples_out(self) -> tuple[list[int | tuple[str, int]], list[tuple[int, int]]]:
        """Of an epoch in order: what comes to `batch`, and what is reported, each with its attempts."""
        out: list[int | tuple[str, int]] = []
        reported: list[tuple[int, int]] = []
        for key in self.given():
            fate = self.fate_of(key)
            if key < 0:
                out.append(("Lost", -1))
            elif fate.error is None:
                if fate.kept:
                    out.append(key)
            elif not self.is_skipped(fate):
                out.append((fate.error, key))
            elif self.max_errors is not None and len(reported) >= self.max_errors:
                out.append(("TooManySkippedError", key))
            else:
                reported.append((key, 1 + fate.retries))
        return out, reported

    def outcomes(self) -> list[Outcome]:
        """Of an epoch in order."""
        samples, _ = self.samples_out()
        out: list[Outcome] = []
        batch: list[int | tuple[str, int]] = []
        for sample in [*samples, None]:
            if sample is not None and sample != LOST:
                batch.append(sample)
            full = len(batch) == self.size
            if full or (batch and not self.drop_last and (sample is None or sample == LOST)):
                failed = [sample for sample in batch if isinstance(sample, tuple)]
                out.append(failed[0] if failed else [sample for sample in batch if isinstance(sample, int)])
                batch = []
            if sample == LOST:
                out.append(("Lost", -1))
        failed = [sample for sample in batch if isinstance(sample, tuple)]
        return [*out, failed[0]] if failed else out


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


def check_outcomes(case: Case, outcomes: list[Outcome]) -> None:
    if case.ordered:
        assert outcomes == case.outcomes()
        return
    found = Counter(one for outcome in outcomes for one in ([outcome] if isinstance(outcome, tuple) else outcome))
    assert found == Counter(case.samples_out()[0])


def key_of(key: Any) -> Any:
    """In a report, of one of several sources or not."""
    return int(key.split()[0]) if isinstance(key, str) else key


def check_counts(case: Case, epochs: Epochs, report: Path) -> None:
    """Of a whole first epoch."""
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
        check_outcomes(case, outcomes)
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
