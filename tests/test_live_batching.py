"""Batches of live data: given when their time is up, and without what has become worthless while it waited.

Time stands still in these tests: the loops have a clock that a test moves.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioloader import Pipeline
from aioloader.core.entry import DONE, LAST, Entry
from aioloader.engine import loop_thread
from aioloader.engine.node import Kick, Node, TimedFoldNode
from aioloader.sources import Channel
from aioloader.stages.batch import BatchFold
from aioloader.testing import Gate
from tests._support import Face, Steps, collect, on_both_faces


class StoppedClock:
    """What all loops of a test read; it goes on by `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.loops: list[asyncio.AbstractEventLoop] = []

    def new_loop(self) -> asyncio.AbstractEventLoop:
        loop = _StoppedLoop(self)
        self.loops.append(loop)
        return loop

    def advance(self, seconds: float) -> None:
        """Let timers ring that are due then."""
        self.now += seconds
        for loop in self.loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda: None)  # it looks at its timers

    def timers(self) -> int:
        """How many of batches are armed."""
        return sum(
            not handle.cancelled() and bool(handle._args) and "_rung" in handle._args[0].__name__
            for loop in self.loops
            for handle in list(loop._scheduled)  # type: ignore[attr-defined]
        )


class _StoppedLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: StoppedClock) -> None:
        self._stopped_clock = clock
        super().__init__()

    def time(self) -> float:
        return self._stopped_clock.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    """The clock of the private loops of `for`, too."""
    clock = StoppedClock()
    monkeypatch.setattr(loop_thread, "new_event_loop", clock.new_loop)
    return clock


class Live:
    """A loader over a channel, moved step by step, with its clock."""

    def __init__(
        self, clock: StoppedClock, face: Face, describe: Callable[[Channel, Callable[..., Any]], Pipeline]
    ) -> None:
        self.channel = Channel(1000)
        self.clock = clock
        self.made: list[Any] = []  # batches that were collated
        self.collating = Gate()
        self.collating.open_all()
        self.loader = describe(self.channel, self.collate)
        self.steps = Steps(self.loader, face, loop_factory=clock.new_loop)

    def collate(self, samples: list[Any]) -> list[Any]:
        self.made.append(samples)
        self.collating.pass_sync(len(self.made))
        return samples

    def __enter__(self) -> "Live":
        self.steps.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.steps.__exit__(*error)

    def send(self, *samples: Any) -> None:
        for sample in samples:
            self.channel.send_nowait(sample)
        self.settle()

    def settle(self) -> None:
        loops = [loop for loop in self.clock.loops if not loop.is_closed()]
        for _ in range(3):
            if loops:
                self.steps.settle(loops[-1])

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    def next(self) -> Any:
        return self.steps.next()


def timed(size: int, **options: Any) -> Callable[[Channel, Callable[..., Any]], Pipeline]:
    return lambda channel, collate: Pipeline(channel).batch(size, max_wait=5, collate_fn=collate, **options)


@on_both_faces
def test_a_batch_is_given_when_its_time_is_up(clock: StoppedClock, face: Face) -> None:
    """Counted from its first sample; not a moment earlier, and with what had come by then."""
    with Live(clock, face, timed(3)) as live:
        live.send(0, 1, 2)
        assert live.next() == [0, 1, 2]
        live.send(3)
        live.advance(4)
        live.send(4)
        live.advance(0.9)
        assert live.made == [[0, 1, 2]]
        live.advance(0.1)
        assert live.next() == [3, 4]
        live.advance(100)
        assert live.made == [[0, 1, 2], [3, 4]]  # there is no empty batch
        live.send(5)
        live.advance(5)
        assert live.next() == [5]
        live.channel.close()
        assert live.steps.rest() == []
    stage = live.loader.stats().stages[1]
    assert (stage.name, stage.kind, stage.samples, stage.partial) == ("batch(3, max_wait=5)", "fold", 3, 2)


@on_both_faces
def test_a_full_batch_does_not_wait_and_the_next_has_its_own_time(clock: StoppedClock, face: Face) -> None:
    """The timer that was armed for one batch goes on to the next, by the time of that one's first sample."""
    with Live(clock, face, timed(2)) as live:
        live.send(0)
        live.channel.send_nowait(1)
        assert live.next() == [0, 1]
        live.send(2)
        live.advance(3)
        live.send(3)
        assert live.next() == [2, 3]
        live.send(4)
        live.advance(4.9)  # the timer of 2 rang meanwhile
        assert live.made[2:] == []
        live.advance(0.1)
        assert live.next() == [4]
        live.channel.close()
        assert live.steps.rest() == []


@on_both_faces
def test_the_consumer_may_be_late(clock: StoppedClock, face: Face) -> None:
    """While there is no room for a batch, its time passes; what has come meanwhile fills it up."""
    with Live(clock, face, lambda channel, collate: timed(3)(channel, collate).prefetch(1)) as live:
        live.send(0, 1, 2, 3, 4, 5, 6)
        assert live.next() == [0, 1, 2]
        live.settle()
        live.advance(50)
        live.send(7)
        live.advance(50)
        live.send(8)
        assert live.made == [[0, 1, 2], [3, 4, 5]]
        assert live.next() == [3, 4, 5]
        live.settle()
        assert live.made[2:] == [[6, 7, 8]]
        assert live.next() == [6, 7, 8]
        live.channel.close()
        assert live.steps.rest() == []


@on_both_faces
def test_without_prefetch_the_time_counts_all_the_same(clock: StoppedClock, face: Face) -> None:
    """`prefetch(0)`: the consumer waits in `next()` when the time is up."""
    live = Live(clock, face, lambda channel, collate: timed(3)(channel, collate).prefetch(0))
    with live:
        live.channel.send_nowait(0)

        def ring() -> None:
            while not clock.timers():
                stop.wait(0.001)
            clock.advance(5)

        stop = threading.Event()
        ringing = threading.Thread(target=ring, name="test")
        ringing.start()
        assert live.next() == [0]
        ringing.join()
        live.channel.close()
        assert live.steps.rest() == []


@on_both_faces
def test_drop_last_is_about_the_end(clock: StoppedClock, face: Face) -> None:
    """What time cuts short is given; what the end of the source cuts short is not."""
    with Live(clock, face, timed(3, drop_last=True)) as live:
        live.send(0, 1, 2, 3)
        assert live.next() == [0, 1, 2]
        live.advance(5)
        assert live.next() == [3]
        live.send(4)
        live.channel.close()
        assert live.steps.rest() == []


@on_both_faces
def test_no_timer_outlives_the_epoch(clock: StoppedClock, face: Face) -> None:
    """Closed in the middle of a batch: the loop holds nothing of it."""
    with Live(clock, face, timed(3)) as live:
        live.send(0, 1, 2, 3)
        assert live.next() == [0, 1, 2]
        live.settle()
        assert clock.timers() == 1
        if face == "for":
            live.loader.close()
        else:
            live.steps.do(live.loader.aclose)
        assert clock.timers() == 0


@on_both_faces
def test_a_failed_sample_fails_its_short_batch(clock: StoppedClock, face: Face) -> None:
    """At its place, when its time is up."""

    def decode(sample: int) -> int:
        return 1 // sample

    def describe(channel: Channel, collate: Callable[..., Any]) -> Pipeline:
        return Pipeline(channel).map(decode).batch(2, max_wait=5, collate_fn=collate)

    with Live(clock, face, describe) as live:
        live.send(1)
        live.channel.send_nowait(1)
        assert live.next() == [1, 1]
        live.send(0)
        wait_until_pending(live)
        live.advance(5)
        with pytest.raises(ZeroDivisionError):
            live.next()
        live.send(1)
        live.channel.close()
        assert live.next() == [1]
        assert live.steps.rest() == []


def wait_until_pending(live: Live) -> None:
    """A thread works on what was sent: until its result has come to the batch."""
    waiting = threading.Event()
    while not live.clock.timers():
        waiting.wait(0.001)
        live.settle()


@on_both_faces
def test_any_source_can_be_batched_by_time(clock: StoppedClock, face: Face) -> None:
    """Also one that never waits: nothing is cut then."""
    loader = Pipeline(range(10)).batch(4, max_wait=5, collate_fn=list)
    with Steps(loader, face, loop_factory=clock.new_loop) as steps:
        assert steps.rest() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(TypeError, match=r"batch\(4, max_wait=5\) gives as many batches as the time between samples"):
        len(loader)


@pytest.mark.parametrize(
    ("max_wait", "said"),
    [
        (-1, "max_wait must be 0 or more seconds, got -1; leave it out"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        ("1", "max_wait must be a number of seconds, 0 or more, got '1'"),
        (True, "got True"),
    ],
)
def test_max_wait_is_a_number_of_seconds(max_wait: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Pipeline(range(3)).batch(2, max_wait=max_wait)


# -- the rule, against a plain model ------------------------------------------------------------------------------


class _Pushed(Node):
    """Gives what a test pushes."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.over = False

    def resume(self, cursor: Any) -> None:
        raise AssertionError

    def start(self, run: Any, kick: Kick) -> None:
        self.kick = kick

    def poll(self, limit: int) -> list[Entry]:
        taken, self.entries = self.entries[:limit], self.entries[limit:]
        self.ended = self.over and not self.entries
        return taken


class _FakeRun:
    """A loop's clock and its one timer."""

    def __init__(self) -> None:
        self.loop = self
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None], _Handle]] = []

    def adopt(self, meter: Any) -> Any:
        return meter

    def guarded(self, callback: Callable[[], None]) -> None:
        callback()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, guarded: Callable[..., None], callback: Callable[[], None]) -> "_Handle":
        handle = _Handle()
        self.timers.append((when, callback, handle))
        return handle

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= until and not timer[2].gone]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = until


class _Handle:
    gone = False

    def cancel(self) -> None:
        self.gone = True


WAIT: Final = 4.0
MOVES = st.lists(
    st.one_of(st.tuples(st.just("push"), st.integers(1, 5)), st.tuples(st.just("pass"), st.integers(1, 6))), max_size=40
)


@given(size=st.integers(1, 4), moves=MOVES)
def test_batches_are_those_of_a_plain_model(size: int, moves: list[tuple[str, int]]) -> None:
    """Samples at any times, a consumer that always has room; one timer at most at any moment."""
    source, run = _Pushed(), _FakeRun()
    node = TimedFoldNode(source, BatchFold(size, drop_last=False), WAIT, "batch")
    given: list[tuple[float, list[int]]] = []

    def look() -> None:
        while entries := node.poll(2):
            given.extend((run.now, entry.value.samples) for entry in entries)
            assert all(entry.state != LAST for entry in entries)

    node.start(run, look)  # type: ignore[arg-type]
    expected: list[tuple[float, list[int]]] = []
    pending: list[int] = []
    began = 0.0
    number = 0
    for move, amount in moves:
        if move == "push":
            for _ in range(amount):
                source.entries.append(_entry(number))
                began = began if pending else run.now
                pending.append(number)
                number += 1
                if len(pending) == size:
                    expected.append((run.now, pending))
                    pending = []
            source.kick()
        else:
            if pending and began + WAIT <= run.now + amount:
                expected.append((began + WAIT, pending))
                pending = []
            run.advance(amount)
        assert given == expected
        assert len([timer for timer in run.timers if not timer[2].gone]) <= 1
    source.over = True
    source.kick()
    if pending:
        expected.append((run.now, pending))
    assert given == expected
    assert node.ended
    node.close()
    assert all(timer[2].gone for timer in run.timers)


def _entry(number: int) -> Entry:
    entry = Entry(number, number + 1, None, number)
    entry.state = DONE
    return entry


# -- drop_if ---------------------------------------------------------------------------------------------------------


class Policy:
    """What makes samples stale."""

    def __init__(self) -> None:
        self.version = 0
        self.threads: set[str] = set()

    def stale(self, sample: int) -> bool:
        """Samples below the version are."""
        self.threads.add(threading.current_thread().name)
        return sample < self.version

    def stale_batch(self, batch: list[int]) -> bool:
        return self.stale(batch[0])


@on_both_faces
def test_a_sample_is_looked_at_when_the_batch_takes_it(face: Face) -> None:
    """Not when it was made: with `prefetch(0)` that is when the consumer asks, and batches stay full."""
    policy = Policy()
    made: list[int] = []

    def decode(sample: int) -> int:
        made.append(sample)
        return sample

    loader = Pipeline(range(20)).map(decode, concurrency=16).drop_if(policy.stale).batch(3, collate_fn=list).prefetch(0)
    with Steps(loader, face) as steps:
        assert steps.next() == [0, 1, 2]
        assert len(made) > 8  # they were ready when the policy changed
        policy.version = 8
        assert steps.next() == [8, 9, 10]
        policy.version = 12
        assert steps.rest() == [[12, 13, 14], [15, 16, 17], [18, 19]]
    stage = next(stage for stage in loader.stats().stages if stage.name == "drop_if(Policy.stale)")
    assert (stage.samples, stage.dropped) == (20, 6)


@on_both_faces
def test_samples_that_wait_for_their_batch_are_looked_at_again(clock: StoppedClock, face: Face) -> None:
    """They were fresh when they came to the batch; when it is given they are not."""
    policy = Policy()

    def describe(channel: Channel, collate: Callable[..., Any]) -> Pipeline:
        return Pipeline(channel).drop_if(policy.stale).batch(3, max_wait=5, collate_fn=collate)

    with Live(clock, face, describe) as live:
        live.send(1)
        live.channel.send_nowait(2)
        live.channel.send_nowait(3)
        assert live.next() == [1, 2, 3]
        live.send(4)
        wait_until_pending(live)
        policy.version = 6
        live.send(7)
        live.channel.send_nowait(8)
        assert live.next() == [7, 8]  # shorter than it was put together
        live.send(9)
        wait_until_pending(live)
        policy.version = 20
        live.advance(5)
        live.channel.close()
        assert live.steps.rest() == []  # nothing was left of the last one
    stage = next(stage for stage in live.loader.stats().stages if stage.name == "drop_if(Policy.stale)")
    assert stage.dropped == 2


@on_both_faces
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_behind_batch_it_looks_at_the_consumers_next(face: Face, prefetch: int) -> None:
    """Batches lie ready, grow old, and are not handed out; no more are made ahead than without it."""
    policy = Policy()
    made = Gate()
    made.open_all()

    def collate(samples: list[int]) -> list[int]:
        made.pass_sync()
        return samples

    loader = Pipeline(range(40)).batch(2, collate_fn=collate).drop_if(policy.stale_batch).prefetch(prefetch)
    with Steps(loader, face) as steps:
        assert steps.next() == [0, 1]
        steps.until_arrived(made, 1 + prefetch)
        assert len(made.arrived) == 1 + prefetch
        policy.version = 5
        assert steps.next() == [6, 7]
        policy.version = 36
        assert steps.rest() == [[36, 37], [38, 39]]
    assert loader.stats().stages[-1].dropped == 16
    assert loader.stats().batches == 4


@on_both_faces
def test_samples_without_batches_are_looked_at_too(face: Face) -> None:
    """As the last stage of all."""
    policy = Policy()
    with Steps(Pipeline(lambda: iter(range(10))).drop_if(policy.stale), face) as steps:
        assert [steps.next(), steps.next()] == [0, 1]
        policy.version = 7
        assert steps.rest() == [7, 8, 9]


@on_both_faces
def test_the_predicate_runs_on_no_loop(face: Face) -> None:
    """Promise 3 holds for it: neither on the private loop nor on the caller's."""
    policy = Policy()
    source: Iterator[int] = iter(range(20))
    loader = Pipeline(source).drop_if(policy.stale).batch(2, collate_fn=list).drop_if(policy.stale_batch)
    assert len(collect(loader, face)) == 10
    assert policy.threads
    assert all(name.startswith(("aioloader-map", "aioloader-collate")) for name in policy.threads), policy.threads


@on_both_faces
def test_something_may_stand_behind_it(face: Face) -> None:
    """`map`, `to` and folds take from it as the consumer does."""
    policy = Policy()
    policy.version = 3
    loader = Pipeline(range(8)).drop_if(policy.stale).enumerate().map(str).take(3)
    assert collect(loader, face) == ["(0, 3)", "(1, 4)", "(2, 5)"]
    batches = collect(Pipeline(range(8)).batch(2).drop_if(lambda batch: bool(batch[0] < 3)).to("cpu"), face)
    assert [batch.tolist() for batch in batches] == [[4, 5], [6, 7]]
    merged = Pipeline.merge(Pipeline(range(5)).drop_if(policy.stale), [7]).batch(9, collate_fn=sorted)
    assert collect(merged, face) == [[3, 4, 7]]
    twice = Pipeline(range(8)).drop_if(policy.stale).drop_if(lambda sample: sample == 5).batch(9, collate_fn=list)
    assert collect(twice, face) == [[3, 4, 6, 7]]


@dataclass
class Step:
    version: int


BEHIND: dict[str, Callable[[Pipeline], Pipeline]] = {
    "map": lambda steps: steps.map(str).batch(3, collate_fn=list),
    "async map": lambda steps: steps.map(as_text).batch(3, collate_fn=list),
    "a map in place": lambda steps: steps.map(take_apart).batch(3, collate_fn=list),
    "map, filter": lambda steps: steps.map(str).filter(bool).batch(3, max_wait=60, collate_fn=list),
    "filter, map": lambda steps: steps.filter(bool).map(str).batch(3, collate_fn=list),
    "another drop_if": lambda steps: steps.map(str).drop_if(is_empty).batch(3, collate_fn=list),
    "flat_map": lambda steps: steps.flat_map(lambda step: [step.version]).batch(3, collate_fn=list),
    "shuffle": lambda steps: steps.map(str).shuffle(2).batch(3, collate_fn=list),
    "enumerate": lambda steps: steps.enumerate().batch(3, collate_fn=list),
    "batches": lambda steps: steps.batch(3, collate_fn=list).map(len).batch(2, collate_fn=list),
    "unbatch": lambda steps: steps.map(str).batch(3, collate_fn=list).unbatch().batch(2, collate_fn=list),
}


async def as_text(step: Step) -> str:
    return str(step)


def take_apart(step: Step) -> int:
    version = step.version
    del step.version  # whoever looks at it now fails
    return version


def is_empty(text: str) -> bool:
    return not text


@on_both_faces
@pytest.mark.parametrize("behind", BEHIND)
def test_it_sees_samples_as_they_are_where_it_is(face: Face, behind: str) -> None:
    """Never what a stage behind it has made of them, nor a batch of them."""
    seen: list[Any] = []

    def stale(step: Step) -> bool:
        seen.append((type(step), step.version))
        return step.version % 4 == 1

    loader = BEHIND[behind](Pipeline([Step(number) for number in range(12)]).drop_if(stale))
    found = collect(loader, face)
    assert {kind for kind, _ in seen} == {Step}
    assert {version for _, version in seen} == set(range(12))
    if behind == "a map in place":
        assert found == [[0, 2, 3], [4, 6, 7], [8, 10, 11]]


@on_both_faces
def test_batches_that_became_shorter_know_their_samples(face: Face) -> None:
    """Keys and positions are those of the samples that are left, and `unbatch` takes them apart."""
    policy = Policy()

    def stale(sample: int) -> bool:
        if sample == 5:
            policy.version = 2  # the first two of its batch grow old meanwhile
        return policy.stale(sample)

    loader = Pipeline(range(10, 20)).map(lambda key: key - 10, concurrency=1).drop_if(stale).batch(6, collate_fn=list)
    with Steps(loader, face) as steps:
        assert steps.next() == [2, 3, 4, 5]
        info = loader.last_batch_info()
        assert info is not None
        assert (info.keys, info.positions) == ((12, 13, 14, 15), (2, 3, 4, 5))
        assert steps.rest() == [[6, 7, 8, 9]]
    policy.version = 0
    assert collect(loader.unbatch().batch(8, collate_fn=list), face) == [[2, 3, 4, 5, 6, 7, 8, 9]]


@on_both_faces
def test_a_failing_predicate_fails_its_sample(face: Face) -> None:
    """At its place, with the stage in the note."""

    def stale(sample: int) -> bool:
        return 1 // (sample - 2) > 5

    with Steps(Pipeline(range(6)).drop_if(stale).batch(2, collate_fn=list), face) as steps:
        first, error, last = steps.outcomes()
    assert (first, last) == ([0, 1], [4, 5])
    assert isinstance(error, ZeroDivisionError)
    assert "stage drop_if(stale), key 2" in error.__notes__[0]


def test_the_predicate_is_sync_and_takes_one_sample() -> None:
    """An async one is refused with the way out."""

    async def stale(sample: int) -> bool:
        return False

    with pytest.raises(TypeError, match=r"drop_if takes a sync function, .* use filter for what must be awaited"):
        Pipeline(range(3)).drop_if(stale)
    with pytest.raises(TypeError, match="fn must be a function, got 3"):
        Pipeline(range(3)).drop_if(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keeps as many samples as it turns out to"):
        len(Pipeline(range(3)).drop_if(bool))
    assert repr(Pipeline(range(3)).drop_if(bool).batch(2, max_wait=0.5)) == (
        "Pipeline(range).drop_if(bool).batch(2, max_wait=0.5)"
    )


@on_both_faces
def test_a_deadline_holds_on_a_real_clock(face: Face) -> None:
    """Once without the stopped clock, for the loops' own timers."""
    channel = Channel(10)
    with Steps(Pipeline(channel).batch(10, max_wait=0.01, collate_fn=list), face) as steps:
        channel.send_nowait(1)
        assert steps.next() == [1]
        channel.send_nowait(2)
        channel.send_nowait(3)
        assert steps.next() == [2, 3]
        channel.close()
        assert steps.rest() == []


@on_both_faces
def test_what_a_filter_leaves_out_is_counted(face: Face) -> None:
    """In the same column as `drop_if`."""
    loader = Pipeline(range(10)).filter(lambda sample: sample % 3 == 0)
    assert collect(loader, face) == [0, 3, 6, 9]
    assert loader.stats().stages[-1].dropped == 6


@pytest.mark.usefixtures("fork_server")
@on_both_faces
@pytest.mark.parametrize("before", [lambda loader: loader.in_process(), lambda loader: loader.skip_errors()])
def test_drop_if_of_batches_that_are_ahead_already(face: Face, before: Callable[[Pipeline], Pipeline]) -> None:
    """Nothing is left to be made in a window of its own."""
    loader = before(Pipeline(range(12)).map(abs).batch(2, collate_fn=list)).drop_if(lambda batch: batch[0] == 4)
    assert collect(loader, face) == [[0, 1], [2, 3], [6, 7], [8, 9], [10, 11]]
