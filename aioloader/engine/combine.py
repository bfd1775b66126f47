"""Nodes with several upstreams: `merge`, `interleave`, `mix`, `zip`."""

import asyncio
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.entry import LAST, ONE_LOST, Entry, earliest
from aioloader.core.keys import SourceKey, each_key
from aioloader.core.mixture import MixControl, WeightBlock, in_repetitions
from aioloader.core.safe_text import add_note
from aioloader.core.seeds import BLOCK, random_of_block
from aioloader.engine.node import Kick, Node
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InterleaveNode", "MergeNode", "MixNode", "ZipNode"]


class _InputsNode(Node):
    """What the nodes over several upstreams share: a cursor that holds one cursor per upstream.

    An upstream that fails raises its error at its place, and the others go on without it. It has not ended: after a
    resume it is tried again.
    """

    def __init__(self, upstreams: Sequence[Node]) -> None:
        self._upstreams = list(upstreams)
        self._cursors: list[object] = [None] * len(self._upstreams)
        self._lost: set[int] = set()  # upstreams that have failed

    def resume(self, cursor: Any) -> None:
        self._cursors = list(cursor_parts(cursor, len(self._upstreams)))
        for upstream, its in zip(self._upstreams, self._cursors, strict=True):
            if its is not None:
                upstream.resume(its)

    @property
    def extra_room(self) -> int:
        return min(upstream.extra_room for upstream in self._upstreams)

    @property
    def live(self) -> bool:
        return any(upstream.live for upstream in self._upstreams)

    @property
    def gaps(self) -> bool:
        return bool(self._lost) or any(upstream.gaps for upstream in self._upstreams)

    def start(self, run: "Run", kick: Kick) -> None:
        for upstream in self._upstreams:
            upstream.start(run, kick)

    def close(self) -> None:
        for upstream in self._upstreams:
            upstream.close()

    def _emit(self, entry: Entry, index: int) -> Entry:
        """`entry` of upstream `index` is the next output."""
        self._cursors[index] = entry.cursor
        key = entry.key
        entry.key = each_key(key, partial(SourceKey, index)) if type(key) is list else SourceKey(index, key)
        entry.cursor = tuple(self._cursors)
        if entry.state == LAST:
            entry.state = ONE_LOST
            self._lost.add(index)
            self._upstreams[index].close()
        return entry

    def _end(self) -> None:
        self.ended = True
        self.close()


class MergeNode(_InputsNode):
    """Entries of all upstreams, as they come. Cursor: that of each upstream; the realised order is not in it.

    Each is asked for its share of what is wanted: what is read ahead is bounded by that, and not by it times the number
    of upstreams.
    """

    _given = 0

    def poll(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        if self.ended:
            return taken
        upstreams = self._upstreams
        share = -(-limit // max(1, sum(not self._is_over(index) for index in range(len(upstreams)))))
        turn = self._given % len(upstreams)  # the first to be asked changes, so that a fast one starves nobody
        for index in (*range(turn, len(upstreams)), *range(turn)):
            if len(taken) == limit:
                break
            if self._is_over(index):
                continue
            for entry in upstreams[index].poll(min(share, limit - len(taken))):
                self._given += 1
                taken.append(self._emit(entry, index))
        self.ended = all(map(self._is_over, range(len(upstreams))))
        return taken

    def _is_over(self, index: int) -> bool:
        return self._upstreams[index].ended or index in self._lost


class InterleaveNode(_InputsNode):
    """One entry of each upstream in turn; those that have ended drop out of the turn.

    All are asked together, for their share of what is wanted, so that they work side by side. Cursor: that of each
    upstream, whose turn is next, and who has ended; which is found out in turn, so it does not depend on who is fast.
    """

    def __init__(self, upstreams: Sequence[Node]) -> None:
        super().__init__(upstreams)
        self._pending: list[deque[Entry]] = [deque() for _ in self._upstreams]
        self._turn = 0
        self._over: list[int] = []

    def resume(self, cursor: Any) -> None:
        cursors, turn, over = cursor_parts(cursor, 3)
        super().resume(cursors)
        last = len(self._upstreams) - 1
        self._turn = as_count(turn, last)
        self._over = _distinct(over, last)
        self.ended = len(self._over) > last

    def poll(self, limit: int) -> list[Entry]:
        if self.ended:
            return []
        out = {*self._over, *self._lost}
        share = -(-limit // (len(self._upstreams) - len(out)))
        for index, (upstream, pending) in enumerate(zip(self._upstreams, self._pending, strict=True)):
            if len(pending) < share and not upstream.ended and index not in out:
                pending.extend(upstream.poll(share - len(pending)))
        taken: list[Entry] = []
        while len(taken) < limit and not self.ended:
            index = self._turn
            pending = self._pending[index]
            if pending:
                entry = self._emit(pending.popleft(), index)
                if entry.state != ONE_LOST:  # which is no sample: it has its turn again, after a resume at least
                    self._turn = (index + 1) % len(self._upstreams)
                entry.cursor = (entry.cursor, self._turn, tuple(self._over))
                taken.append(entry)
                self._end_if_over()
            elif index in self._over or index in self._lost:
                self._turn = (index + 1) % len(self._upstreams)
            elif self._upstreams[index].ended:
                self._over.append(index)
                self._end_if_over()
            else:
                break
        return taken

    def _end_if_over(self) -> None:
        if len(self._over) + len(self._lost) == len(self._upstreams):
            self._end()


class MixNode(_InputsNode):
    """Draws the upstream of each entry by weight, and goes on with the others when one ends.

    Cursor: that of each upstream, the number of draws, who has ended, and, if there are any, who has failed. Which
    upstream is drawn depends on the seed, the number of the draw, the weights at that draw and on these, not on who is
    fast. After a resume those that had failed are tried first: so the rest is drawn alike where they fail again.

    It ends when no source that has not ended has a weight, nor will have one by its schedule. What a function of the
    user's will say nobody knows: there it ends at the first draw that has no weight.

    Args:
        upstreams: The sources.
        weights: Of each; or who says what they are at each draw.
        seed: For the draws.
        repetitions: Which of the enclosing `repeat` stages it is in.
        lengths: Gives the samples that each source has in an epoch of its own, as far as that is known.
    """

    def __init__(
        self,
        upstreams: Sequence[Node],
        weights: "Sequence[float] | MixControl",
        seed: int,
        repetitions: tuple[int, ...] = (),
        lengths: Callable[[], Sequence[int | None]] = tuple,
    ) -> None:
        super().__init__(upstreams)
        self._lengths = lengths
        self._control = weights if isinstance(weights, MixControl) else None
        self._repetitions = in_repetitions(repetitions)
        self._until: int | None = None  # the draw before which the weights do not change; None: they do not
        self._version = -1  # of the control's weights
        self._given = (1.0,) * len(upstreams) if isinstance(weights, MixControl) else tuple(weights)
        self._bounds: list[float] = []  # sums of the weights; 0 is added for those that have ended or failed
        self._meters: list[StageMeter] = []
        self._seed = seed
        self._random = Random()
        self._draws = 0
        self._next_input: int | None = None
        self._over: list[int] = []
        self._to_try: list[int] = []  # those that had failed before a resume
        self._tried: dict[int, Entry] = {}  # what they gave
        self._asking: asyncio.Future[WeightBlock] | None = None  # the user's function, for weights
        if self._control is None:
            self._weigh()

    def resume(self, cursor: Any) -> None:
        cursors, draws, over, *lost = cursor_parts(cursor, 4 if len(cursor_sequence(cursor)) == 4 else 3)
        super().resume(cursors)
        self._draws = as_count(draws)
        last = len(self._upstreams) - 1
        self._over = _distinct(over, last)
        self._to_try = _distinct([*self._over, *cursor_sequence(lost[0])], last)[len(self._over) :] if lost else []
        self._lost.update(self._to_try)
        if self._control is not None:
            self._control.begin((self._repetitions, self._draws))
        self._weigh()
        self._draw_from_here()

    def start(self, run: "Run", kick: Kick) -> None:
        if self._control is not None:
            if self._control.place is None:
                self._control.begin((self._repetitions, 0))
            self._meters = [run.adopt(StageMeter(f"mix: {name}", "fold")) for name in self._control.mixture.names]
            for meter, length in zip(self._meters, self._lengths(), strict=False):
                meter.epoch_length = length
            if self._control.mixture.by_function is not None:
                self._run, self._kick = run, kick
                self._threads = run.threads(1, "weights")
        self._weigh()
        super().start(run, kick)

    def poll(self, limit: int) -> list[Entry]:
        if self._control is None:
            return self._poll(limit)
        with self._control.lock:  # so that a change is of one draw
            return self._poll(limit)

    def _poll(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        while self._to_try:
            if len(taken) == limit or not self._try(self._to_try[0], taken):
                return taken
            del self._to_try[0]
            self._weigh()
        while len(taken) < limit:
            if self._next_input is None and self._control is not None:
                place = self._repetitions, self._draws
                if (number := self._control.missing(place)) is not None:
                    if not self._has_weights(self._control, number):
                        break
                    continue
                if not self.ended and (failure := self._control.failure(place)) is not None:
                    last = Entry.last(failure, tuple(self._cursors), None)
                    last.cursor = self._cursor(last, self._draws, self._lost)
                    taken.append(last)
                    self._end()
                    break
                self._control.place = (self._repetitions, self._draws + 1)  # before: who sets weights now is too late
                if self._is_changed(self._control):
                    self._weigh()
                if not (self.ended or self._bounds[-1]) and self._until is not None:
                    if self._control.mixture.by_function is not None:
                        self._end()
                        break
                    self._skip_to(self._until)
                    continue
            if self.ended:
                break
            index = self._draw()
            upstream = self._upstreams[index]
            run = [self._tried.pop(index)] if index in self._tried else upstream.poll(1)
            if run:
                entry = self._emit(run[0], index)
                if entry.error is not None and self._control is not None:
                    add_note(entry.error, f"aioloader: source {self._control.mixture.names[index]!r} of the mix")
                failed = entry.state == ONE_LOST  # which is no sample: it is drawn again, after a resume at least
                entry.cursor = self._cursor(entry, self._draws - failed, self._lost - {index})
                taken.append(entry)
                if index in self._lost:
                    self._weigh()
                elif self._meters:
                    self._meters[index].samples += 1
                if index in self._lost or not failed:
                    self._next_input = None
            elif upstream.ended:
                self._next_input = None
                self._over.append(index)
                self._weigh()
            else:
                break
        return taken

    def _has_weights(self, control: MixControl, number: int) -> bool:
        """Whether the user's function has said its weights for block `number`; it is asked if it was not."""
        function = control.mixture.by_function
        assert function is not None
        if self._asking is None:
            if self.ended:  # all have
                return False
            self._asking = self._run.submit(self._threads, function.block, number)
            self._asking.add_done_callback(lambda _: self._kick())
            return False
        if not self._asking.done():
            return False
        asked, self._asking = self._asking, None
        control.found(asked.result())
        self._weigh()
        return True

    def _cursor(self, entry: Entry, draws: int, lost: set[int]) -> tuple[Any, ...]:
        cursor = (entry.cursor, draws, tuple(self._over))
        return (*cursor, tuple(sorted(lost))) if lost else cursor

    def _is_changed(self, control: MixControl) -> bool:
        return control.version != self._version or (self._until is not None and self._draws >= self._until)

    def _weigh(self) -> None:
        """Work out where each source's part of the draws ends; nothing is left where none has a weight."""
        if self._control is not None:
            self._given, self._until = self._control.weights((self._repetitions, self._draws))
            self._version = self._control.version
        out = {*self._over, *self._lost}
        self._bounds = list(accumulate(0.0 if index in out else weight for index, weight in enumerate(self._given)))
        self.ended = not self._bounds[-1] and not self._to_try and (self._until is None or len(out) == len(self._given))

    def _try(self, index: int, taken: list[Entry]) -> bool:
        """Ask a source that had failed before a resume; False: it does not know yet."""
        upstream = self._upstreams[index]
        run = upstream.poll(1)
        if not run and not upstream.ended:
            return False
        if run and run[0].state == LAST:
            entry = self._emit(run[0], index)
            entry.cursor = self._cursor(entry, self._draws, self._lost)
            taken.append(entry)
        else:
            self._lost.remove(index)
            if run:
                self._tried[index] = run[0]
            else:
                self._over.append(index)
        return True

    def _draw(self) -> int:
        if self._next_input is None:
            if not self._draws % BLOCK:
                self._random = random_of_block(self._seed, self._draws // BLOCK)
            bounds = self._bounds
            point = self._random.random() * bounds[-1]
            index = bisect_right(bounds, point)
            self._next_input = index if index < len(bounds) else bisect_left(bounds, bounds[-1])  # it was rounded up
            self._draws += 1
        return self._next_input

    def _skip_to(self, draws: int) -> None:
        """None of the sources that are left has a weight before that draw, though one may have later."""
        self._draws = draws
        self._draw_from_here()
        self._weigh()

    def _draw_from_here(self) -> None:
        block, before = divmod(self._draws, BLOCK)
        self._random = random_of_block(self._seed, block)
        self._random.getrandbits(64 * before)  # what those before it in the block have taken


class ZipNode(_InputsNode):
    """Tuples of one entry of each upstream; ends with the shortest. Cursor: that of each upstream."""

    def __init__(self, upstreams: Sequence[Node]) -> None:
        super().__init__(upstreams)
        self._pending: list[deque[Entry]] = [deque() for _ in self._upstreams]

    def poll(self, limit: int) -> list[Entry]:
        for upstream, pending in zip(self._upstreams, self._pending, strict=True):
            if len(pending) < limit and not upstream.ended and not self.ended:
                pending.extend(upstream.poll(limit - len(pending)))
        taken: list[Entry] = []
        while not self.ended and len(taken) < limit:
            if (lost := self._error_of_a_part()) is not None:
                taken.append(lost)
                continue
            if not all(self._pending):
                break
            taken.append(self._pair([pending.popleft() for pending in self._pending]))
        if len(taken) < limit and not self.ended:
            taken.extend(self._look_for_the_end())
        return taken

    def _error_of_a_part(self) -> Entry | None:
        """An upstream has several sources, and one of these has failed: nothing is paired up with that."""
        for index, pending in enumerate(self._pending):
            if pending and pending[0].state == ONE_LOST:
                return self._emit(pending.popleft(), index)
        return None

    def _look_for_the_end(self) -> list[Entry]:
        """Ask in order, as Python's `zip` does: whoever comes first fails, or ends it, or is waited for."""
        for upstream, pending in zip(self._upstreams, self._pending, strict=True):
            if pending and pending[0].state == LAST:
                last = Entry.last(pending[0].error or AssertionError(), tuple(self._cursors), pending[0].position)
                self._end()
                return [last]
            if not pending:
                if upstream.ended:
                    self._end()
                break
        return []

    def _pair(self, entries: list[Entry]) -> Entry:
        before = tuple(self._cursors)
        self._cursors = [entry.cursor for entry in entries]
        paired = Entry(
            tuple(entry.value for entry in entries),
            tuple(self._cursors),
            tuple(entry.key for entry in entries),
            entries[0].position,
        )
        if (attempts := max(entry.attempts for entry in entries)) > 1:
            paired.attempts = attempts
        paired.begun = earliest([entry.begun for entry in entries])
        for entry in entries:
            if entry.state == LAST:
                paired.state = LAST
                paired.error = entry.error
                paired.cursor = before  # the others of this pair wait for the one that failed
                self._end()
                break
            if paired.error is None:
                paired.error = entry.error
        return paired


def _distinct(over: Any, last: int) -> list[int]:
    """The numbers of sources that have ended, each once.

    Raises:
        ValueError: They are none.
    """
    found = [as_count(index, last) for index in cursor_sequence(over)]
    if len(set(found)) < len(found):
        raise ValueError(f"sources end once, got {over!r}"[:200])
    return found
