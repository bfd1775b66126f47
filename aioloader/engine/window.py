"""A window: many journeys at once, their results in slots, in order, until they are taken.

One journey takes one entry through all neighbouring `map` and `filter` stages. The window is the bounded queue of the
engine: what is under way and what is finished but not taken stand in the same slots, and when these are full nobody
upstream moves. A window without steps is a plain buffer.
"""

from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.cursors import CompletionCursor
from aioloader.core.entry import DONE, DROPPED, LAST, ONE_LOST, UNDER_WAY, Entry
from aioloader.engine.admission import Admission
from aioloader.engine.completion_order import CompletionOrder
from aioloader.engine.gauges import let_stamp, show
from aioloader.engine.in_a_row import InARow
from aioloader.engine.node import CHUNK_SECONDS, Kick, Node
from aioloader.engine.room import Growth, Room
from aioloader.engine.skipping import SkipRule
from aioloader.engine.steps import Forward, Step, bind_in_a_row
from aioloader.insight.gauges import WaitMeter
from aioloader.insight.meters import Why

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["Window"]


MEASURED_SECONDS: Final = 0.0005
"""Of entries that are taken more often than that, not all are asked how long they have waited."""


class Window(Node):
    """Takes entries from `upstream` through `steps`.

    Args:
        upstream: Where entries come from.
        steps: The stages of one journey, in order.
        room: Slots: entries under way and finished ones together, at most. None: nothing is begun before it is asked
            for.
        ordered: Give results in the order of the input; False: as they are finished.
        completion: The order of entries that have no fixed one; None, if it is `ordered`: they have.

    Attributes:
        under_way: Entries on their journey, not finished.
        ordered: As given.
        admission: Who decides when samples may begin; None: nobody but `room`.
        in_a_row: Counts what filters refuse, and has a limit; None: there is none.
        rule: Which entries that failed are left out when they leave; None: none is.
        begins: Samples begin here, so that `admission` is asked.
        pauses: Nothing begins here while the run pauses, see `RunPause`.
        stamps: The first call for an entry may be one of its steps, see `Entry.begun`.
        now: The time, as of the last moment when somebody looked. Entries that are finished together, in one hop or by
            a worker that does not wait, have been finished then.
        hands_out: What leaves goes to the consumer. It waits until that has it, and `handed_out` is called.
        queued: Gives how much of that waits now, where the consumer is in another thread.
        bounded: The user has said how much it holds.
        one_by_one: `finished` has to be told of each entry, also of those that are finished in order.
        choose: Chooses which entries are traced; None: nobody asks.
    """

    admission: Admission | None = None
    in_a_row: InARow | None = None
    rule: SkipRule | None = None
    begins = False
    pauses = True
    stamps = False
    now = 0.0
    hands_out = False
    queued: Callable[[], int] | None = None
    bounded = False
    one_by_one = False
    choose: Callable[[list[Entry]], None] | None = None

    def __init__(
        self,
        upstream: Node,
        steps: Sequence[Step],
        *,
        room: Room | None,
        ordered: bool = True,
        completion: CompletionOrder | None = None,
    ) -> None:
        self.upstream = upstream
        self._steps = tuple(steps)
        self._parts = [part for step in steps for part in step.parts]
        self._retrying = [part.retrying for part in self._parts if part.retrying is not None]
        self._room = room
        self._fixed = False  # nothing but `room` decides how many come in
        self._full_at = 1 << 62  # entries with which it is full, where it may grow
        self._told_room = 0  # the most there was, for statistics
        self.ordered = ordered
        self._slots: deque[Entry] = deque()  # ordered: all entries in order; else: the finished ones as they came
        self._occupied = 0  # entries that have been admitted and not taken
        self._dropped = 0  # those of them that a predicate refused
        self._stands_for = 1  # samples: one of its entries, as `alive` was last told
        self.under_way = 0
        self._lent = 0  # taken, but by a face that says itself when they are really gone (see `lend`)
        self._asked = 0  # what the last poll could not give; without room only this is begun
        self._looking = False  # at calls that may need more room, soon
        self._front_timer: TimerHandle | None = None  # rings when the front is late
        self._input_ended = False
        self._last: Entry | None = None  # unordered: the failure of a source waits until all before it have been taken
        self._after_last: list[Entry] = []  # and what came after it until then
        self._scheduled = False
        self._paused = False
        self._aside = 0  # of those under way: entries that have not begun, and do not before a pause is over
        self._closed = False
        self._completion = completion
        self._replays = completion is not None and completion.replays
        self._waits: WaitMeter | None = None  # None: it has no steps, and nobody asks
        self._measures_at = 0.0  # what is taken from then on is measured again
        self._unmeasured = 0  # entries that were taken since it was

    # -- the node interface ------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether nothing is here, nor comes back."""
        return not self._occupied

    @property
    def places(self) -> Room | None:
        """How many entries it holds, and how that may change; where that is set after the start, `resize` says so."""
        return self._room

    @places.setter
    def places(self, room: Room) -> None:
        self._room = room
        self._look_at_room()

    def _look_at_room(self) -> None:
        grows = self._room is not None and self._room.growth is not None
        self._fixed = not (grows or self.begins or self._completion is not None)

    @property
    def parts(self) -> Sequence[Step]:
        """The steps that have a meter."""
        return self._parts

    @property
    def occupied(self) -> int:
        """Entries under way and finished ones."""
        return self._occupied

    @property
    def numbering(self) -> CompletionCursor | None:
        """What numbers its entries, if they have no fixed order."""
        return None if self._completion is None else self._completion.numbering

    @property
    def holds(self) -> bool:
        """Whether it begins anything before it is asked for, and holds it."""
        return self._room is not None

    @property
    def gaps(self) -> bool:
        here = any(step.meter.gaps for step in self._parts) or (self.rule is not None and self.rule.gaps)
        return here or self.upstream.gaps

    def feeds_batches(self, size: int) -> bool:
        return self.ordered and bool(self._steps) and self._steps[-1].feeds_batches(size)

    def resume(self, cursor: Any) -> None:
        if self.rule is not None:
            cursor = self.rule.resume(cursor)
        if self._completion is not None:
            cursor = self._completion.resume(cursor)
        if self.in_a_row is not None:
            cursor = self.in_a_row.resume(cursor)
        if cursor is not None:
            self.upstream.resume(cursor)

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self._look_at_room()
        if self._completion is not None:
            self._completion.start()
        self.upstream.start(run, self.wake)
        if self.admission is not None and self.begins:
            self.admission.add(self)
        if self._parts:
            run.joined_by(self)
            if run.tuner is not None:
                run.tuner.join(self, run)
        if not self._steps and run.meters:
            run.meters[-1].ahead = self.room
        for step in self._parts:
            step.meter = run.adopt(step.meter)
            step.meter.ordered = self.ordered
        if self.in_a_row is not None:
            self.in_a_row.start(run, self, [step.meter for step in self._parts])
        if run.tracer is not None and self._parts:
            run.tracer.watch(self, self._parts)
        bind_in_a_row(self._steps, run, self, self.finished, self.finished)
        self._waits = show(self._parts, queued=self.queued)
        if self.stamps:
            let_stamp(self._steps, fresh=self.upstream.fresh)
        if self.rule is not None:
            self.rule.start(run)
        self._tell_room(self.room)
        if self._steps and self.pauses:
            run.pausing.join(self)
        if self._room is not None:
            self.wake()

    def poll(self, limit: int) -> list[Entry]:
        taken = self._take(limit)
        self._asked = limit - len(taken)
        if self._asked and self._room is None:
            self.wake()
        return taken

    def take_finished(self) -> list[Entry]:
        """All that is ready, and nothing is asked for."""
        taken = self._take(1 << 62)
        self._asked = 0
        return taken

    def _take(self, limit: int) -> list[Entry]:
        if self.rule is None:
            return self._take_finished(limit)
        kept: list[Entry] = []
        while len(kept) < limit and (taken := self._take_finished(limit - len(kept))):
            kept += self.rule.leaving(taken)
        return kept

    def _take_finished(self, limit: int) -> list[Entry]:
        taken = self._leave(limit) if self._slots and self._slots[0].state else []
        if self._last is not None and self.empty and len(taken) < limit:
            last, self._last = self._last, None
            if self._completion is not None:
                self._completion.fail(last)
            taken.append(last)
            self.wake()
        if self._input_ended and self.empty and self._last is None:
            self._finish()
        return taken

    def _leave(self, limit: int) -> list[Entry]:
        """Up to `limit` finished entries from the front; those that were dropped give up their slots, too."""
        slots = self._slots
        taken: list[Entry] = []
        for step in self._parts:
            step.meter.handovers += 1  # first: whoever reads in between finds no more on average than there ever were
            step.meter.finished_sum += self._occupied - self.under_way
        before = len(slots)
        while count := self._done(limit - len(taken)):
            leaving = _left(slots, count)
            if self.in_a_row is not None:
                self._dropped -= self.in_a_row.leave(leaving)
            if self._completion is not None:
                self._completion.leave(leaving)
            kept = [entry for entry in leaving if entry.state != DROPPED] if self._dropped else leaving
            taken += kept
            if len(kept) == count:  # then there is no more, or no more is wanted
                break
            self._dropped -= count - len(kept)
        self._occupied -= before - len(slots)
        if taken and self._waits is not None and not self.hands_out:
            self._unmeasured += len(taken)
            if (now := perf_counter()) >= self._measures_at:
                self._measures_at = now + MEASURED_SECONDS
                self._waits.took(now, taken, self._unmeasured)
                self._unmeasured = 0
        if self._room is not None and self._room.weighs:
            self._room.gave(taken)
        if self.admission is not None:
            self.admission.changed()
        if self._completion is not None:
            self._completion.have_left()
        self.wake()
        return taken

    def _done(self, limit: int) -> int:
        """How many at the front are finished, up to `limit`."""
        slots = self._slots
        if self._all_done:
            return min(limit, len(slots))
        count = 0
        for entry in islice(slots, limit):
            if not entry.state:
                break
            count += 1
        return count

    @property
    def _all_done(self) -> bool:
        """Whether all slots are known to hold finished entries: nobody need look at each."""
        return not (self.ordered and self.under_way)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self.admission is not None:
                self.admission.remove(self)
            if self._front_timer is not None:
                self._front_timer.cancel()
            for step in self._steps:
                step.close()
            self.upstream.close()
            if self.rule is not None:
                self.rule.close()
            if self._completion is not None:
                self._completion.close()
            if self._paused:
                self._run.soon(self._run.pausing.look)

    # -- a pause, see `Pausable` -------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether nothing begins any more, ever."""
        return self._closed

    @property
    def quiet(self) -> bool:
        return self._closed or self._steps[0].quiet

    @property
    def still(self) -> bool:
        if self._closed:  # what is left counts no more, but for calls: `take` has all that it wants while some go on
            return all(step.rests for step in self._parts)
        return self.under_way == self._aside

    def pause(self) -> None:
        self._paused = True
        if not self._closed:
            self._pause_retrying()
            self._steps[0].hold()

    def go_on(self) -> None:
        self._paused = False
        if not self._closed:
            self._steps[0].let_go()
            self._pause_retrying()
            self.wake()

    def _pause_retrying(self) -> None:
        for retrying in self._retrying:
            retrying.pause(paused=self._paused)

    def rested(self) -> None:
        """A call of a step that is closed has ended."""
        if self._paused:
            self._run.soon(self._run.pausing.look)

    def set_aside(self, count: int) -> None:
        """`count` entries that came in turn out not to have begun; negative: they may begin again."""
        self._aside += count
        self.wake()

    # -- a face that hands entries to another thread -----------------------------------------------------------------

    def lend(self, count: int) -> None:
        """`count` entries that were just taken keep their room until `give_back`: nobody has used them yet."""
        self._lent += count

    def give_back(self, count: int) -> None:
        """`count` lent entries have reached the consumer."""
        self._lent -= count
        if self.admission is not None:
            self.admission.changed()
        self.wake()

    @property
    def measures(self) -> bool:
        """Whether somebody asks how long entries wait."""
        return bool(self._parts)

    @property
    def fresh(self) -> bool:
        return self.upstream.fresh and not self.stamps

    def handed_out(self, entry: Entry, now: float) -> None:
        """The consumer has it, at `now`; in its thread."""
        if self._waits is not None and entry.state < DROPPED:
            self._waits.took_one(now, entry.since)

    @property
    def held(self) -> int:
        """Finished entries that wait to be taken; from any thread."""
        return max(0, self._occupied - self.under_way - self._dropped)

    def alive(self, size: int) -> int:
        self._stands_for = size
        left_out = 0 if self.in_a_row is not None else self._dropped  # there it may yet fail, until it leaves
        here = (self._occupied + self._lent - left_out) * size
        return here if self.begins else here + self.upstream.alive(size)

    @property
    def room(self) -> int:
        """Slots now."""
        return self._asked if self._room is None else self._room.now(self._asked)

    @property
    def live(self) -> bool:
        return self.upstream.live

    @property
    def extra_room(self) -> int:
        return min([self.upstream.extra_room, *(step.extra_room for step in self._parts if step.concurrency)])

    def _tell_room(self, room: int) -> None:
        """Let statistics say how much there is. Entries that were let in stay when it shrinks: the most counts."""
        if room > self._told_room:
            self._told_room = room
            for step in self._parts:
                step.meter.room = max(step.meter.room, room)  # it may have counted for an earlier repetition
            self._kick()  # in a process of its own, whoever polls tells it

    def resize(self) -> None:
        """A step needs more room than before, or less."""
        if self._room is not None:
            self._room.refresh()
        self.wake()

    def hop_began(self) -> None:
        """In one of its steps. Should it take its time, those that the window is too full for may begin after all."""
        if not self._looking and self._room is not None and self._room.may_grow:
            self._looking = True
            self._run.loop.call_later(2 * CHUNK_SECONDS, self._run.guarded, self._look)

    def _look(self) -> None:
        self._looking = False
        if self._closed or self._run.stopping or self._room is None:
            return
        self._room.look()
        self.wake()
        self.hop_began()

    # -- admission ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look at room and input once, after what is going on now.

        Not at once: a worker that finishes fifty samples without waiting would start fifty rounds of one sample.
        """
        if not self._scheduled:
            self._scheduled = True
            self._run.soon(self._admit)

    def _admit(self) -> None:
        self._scheduled = False
        if self._closed or self._run.stopping:  # an input that was cut off is no end
            return
        if self._paused:
            self._run.pausing.look()
            return
        if self._room is None:
            room = self._asked
        else:
            room = self._room.now(self._asked)
            if self._room.growth is not None:
                self._full_at = room
        if room > self._told_room:
            self._tell_room(room)
        while not self._input_ended and self._last is None:
            free = room - self._occupied - self._lent
            if (free <= 0 or self.begins) and (self._fixed or (free := self._freed(free)) <= 0):
                break
            run, self._after_last = self._after_last or self.upstream.poll(free), []
            if run:
                self.accept(run)
            elif self.upstream.ended:
                self._input_ended = True
            else:
                break
        if self._replays and not (self.under_way or self._slots):
            self._give_up_replay()
        if self._input_ended and self.empty and self._last is None:
            self._finish()
            self._kick()
        elif not self.under_way and not self._input_ended:
            waits_for: Why = "room" if self._occupied + self._lent >= room else "input"
            for step in self._parts:
                step.meter.idle.wait_for(waits_for)

    def _freed(self, free: int) -> int:
        """How many entries may come in, where there is room for `free`.

        While an order is replayed, all up to the one whose turn it is.
        """
        room = self._room
        if free <= 0 and room is not None and (growth := room.growth) is not None:
            free = self._grown(room, growth) if self.under_way < room.width or self._retrying else 0
        if self.begins and self.admission is not None:
            return min(free, self.admission.free // self._stands_for)
        if free <= 0 and self._completion is not None and (to_come := self._completion.to_come):
            free = to_come
            self._tell_room(self._occupied + self._lent + free)
        return free

    def _grown(self, room: Room, growth: Growth) -> int:
        """How many more entries may come in, see `Growth`."""
        resting = sum(map(len, self._retrying)) if self._retrying else 0
        if (idle := room.width - self.under_way + resting) <= 0 or self.upstream.live:
            return 0
        if not self.ordered:
            if not resting or self._replays:
                return 0
            most = min(room.now(self._asked) + resting, growth.most(room.widest, islice(self._slots, 4)))
        else:
            if not self._slots or self._slots[0].state:
                return 0
            if (seconds := growth.wait(len(self._slots), self._seconds_each)) > 0:
                if self._front_timer is None:
                    self._front_timer = self._run.loop.call_later(seconds, self._run.guarded, self._front_is_late)
                return 0
            most = growth.most(room.widest, islice(self._slots, 1, 5))
        taken = self._occupied + self._lent
        if (more := min(idle, most - taken)) > 0:
            self._tell_room(taken + more)
        return more

    def _front_is_late(self) -> None:
        self._front_timer = None
        if not self._closed and not self._run.stopping:
            self.wake()

    @property
    def _seconds_each(self) -> float:
        """How long a sample takes in the slowest step, on average."""
        meters = [step.meter for step in self._parts if step.meter.samples]
        return max((meter.busy_seconds / meter.samples for meter in meters), default=0.0)

    def _give_up_replay(self) -> None:
        """End the epoch with an error when nothing can leave any more, since log and source do not fit."""
        assert self._completion is not None
        lost = self._completion.no_more(input_ended=self._input_ended, failed=self._last is not None)
        if lost is None:
            return
        waiting, error = lost
        self._occupied -= waiting
        self._input_ended = True
        if error is not None:
            self._last = Entry.last(error, None, 0)
        self._kick()

    def _finished_unordered(self, entry: Entry) -> None:
        """It leaves next, or when it is its turn."""
        assert self._completion is not None
        if self._completion.finished(entry, self._slots):
            self.wake()  # the one whose turn it is may not have come in

    def accept(self, run: list[Entry]) -> None:
        """Begin the journeys of `run`."""
        self._input_ended = run[-1].state == LAST
        if not self.ordered:
            run = self._before_failure(run)
        if self._completion is not None and not (run := self._completion.comes(run)):
            return
        self._occupied += len(run)
        now = self.now = perf_counter()
        if self.ordered:
            if self._room is not None and (growth := self._room.growth) is not None:
                growth.came(len(run), len(self._slots), now)
            self._slots.extend(run)
        elif self._completion is not None:
            self._completion.begin(run)
        if not self._steps:
            self._finish_at_once(run)
            return
        stamped, failed = not self._steps[-1].tells_end, False
        for entry in run:
            if entry.error is not None:
                failed = True
                continue
            entry.state = UNDER_WAY
            if stamped:
                entry.since = now
        if failed:  # each keeps its place, and no step sees it
            self.failed()
            self._finish_at_once([entry for entry in run if entry.error is not None])
            run = [entry for entry in run if entry.error is None]
        if run:
            self.under_way += len(run)
            if self.choose is not None:
                self.choose(run)
            self._steps[0].take_in(run)

    def _before_failure(self, run: list[Entry]) -> list[Entry]:
        """The part of `run` before a source fails. The failure waits until all that came before it has left."""
        at = next((at for at, entry in enumerate(run) if entry.state in (LAST, ONE_LOST)), None)
        if at is None:
            return run
        self._last, self._after_last = run[at], run[at + 1 :]
        if self._replays:  # what comes now is not what came then
            self._last.state, self._after_last = LAST, []
        self._input_ended = self._last.state == LAST
        if self.empty:  # nobody else's end will say so
            self._kick()
        return run[:at]

    def _finish_at_once(self, run: list[Entry]) -> None:
        """No step has anything to do with these entries."""
        for entry in run:
            entry.state = entry.state or DONE
            entry.since = self.now
            if not self.ordered:
                self._finished_unordered(entry)
        self._kick()

    def failed(self) -> None:
        """An entry has failed, here or before: without that, a predicate might have left it out."""
        for step in self._parts:
            step.meter.gaps = step.meter.gaps or step.selects

    def finished(self, entry: Entry) -> None:
        """The last step, or a failing one, is done with `entry`; `entry.state` says so already when it was dropped."""
        if not entry.state:
            entry.state = DONE
        elif entry.state == DROPPED:
            self._left_out()
        self.under_way = under_way = self.under_way - 1
        if self.ordered:
            front = self._slots[0]
            if front is entry:
                self._kick()
            elif not front.state and self._occupied >= self._full_at:
                self.wake()  # a place stands idle, and the front is late: see `Growth`
        else:
            self._finished_unordered(entry)
            self._kick()
        if under_way == self._aside:
            self.wake()  # for the idle clock, or for who waits until nothing is under way

    def _left_out(self) -> None:
        """A predicate has refused an entry."""
        self._dropped += 1
        if self.admission is not None:
            self.admission.changed()

    def takes_many(self, forward: Forward) -> bool:
        """Whether what a step gives to `forward` may be told by `finished_in_place`, many entries at a time."""
        return self.ordered and not self.one_by_one and forward == self.finished

    def finished_in_place(self, count: int) -> None:
        """`count` entries of an ordered window are done, and their `state` says so already."""
        self.under_way -= count
        if self._slots[0].state:
            self._kick()
        elif self._occupied >= self._full_at:
            self.wake()
        if self.under_way == self._aside:
            self.wake()

    def _finish(self) -> None:
        self.ended = True
        self.close()


def _left(slots: deque[Entry], count: int) -> list[Entry]:
    """Take the first `count`."""
    if count < len(slots):
        popleft = slots.popleft
        return [popleft() for _ in range(count)]
    leaving = list(slots)
    slots.clear()
    return leaving
