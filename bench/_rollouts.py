"""A trainer and an inference engine for `bench.flow`, both of which only wait: what is generated for nothing.

A prompt is answered by a group of rollouts. Groups take unequal times, and some of them have no variance in their
rewards and teach nothing. The trainer's version counts its updates; a group is as old as there were updates from its
beginning until it is trained on.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from aioloader import ChannelClosedError, Pipeline
from aioloader.sources import Channel

__all__ = ["BATCH", "SHAPES", "STALENESS", "WITHOUT_VARIANCE", "Outcome", "Shape", "run"]

BATCH: Final = 8
STALENESS: Final = 1
CONCURRENCY: Final = 16
WITHOUT_VARIANCE: Final = 0.43
WARM_UP: Final = 4  # updates that do not count: until then as much is begun as there is room for
OLDEST_OVERTAKEN: Final = (BATCH * (STALENESS + 1) + BATCH - 1) // BATCH  # with `max_overtaken=BATCH`
LONGEST: Final = 8.0  # groups take at most so many times the usual


@dataclass
class Group:
    """The rollouts for one prompt.

    Attributes:
        version: Of the policy when it was begun.
        varied: Whether its rewards differ.
    """

    version: int
    varied: bool


@dataclass
class Engine:
    """Generates groups, and is told of updates.

    Attributes:
        seconds: What a group takes, at the median.
        version: How many updates there were.
        begun: How many groups were begun.
    """

    seconds: float
    seed: int
    version: int = 0
    begun: int = 0
    _numbers: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = random.Random(self.seed)

    async def rollout(self, _prompt: int) -> Group:
        """A group for a prompt; its length is that of its longest answer, which has a long tail."""
        self.begun += 1
        group = Group(self.version, self._numbers.random() >= WITHOUT_VARIANCE)
        await asyncio.sleep(self.seconds * min(LONGEST, self._numbers.lognormvariate(0, 0.6)))
        return group

    def is_stale(self, group: Group) -> bool:
        return self.version - group.version > STALENESS


def has_variance(group: Group) -> bool:
    return group.varied


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        per_trained: Groups begun for each one that was trained on.
        oldest: The most updates between the beginning of a group and the update that it was trained in.
        seconds: Of an update, with the wait for its batch.
    """

    per_trained: float
    oldest: int
    seconds: float


@dataclass
class Trainer:
    """Takes batches, and counts what they are made of."""

    engine: Engine
    step_seconds: float
    steps: int
    oldest: int = 0
    _began: float = 0.0
    _begun: int = 0

    def update(self, batch: list[Group]) -> bool:
        """After an update on `batch`; true when there were enough."""
        engine = self.engine
        self.oldest = max(self.oldest, *(engine.version - group.version for group in batch))
        engine.version += 1
        if engine.version == WARM_UP:
            self._began, self._begun = time.perf_counter(), engine.begun
        return engine.version == WARM_UP + self.steps

    def outcome(self) -> Outcome:
        seconds = (time.perf_counter() - self._began) / self.steps
        return Outcome((self.engine.begun - self._begun) / (self.steps * BATCH), self.oldest, seconds)


async def _train(loader: Pipeline, trainer: Trainer) -> Outcome:
    async with loader:
        async for batch in loader:
            await asyncio.sleep(trainer.step_seconds)
            if trainer.update(batch):
                return trainer.outcome()
    raise RuntimeError("the prompts are endless")


def _train_by_for(loader: Pipeline, trainer: Trainer) -> Outcome:
    with loader:
        for batch in loader:
            time.sleep(trainer.step_seconds)
            if trainer.update(batch):
                return trainer.outcome()
    raise RuntimeError("the prompts are endless")


Make = Callable[[Engine], Pipeline]


@dataclass(frozen=True)
class Shape:
    """One way to write the loop.

    Attributes:
        train: Trains once.
        oldest: How old a group that is trained on may be; None: it is not bounded.
    """

    train: Callable[[Trainer], Outcome]
    oldest: int | None


def _maps(make: Make, *, oldest: int | None = STALENESS, by_for: bool = False) -> Shape:
    """Prompts are a source, a group is a map."""

    def train(trainer: Trainer) -> Outcome:
        loader = make(trainer.engine)
        return _train_by_for(loader, trainer) if by_for else asyncio.run(_train(loader, trainer))

    return Shape(train, oldest)


def _rollouts(engine: Engine, *, ordered: bool = True, max_overtaken: int | None = None) -> Pipeline:
    """Groups with variance, from prompts without end."""
    prompts = Pipeline(range(1 << 40))
    groups = prompts.map(engine.rollout, concurrency=CONCURRENCY, ordered=ordered, max_overtaken=max_overtaken)
    return groups.filter(has_variance)


def _batches(groups: Pipeline) -> Pipeline:
    return groups.batch(BATCH, collate_fn=list)


def _unbounded(engine: Engine) -> Pipeline:
    return _batches(_rollouts(engine))


def _dropping(engine: Engine) -> Pipeline:
    return _batches(_rollouts(engine).drop_if(engine.is_stale)).prefetch(0)


def _admitting(engine: Engine) -> Pipeline:
    return _batches(_rollouts(engine)).max_staleness(STALENESS)


def _admitting_in_completion_order(engine: Engine) -> Pipeline:
    return _batches(_rollouts(engine, ordered=False)).max_staleness(STALENESS)


def _overtaking(engine: Engine) -> Pipeline:
    return _batches(_rollouts(engine, ordered=False, max_overtaken=BATCH)).max_staleness(STALENESS)


def _requeuing(engine: Engine) -> Pipeline:
    """Without `prefetch(0)` a batch would be put together during the update before its own, and be older by one."""
    groups = _rollouts(engine, ordered=False).drop_if(engine.is_stale, requeue=True)
    return _batches(groups).max_staleness(STALENESS).prefetch(0)


Worker = Callable[[Engine, Channel], Awaitable[None]]


async def _generate_then_send(engine: Engine, channel: Channel) -> None:
    while True:
        group = await engine.rollout(0)
        if group.varied:
            await channel.send(group)  # waits with a group that is getting old


async def _reserve_then_generate(engine: Engine, channel: Channel) -> None:
    while True:
        async with await channel.reserve() as slot:
            group = await engine.rollout(0)
            if group.varied:
                slot.send(group)


def _sends(worker: Worker, places: int) -> Shape:
    """Workers send groups into a channel, and stale ones are dropped when they are taken out."""

    async def work(engine: Engine, channel: Channel) -> None:
        try:
            await worker(engine, channel)
        except ChannelClosedError:  # the trainer has had enough
            return

    async def run_all(trainer: Trainer) -> Outcome:
        engine = trainer.engine
        channel = Channel(places)
        workers = [asyncio.create_task(work(engine, channel)) for _ in range(CONCURRENCY)]
        groups = Pipeline(channel).drop_if(engine.is_stale)
        async with channel:
            outcome = await _train(_batches(groups).prefetch(0), trainer)
        await asyncio.gather(*workers)
        return outcome

    return Shape(lambda trainer: asyncio.run(run_all(trainer)), STALENESS)


SHAPES: Final[dict[str, Shape]] = {
    "filter, nothing about staleness": _maps(_unbounded, oldest=None),
    "filter + drop_if, no admission": _maps(_dropping),
    "filter + max_staleness(1)": _maps(_admitting),
    "filter + max_staleness(1), for": _maps(_admitting, by_for=True),
    "filter + max_staleness(1), completion order": _maps(_admitting_in_completion_order, oldest=None),
    f"filter + max_staleness(1), max_overtaken={BATCH}": _maps(_overtaking, oldest=OLDEST_OVERTAKEN),
    "filter + max_staleness(1) + requeue, completion order": _maps(_requeuing),
    "filter + max_staleness(1) + requeue, completion order, for": _maps(_requeuing, by_for=True),
    "generate, then send into Channel(256)": _sends(_generate_then_send, 256),
    "generate, then send into Channel(1)": _sends(_generate_then_send, 1),
    "reserve a place in Channel(8), then generate": _sends(_reserve_then_generate, BATCH),
}
"""The shapes by their names in the table."""


def run(shape: Shape, *, group_seconds: float, step_seconds: float, steps: int, seed: int) -> Outcome:
    """Train once.

    Args:
        shape: One of `SHAPES`.
        group_seconds: What generating a group takes, at the median.
        step_seconds: What an update takes.
        steps: Updates.
        seed: Of the groups' lengths and variances.
    """
    return shape.train(Trainer(Engine(group_seconds, seed), step_seconds, steps))
