"""`Limit`: how many calls may be under way in all stages that share it, whichever loops and threads these run on.

Each stage that runs has a `Slots`, and a `Limit` has a ledger of them. A call begins with `take` and ends with
`release`. Where no slot is free, the stage waits its turn: a slot that becomes free is *granted* to the stage that has
waited longest, which is told on its own loop. A stage that is busy keeps its slot from one call to the next (`keep`)
only where nobody waits. So a hot stage, which would always be back first, starves no other one.

The story of the lock. Slots are taken on event loops and in threads, and given back from garbage collections and from
finished calls of any thread. A plain lock guards the ledger, and only `take` and `keep` wait for it, which need an
answer. All else is put into a mailbox, a deque, and done by whoever has the lock: the sender, if he gets it without
waiting, else the one who has it, who looks into the mailbox again *after* he has let go. So neither a garbage
collection nor a signal handler, which may have interrupted the very thread that has the lock, ever waits for it.
"""

import asyncio
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakMethod, WeakSet

from aioloader.core.checks import check_count
from aioloader.core.forks import tell_of_fork

__all__ = ["Limit", "Slots", "check_concurrency", "width_of"]


class Limit:
    """A limit on concurrency that several stages share, and that may be changed while they run.

    Pass it as `concurrency` to any number of stages, of one pipeline or of several, on any loops and both faces. All of
    them together have at most `value` calls under way. Stages that wait for a slot get them in turn.

    ```python
    limit = Limit(64)
    rollouts = Pipeline(prompts).map(rollout, concurrency=limit)
    evals = Pipeline(tasks).map(rollout, concurrency=limit)
    limit.value = 96  # at any time, from any thread
    ```

    A smaller value cancels nothing: no call begins until enough have ended. A greater one lets more begin at once. A
    sample that waits, finished, for its turn has no slot. Functions that cross into threads or processes together are
    one call after the other, in one slot.

    A copy, also one that was pickled, is a limit of its own with the same value, and so is that of a forked child.

    Args:
        value: How many calls may be under way, at least 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: It is less than 1.
    """

    def __init__(self, value: int) -> None:
        self._ledger = _Ledger(_checked(value))
        tell_of_fork(self)

    @property
    def value(self) -> int:
        """How many calls may be under way; set it from any thread."""
        return self._ledger.value

    @value.setter
    def value(self, value: int) -> None:
        self._ledger.change(_checked(value))

    @property
    def under_way(self) -> int:
        """How many calls are under way now. More than `value` for a while after that has been lowered."""
        return max(0, self._ledger.used - self._ledger.granted)

    def join(self, loop: AbstractEventLoop, told: Callable[[], None], *, on_loop: bool) -> "Slots":
        """The slots of a stage that begins to run.

        Args:
            loop: The loop of the stage.
            told: A method, held weakly; called on the loop when a slot was granted, or when `value` has changed.
            on_loop: Its calls run on the loop, and will never end if that is closed under them.
        """
        return Slots(self._ledger, loop, told, on_loop=on_loop)

    def _forked(self) -> None:
        """See `Forkable`: calls that are under way are the parent's."""
        self._ledger.lock = threading.Lock()
        self._ledger = _Ledger(self._ledger.value)

    def __reduce__(self) -> Any:
        return Limit, (self.value,)

    def __repr__(self) -> str:
        return f"Limit({self.value})"


def check_concurrency(concurrency: object, *, hint: str = "leave it out for the default") -> "int | Limit":
    """`concurrency` of a stage: an integer of at least 1, or a `Limit`.

    Raises:
        TypeError: It is neither.
        ValueError: It is too small.
    """
    if isinstance(concurrency, Limit):
        return concurrency
    return check_count("concurrency", concurrency, least=1, hint=f"{hint}, or pass a Limit")


def width_of(concurrency: "int | Limit") -> int:
    """Calls that may be under way, as of now."""
    return concurrency.value if isinstance(concurrency, Limit) else concurrency


def _checked(value: object) -> int:
    return check_count("the value of a Limit", value, least=1, hint="loader.paused() lets no sample begin at all")


class Slots:
    """What one running stage has of a `Limit`.

    Attributes:
        held: Slots in which a call is under way.
        granted: Slots that it was given while it waited, and that it has not taken yet.
        waits: It is to be granted one.
    """

    def __init__(self, ledger: "_Ledger", loop: AbstractEventLoop, told: Callable[[], None], *, on_loop: bool) -> None:
        self.held = 0
        self.granted = 0
        self.waits = False
        self.closed = False
        self.loop = loop
        self.on_loop = on_loop
        self._ledger = ledger
        self._told = WeakMethod(told)
        self._telling = False
        ledger.send(partial(ledger.members.add, self))

    @property
    def value(self) -> int:
        """Slots of all stages."""
        return self._ledger.value

    @property
    def pressed(self) -> bool:
        """Whether `keep` is to be asked before the next call: somebody waits, or there are too many."""
        return self._ledger.pressed

    def take(self) -> bool:
        """Take a slot for a call; False: there is none, and `told` is called once that may have changed."""
        ledger = self._ledger
        with ledger.lock:
            ledger.read_mail()
            taken = ledger.take(self)
            ledger.note()
        ledger.settle()
        return taken

    def take_free(self) -> bool:
        """Take a slot that nobody waits for; False: there is none, and this does not wait for one."""
        ledger = self._ledger
        with ledger.lock:
            ledger.read_mail()
            taken = ledger.take_free(self)
        ledger.settle()
        return taken

    def keep(self) -> bool:
        """Whether a slot in which a call has ended may be kept for the next one; False: it has been given on."""
        ledger = self._ledger
        with ledger.lock:
            ledger.read_mail()
            kept = ledger.keep(self)
            ledger.note()
        ledger.settle()
        return kept

    def release(self) -> None:
        """A call has ended. In any thread; never waits."""
        self._ledger.send(partial(self._ledger.release, self))

    def give_back(self, *, waits: bool) -> None:
        """Give on what was granted and has not been taken: there is nothing to do for it.

        Args:
            waits: There will be when others have ended: keep its place among those that wait.
        """
        if self.granted or (self.waits and not waits):
            self._ledger.send(partial(self._ledger.give_back, self, waits=waits))

    def close(self, *, all_of_it: bool = False) -> None:
        """Take none any more. Calls under way release their slots as they end, unless nobody will know of that.

        Args:
            all_of_it: Nobody will: give back their slots, too.
        """
        self._ledger.send(partial(self._ledger.close, self, all_of_it=all_of_it))

    def tell(self) -> None:
        """Call `told`, soon."""
        if self._telling:
            return
        self._telling = True
        try:
            if asyncio._get_running_loop() is self.loop:
                self.loop.call_soon(self._tell)
            else:
                self.loop.call_soon_threadsafe(self._tell)
        except RuntimeError:  # the loop is closed
            self.close(all_of_it=self.on_loop)

    def _tell(self) -> None:
        self._telling = False
        if self.waits:  # its loop stood still when there was a slot
            self._ledger.send(self._ledger.grant)
        told = self._told()
        if told is None:
            self.close()
        else:
            told()

    @property
    def awake(self) -> bool:
        """Whether it can use what it is granted: a loop that stands still would keep it from others."""
        return self.loop.is_running()

    @property
    def gone(self) -> bool:
        """Whether nobody will ever use it."""
        return self.closed or self._told() is None or self.loop.is_closed()

    def __del__(self) -> None:
        # A stage that was not closed, since its loop was lost with all tasks in it.
        if (left := self.held + self.granted) and not self.closed:
            self._ledger.send(partial(self._ledger.forfeit, left, self.granted))


class _Ledger:
    """Who has how many slots, and who waits. What is not said to be safe needs `lock`.

    Attributes:
        value: Slots that there are.
        used: Slots that are taken or granted.
        granted: Those that are granted.
        pressed: See `Slots`; may be read without the lock, since it is looked at again.
        members: All that run.
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.used = 0
        self.granted = 0
        self.pressed = False
        self.members: WeakSet[Slots] = WeakSet()
        self.lock = threading.Lock()
        self._mail: deque[Callable[[], None]] = deque()
        self._changing = False  # there is word of another value in it
        self._news: deque[Slots] = deque()  # they are to be told, when the lock is free again
        self._queue: deque[Slots] = deque()  # they wait, the longest first

    # -- without the lock --------------------------------------------------------------------------------------------

    def send(self, order: Callable[[], None]) -> None:
        """Let whoever has the lock call `order`. Safe anywhere."""
        self._mail.append(order)
        self.settle()

    def change(self, value: int) -> None:
        """Another value, from now on. Safe anywhere."""
        self.value = value
        if not self._changing:  # else what is in the mailbox will find this value, however many come meanwhile
            self._changing = True
            self.send(self._changed)

    def settle(self) -> None:
        """Do what has been sent, unless somebody else is about to. Safe anywhere."""
        while self._mail and self.lock.acquire(blocking=False):
            try:
                self.read_mail()
                self.note()
            finally:
                self.lock.release()
        while self._news:
            try:
                slots = self._news.popleft()
            except IndexError:
                return
            slots.tell()

    # -- with the lock -----------------------------------------------------------------------------------------------

    def read_mail(self) -> None:
        """Do what has been sent."""
        while self._mail:
            self._mail.popleft()()

    def note(self) -> None:
        """Bring `pressed` up to date."""
        self.pressed = self.used > self.value or bool(self._queue)

    def take(self, slots: Slots) -> bool:
        """See there."""
        if slots.closed:
            return False
        if slots.granted:
            slots.granted -= 1
            self.granted -= 1
            slots.held += 1
            return True
        if self.used >= self.value:
            self._forget_the_lost()
        if self.used < self.value and self._next() in (None, slots):
            self._leave_queue(slots)
            self.used += 1
            slots.held += 1
            return True
        if not slots.waits:
            slots.waits = True
            self._queue.append(slots)
        return False

    def take_free(self, slots: Slots) -> bool:
        """See there."""
        if slots.closed or self.used >= self.value or self._next() is not None:
            return False
        self.used += 1
        slots.held += 1
        return True

    def keep(self, slots: Slots) -> bool:
        """See there. A stage that waits for one more has waited long enough when its turn comes: it goes to the end."""
        if slots.closed or self.used > self.value:
            self.release(slots)
            return False
        following = self._next()
        if following is None:
            return True
        if following is slots:
            self._queue.remove(slots)
            self._queue.append(slots)
            return True
        self.release(slots)
        return False

    def release(self, slots: Slots) -> None:
        """See there."""
        if slots.held:
            slots.held -= 1
            self.used -= 1
            self.grant()

    def give_back(self, slots: Slots, *, waits: bool = False) -> None:
        """See there."""
        if not waits:
            self._leave_queue(slots)
        self.used -= slots.granted
        self.granted -= slots.granted
        slots.granted = 0
        self.grant()

    def close(self, slots: Slots, *, all_of_it: bool) -> None:
        """See there."""
        slots.closed = True
        self.members.discard(slots)
        if all_of_it:
            self.used -= slots.held
            slots.held = 0
        self.give_back(slots)

    def forfeit(self, used: int, granted: int) -> None:
        """Slots of a stage that is no more."""
        self.used -= used
        self.granted -= granted
        self.grant()

    def _changed(self) -> None:
        self._changing = False  # before it looks
        self._news.extend(self.members)
        self._take_back_granted()
        self.grant()

    def _take_back_granted(self) -> None:
        """There are fewer: what is granted and not taken is no call yet, and waits again, before all others."""
        for slots in [*self.members] if self.granted and self.used > self.value else ():
            while slots.granted and self.used > self.value:
                slots.granted -= 1
                self.granted -= 1
                self.used -= 1
                if not slots.waits:
                    slots.waits = True
                    self._queue.appendleft(slots)

    def grant(self) -> None:
        """Give free slots to those that wait, one each: they take more themselves if there are more."""
        while self.used < self.value and (slots := self._next()) is not None:
            self._leave_queue(slots)
            self.used += 1
            self.granted += 1
            slots.granted += 1
            self._news.append(slots)
        if self.used < self.value:
            self._news.extend(self._queue)  # their loops stand still: they look when these go on

    def _next(self) -> Slots | None:
        """Who is next."""
        for slots in self._queue:
            if slots.awake:
                return slots
        return None

    def _leave_queue(self, slots: Slots) -> None:
        if slots.waits:
            slots.waits = False
            self._queue.remove(slots)

    def _forget_the_lost(self) -> None:
        """Take back what stages have whose loops were closed under them, or that are no more."""
        for slots in [*self._queue, *self.members]:
            if slots.gone:
                self.close(slots, all_of_it=slots.on_loop)
