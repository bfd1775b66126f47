"""Flow against a plain model: random pipelines, lengths, failures and orders of completion; nothing lost, twice or old.

Each call of a map takes a random length of a virtual time: it stands until all that are shorter have gone on. So an
order of completions is a matter of the seed, and no test waits for a clock.
"""

import asyncio
import heapq
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from aioloader import Pipeline
from tests._support import DEADLINE, FACES, Face, Started, turns

SEEDS = 320
"""Of `make test`; in blocks, so that a failure names a few."""

SOAK_SEEDS = 20_000
BLOCK = 20


class VirtualTime:
    """Calls stand here until it is their turn: each for a time that is drawn by the seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._standing: list[tuple[float, int, Future[None]]] = []
        self._now = 0.0
        self._open = False
        self.news = threading.Event()  # a call has come, or the consumer is done

    def arrive(self) -> "Future[None]":
        """A call begins."""
        passed: Future[None] = Future()
        with self._lock:
            if self._open:
                passed.set_result(None)
                return passed
            length = self._random.choice((1.0, 1.0, 1.0, 30.0)) * self._random.random()
            heapq.heappush(self._standing, (self._now + length, next(self._numbers), passed))
        self.news.set()
        return passed

    async def passing(self) -> None:
        """Stand here, on the loop."""
        await asyncio.wait_for(asyncio.wrap_future(self.arrive()), DEADLINE)

    def pass_sync(self) -> None:
        """Stand here, in a thread."""
        self.arrive().result(DEADLINE)

    def go_on(self) -> bool:
        """Let the call go on that is first; whether there was one."""
        with self._lock:
            while self._standing:
                self._now, _, passed = heapq.heappop(self._standing)
                if passed.set_running_or_notify_cancel():
                    passed.set_result(None)
                    return True
        return False

    def open(self) -> None:
        """Nobody stands here any more."""
        self._open = True
        while self.go_on():
            pass


@dataclass(frozen=True)
class Case:
    """A pipeline, drawn by its seed.

    Attributes:
        seed: What everything here is drawn from.
        samples: Of the source.
        stream: The source has no keys.
        widths: The concurrency of each map.
        asynchronous: Of each map.
        ordered: Whether results come in the order of the input.
        ahead: `ahead` of the first map, beyond its width; None: the default.
        overtaken: `max_overtaken` of the first map.
        filters: Before the maps, between them, after them.
        requeue: Samples are sent back.
        drops: Samples are left out when their turn comes.
        fails: Calls fail.
        rounds: `repeat` before the batch; None: there is none.
        again: `repeat` after the batch.
        size: Of a batch.
        drop_last: As of `batch`.
        outer: Of batches of batches; None: there are none.
        take: Of samples; None: all.
        prefetch: As the stage.
        staleness: As the stage; None: there is none.
    """

    seed: int
    samples: int
    stream: bool
    widths: tuple[int, ...]
    asynchronous: tuple[bool, ...]
    ordered: bool
    ahead: int | None
    overtaken: int | None
    filters: tuple[bool, bool, bool]
    requeue: bool
    drops: bool
    fails: bool
    rounds: int | None
    again: int | None
    size: int
    drop_last: bool
    outer: int | None
    take: int | None
    prefetch: int
    staleness: int | None

    @classmethod
    def of(cls, seed: int) -> "Case":
        draw = random.Random(seed)

        def chance(share: float) -> bool:
            return draw.random() < share

        maps = draw.choice((1, 1, 2, 3))
        ordered = chance(0.6)
        return cls(
            seed=seed,
            samples=draw.randrange(0, 34),
            stream=chance(0.3),
            widths=tuple(draw.choice((1, 2, 3, 8, 40)) for _ in range(maps)),
            asynchronous=tuple(chance(0.8) for _ in range(maps)),
            ordered=ordered,
            ahead=draw.choice((None, None, 0, 1, 5)),
            overtaken=None if ordered or chance(0.5) else draw.choice((0, 1, 2, 5)),
            filters=(chance(0.15), chance(0.15), chance(0.3)),
            requeue=chance(0.4),
            drops=chance(0.15),
            fails=chance(0.3),
            rounds=draw.choice((None, None, None, None, 2, 3)),
            again=draw.choice((None, None, None, None, 2)),
            size=draw.choice((1, 2, 3, 4, 7)),
            drop_last=chance(0.3),
            outer=draw.choice((None, None, None, 2, 3)),
            take=draw.choice((None, None, None, 9)),
            prefetch=draw.choice((0, 1, 2, 2, 4)),
            staleness=draw.choice((None, 0, 0, 1, 1, 2, 4)),
        )

    # -- what is decided about each sample -------------------------------------------------------------------------

    def fate(self, key: int, what: str, share: float) -> bool:
        """Whether `what` happens to the sample `key`."""
        return random.Random(f"{self.seed} {key} {what}").random() < share

    def refused_by(self, key: int, place: int) -> bool:
        return self.filters[place] and self.fate(key, f"filter {place}", 0.3)

    def fails_in(self, key: int, number: int) -> bool:
        return self.fails and number < len(self.widths) and self.fate(key, f"map {number}", 0.06)

    def sent_back(self, key: int) -> int:
        """How often."""
        if not self.requeue or not isinstance(self.made_of(key), int):  # it never comes so far
            return 0
        return random.Random(f"{self.seed} {key} back").choice((0, 0, 1, 3))

    @property
    def per_batch(self) -> int:
        """Samples of what the consumer gets."""
        return self.size * (self.outer or 1)

    def leaves_unseen(self, *, resumed: bool) -> bool:
        """Whether samples make room of which no function here can tell."""
        if self.again is not None and (self.drop_last or self.take is not None):
            return True  # what is left over at the end of a round
        return resumed and self.filters[0] and not self.ordered  # what was delivered before; a filter sees it again

    # -- the model ---------------------------------------------------------------------------------------------------

    def outcome_of(self, key: int) -> Any:
        """The sample, its error, or None: it is left out."""
        made = self.made_of(key)
        return None if made == key and self.drops and self.fate(key, "drop", 0.2) else made

    def made_of(self, key: int) -> Any:
        """The same, but for those that `drop_if` leaves out."""
        if self.refused_by(key, 0):
            return None
        for number in range(len(self.widths)):
            if self.fails_in(key, number):
                return Failure(key)
            if not number and self.refused_by(key, 1):
                return None
        return None if self.refused_by(key, 2) else key

    def outcomes(self) -> list[Any]:
        """Of an epoch in order: batches as lists of keys, and failures."""
        samples = [outcome for key in range(self.samples) if (outcome := self.outcome_of(key)) is not None]
        if self.rounds is not None:
            samples *= self.rounds
        if self.take is not None:
            samples = samples[: self.take]
        out = self._batches(samples, self.size, self.drop_last)
        if self.again is not None:
            out *= self.again
        return out if self.outer is None else self._batches(out, self.outer, False)

    @staticmethod
    def _batches(samples: list[Any], size: int, drop_last: bool) -> list[Any]:
        out: list[Any] = []
        for at in range(0, len(samples), size):
            batch = samples[at : at + size]
            failed = [sample for sample in batch if isinstance(sample, Failure)]
            if failed:
                out.append(failed[0])
            elif len(batch) == size or not drop_last:
                out.append(batch)
        return out


class Failure(Exception):  # noqa: N818 - the model speaks of it as a value
    """Of the sample `key`."""

    @property
    def key(self) -> int:
        key: int = self.args[0]
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Failure) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


@dataclass
class Ledger:
    """What was begun, asked for and handed out; checks the bound whenever a sample begins.

    Args:
        staleness: As the stage; None: any number may begin.
        per_batch: Samples.

    Attributes:
        asked: Batches, in all. One that was asked for and given up is the next one that is asked for.
        waiting: Calls for them.
        handed: Batches.
        late: By how many batches a sample came later than in the newest one that it could begin for; less: earlier.
        broken: What went wrong.
    """

    staleness: int | None
    per_batch: int
    begun: int = 0
    gone: int = 0
    asked: int = 0
    waiting: int = 0
    handed: int = 0
    late: int = -1000
    broken: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)
    newest: dict[int, list[int]] = field(default_factory=dict)

    def begin(self, key: int) -> None:
        """A sample begins."""
        with self.lock:
            self.begun += 1
            self.newest.setdefault(key, []).append(self.asked - 1 + (self.staleness or 0))
            alive = self.begun - self.gone
            if self.staleness is not None:
                bound = (self.asked - self.handed + self.staleness) * self.per_batch
                if alive > bound:
                    self.broken.append(f"{alive} samples are alive, {bound} may be, when {key} begins")

    def left_out(self, key: int) -> None:
        """A sample is left out."""
        with self.lock:
            self.gone += 1
            self.newest[key].pop(0)

    def asks(self) -> None:
        with self.lock:
            self.waiting += 1
            self.asked = max(self.asked, self.handed + self.waiting)

    def gave_up(self) -> None:
        with self.lock:
            self.waiting -= 1

    def hand_out(self, keys: list[int], failed: bool) -> None:
        """A batch is handed out."""
        with self.lock:
            for key in keys:
                self.late = max(self.late, self.handed - self.newest[key].pop(0))
            self.gone += self.per_batch if failed else len(keys)
            self.handed += 1
            self.waiting -= 1


class Functions:
    """The functions of a case."""

    def __init__(self, case: Case, ledger: Ledger, time: VirtualTime) -> None:
        self.case = case
        self.ledger = ledger
        self.time = time
        self.attempts: Counter[int] = Counter()
        self._lock = threading.Lock()

    def _begins(self, key: int, number: int) -> None:
        if not number:
            with self._lock:
                first = not self.attempts[key] % (self.case.sent_back(key) + 1)
                self.attempts[key] += 1
            if first and not self.case.filters[0]:
                self.ledger.begin(key)
        if self.case.fails_in(key, number):
            raise Failure(key)

    def map(self, number: int) -> Callable[[int], Any]:
        async def rollout(key: int) -> int:
            self._begins(key, number)
            await self.time.passing()
            return key

        def decode(key: int) -> int:
            self._begins(key, number)
            self.time.pass_sync()
            return key

        return rollout if self.case.asynchronous[number] else decode

    def filter(self, place: int) -> Callable[[int], Any]:
        async def keep(key: int) -> bool:
            if not place:
                self.ledger.begin(key)
            refused = self.case.refused_by(key, place)
            if refused:
                self.ledger.left_out(key)
            return not refused

        return keep

    def refuses(self, key: int) -> bool:
        """Whether a sample is to be begun again."""
        with self._lock:
            return bool(self.attempts[key] % (self.case.sent_back(key) + 1))

    def drops(self, key: int) -> bool:
        """Whether a sample is left out when its turn comes."""
        dropped = self.case.fate(key, "drop", 0.2)
        if dropped:
            self.ledger.left_out(key)
        return dropped


def pipeline_of(case: Case, functions: Functions) -> Pipeline:
    """The pipeline of `case`."""
    keys = range(case.samples)
    pipeline: Pipeline = Pipeline((lambda: iter(keys)) if case.stream else keys)
    if case.filters[0]:
        pipeline = pipeline.filter(functions.filter(0))
    for number, width in enumerate(case.widths):
        first = not number
        pipeline = pipeline.map(
            functions.map(number),
            concurrency=width,
            ordered=case.ordered,
            ahead=width + case.ahead if first and case.ahead is not None else None,
            max_overtaken=case.overtaken if first else None,
        )
        if first and case.filters[1]:
            pipeline = pipeline.filter(functions.filter(1))
    if case.filters[2]:
        pipeline = pipeline.filter(functions.filter(2))
    if case.requeue:
        pipeline = pipeline.drop_if(functions.refuses, requeue=True)
    if case.drops:
        pipeline = pipeline.drop_if(functions.drops)
    if case.rounds is not None:
        pipeline = pipeline.repeat(case.rounds)
    if case.take is not None:
        pipeline = pipeline.take(case.take)
    pipeline = pipeline.batch(case.size, drop_last=case.drop_last, collate_fn=list)
    if case.again is not None:
        pipeline = pipeline.repeat(case.again)
    if case.outer is not None:
        pipeline = pipeline.batch(case.outer, collate_fn=list)
    pipeline = pipeline.prefetch(case.prefetch)
    return pipeline if case.staleness is None else pipeline.max_staleness(case.staleness)


def flat(outcome: Any) -> list[int]:
    """The keys in a batch, or in a batch of batches."""
    if isinstance(outcome, list):
        return [key for part in outcome for key in flat(part)]
    return [outcome]


class Epoch:
    """Runs one epoch, or a part of it, on one face."""

    def __init__(self, case: Case, state: str | None = None, *, stop_after: int | None = None) -> None:
        self.case = case
        self.time = VirtualTime(case.seed)
        self.ledger = Ledger(None if case.leaves_unseen(resumed=state is not None) else case.staleness, case.per_batch)
        self.functions = Functions(case, self.ledger, self.time)
        self.loader = pipeline_of(case, self.functions)
        self.outcomes: list[Any] = []
        self.state: dict[str, Any] = {}
        self._stop_after = stop_after
        self._over = False  # the consumer of `for` is done
        if state is not None:
            self.loader.load_state_dict(json.loads(state))

    def run(self, face: Face) -> "Epoch":
        if face == "for":
            self._run_sync()
        else:
            with asyncio.Runner() as runner:
                runner.run(self._run_async())
        assert not self.ledger.broken, self.ledger.broken[:3]
        return self

    @property
    def _done(self) -> bool:
        return self._stop_after is not None and len(self.outcomes) >= self._stop_after

    def _took(self, outcome: Any) -> None:
        failed = isinstance(outcome, Failure)
        self.ledger.hand_out([] if failed else flat(outcome), failed)
        self.outcomes.append(outcome)

    # -- for ---------------------------------------------------------------------------------------------------------

    def _run_sync(self) -> None:
        consumer = Started(self._consume)
        try:
            while not self._over:
                self.time.news.clear()
                if not self.time.go_on() and not self._over:
                    assert self.time.news.wait(DEADLINE), "the consumer waits, and no sample is under way"
        finally:
            self.time.open()
        consumer.outcome()

    def _consume(self) -> None:
        iterator = iter(self.loader)
        try:
            while not self._done:
                self.ledger.asks()
                try:
                    outcome = next(iterator)
                except StopIteration:
                    break
                except Failure as error:
                    outcome = error
                self._took(outcome)
            self.state = self.loader.state_dict()
        finally:
            self.time.open()
            self.loader.close()
            self._over = True
            self.time.news.set()

    # -- async for ---------------------------------------------------------------------------------------------------

    async def _run_async(self) -> None:
        draw = random.Random(f"{self.case.seed} consumer")
        iterator = aiter(self.loader)
        asks: list[asyncio.Task[bool]] = []
        over = False
        try:
            while not over and (asks or not self._done):
                wanted = draw.choice((1, 1, 1, 2, 3))
                while len(asks) < wanted and not self._enough(len(asks)):
                    asks.append(asyncio.ensure_future(self._ask(iterator)))
                await turns(12)
                self.time.news.clear()
                if not self.time.go_on() and asks:
                    await self._until_news(asks[0])
                if asks and draw.random() < 0.05:
                    asks[-1].cancel()
                    await asyncio.wait(asks[-1:])
                over = any(ask.result() for ask in asks if ask.done() and not ask.cancelled())
                asks = [ask for ask in asks if not ask.done()]
            self.state = self.loader.state_dict()
        finally:
            self.time.open()
            await self.loader.aclose()
            await asyncio.gather(*asks, return_exceptions=True)

    def _enough(self, asks: int) -> bool:
        return self._stop_after is not None and len(self.outcomes) + asks >= self._stop_after

    async def _until_news(self, ask: "asyncio.Task[Any]") -> None:
        """Wait until a call comes, of whatever thread, or the answer."""
        async with asyncio.timeout(DEADLINE):
            while not (self.time.news.is_set() or ask.done()):  # noqa: ASYNC110 - two of them, and one is a task
                await asyncio.sleep(0)

    async def _ask(self, iterator: Any) -> bool:
        """Take a batch; whether the epoch is over."""
        self.ledger.asks()
        try:
            outcome = await anext(iterator)
        except StopAsyncIteration:
            return True
        except Failure as error:
            outcome = error
        except asyncio.CancelledError:
            self.ledger.gave_up()
            raise
        self._took(outcome)
        return False


def check_all_there(case: Case, outcomes: list[Any]) -> None:
    """Nothing is lost, and nothing comes twice."""
    expected = case.outcomes()
    if case.ordered:
        assert outcomes == expected
        return
    samples = [outcome for key in range(case.samples) if (outcome := case.outcome_of(key)) is not None]
    samples *= (case.rounds or 1) * (case.again or 1)
    found = Counter(key for outcome in outcomes if not isinstance(outcome, Failure) for key in flat(outcome))
    whole = Counter(sample for sample in samples if not isinstance(sample, Failure))
    assert found <= whole, found - whole
    failed = sum(isinstance(outcome, Failure) for outcome in outcomes)
    exact = not (failed or case.drop_last or case.take is not None)
    if exact:
        assert found == whole, whole - found
    if not case.drop_last and case.again is None:
        assert len(outcomes) == len(expected)
    if not case.fails and not case.drop_last and case.take is None:
        assert found == whole


def check_ages(case: Case, epoch: Epoch) -> None:
    """No sample is older than allowed when its batch is given."""
    if epoch.ledger.staleness is None or case.fails:  # the ledger does not know which samples an error stands for
        return
    if case.ordered:
        assert epoch.ledger.late <= 0
    elif case.overtaken is not None and case.ahead is None and not case.requeue and case.again is None:
        most = case.per_batch * (epoch.ledger.staleness + 1) + case.overtaken - 1
        assert epoch.ledger.late <= most // case.per_batch - epoch.ledger.staleness


def check(seed: int, face: Face) -> None:
    """One case: a whole epoch, and one that is left and gone on with."""
    case = Case.of(seed)
    whole = Epoch(case).run(face)
    check_all_there(case, whole.outcomes)
    check_ages(case, whole)
    draw = random.Random(f"{seed} resume")
    stop = draw.randrange(0, len(whole.outcomes) + 1)
    first = Epoch(case, stop_after=stop).run(face)
    other = replace(
        case,
        seed=case.seed,
        widths=tuple(draw.choice((1, 3, 8)) for _ in case.widths),
        prefetch=draw.choice((0, 2)),
        staleness=draw.choice((case.staleness, 0, 2)),
    )
    if not 0 < len(first.outcomes) < len(whole.outcomes):
        return
    rest = Epoch(other, json.dumps(first.state)).run(draw.choice(FACES))
    check_all_there(case, first.outcomes + rest.outcomes)
    check_ages(other, rest)


def blocks(count: int) -> list[range]:
    return [range(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)]


@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
@pytest.mark.parametrize("seeds", blocks(SEEDS), ids=str)
def test_flow_is_that_of_the_model(seeds: range) -> None:
    """Whatever the stages, lengths, failures, and who asks when."""
    for seed in seeds:
        try:
            check(seed, FACES[seed % 2])
        except BaseException as error:
            error.add_note(f"{Case.of(seed)} by {FACES[seed % 2]!r}")
            raise


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")
@pytest.mark.parametrize("seeds", blocks(SOAK_SEEDS), ids=str)
def test_flow_is_that_of_the_model_for_long(seeds: range) -> None:
    """The same, on both faces, for thousands."""
    for seed in seeds:
        for face in FACES:
            check(SEEDS + seed, face)
