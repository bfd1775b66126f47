"""`mix`: draws which of several upstreams gives the next entry."""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.entry import LAST, ONE_LOST, Entry
from aioloader.core.mix_control import MixControl, in_repetitions
from aioloader.core.mixture import WeightBlock
from aioloader.core.safe_text import add_note
from aioloader.core.seeds import BLOCK, random_of_block
from aioloader.engine.combine import InputsNode, distinct
from aioloader.engine.node import Kick, Node
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["MixNode"]


class MixNode(InputsNode):
    """Draws the upstream of each entry by weight, and goes on with the others when one ends.

    Cursor: that of each upstream, the number of draws, who has ended, and, if there are any, who has failed; with names
    who has failed in any case, and how many samples each has given, from where statistics count on. Which upstream is
    drawn depends on the seed, the number of the draw, the weights at that draw and on these, not on who is fast. After
    a resume those that had failed are tried first: so the rest is drawn alike where they fail again.

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
        self._counts = [0] * len(upstreams)  # samples of each, for these and for states
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
        cursors, draws, over, *more = cursor_parts(cursor, min(5, max(3, len(cursor_sequence(cursor)))))
        lost, counts = (*more, (), ())[:2]
        super().resume(cursors)
        if len(more) > 1:  # states have not always had them
            self._counts = [as_count(count) for count in cursor_parts(counts, len(self._upstreams))]
        self._draws = as_count(draws)
        last = len(self._upstreams) - 1
        self._over = distinct(over, last)
        self._to_try = distinct([*self._over, *cursor_sequence(lost)], last)[len(self._over) :]
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
            for meter, count in zip(self._meters, self._counts, strict=True):
                meter.samples += count  # later rounds of a `repeat` count on with the same meter
            if self._control.mixture.by_function is not None:
                self._run, self._kick = run, kick
                self._threads = run.threads(1, "weights")
        self._weigh()
        super().start(run, kick)

    def close(self) -> None:
        super().close()
        for meter in self._meters:  # the next round of a `repeat` counts on
            meter.retired = True
        self._meters = []

    def poll(self, limit: int) -> list[Entry]:
        if self._control is None:
            return self._poll(limit)
        with self._control.lock:  # so that a change is of one draw
            return self._poll(limit)

    def _poll(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        if self._to_try and not self._try_all(limit, taken):
            return taken
        control = self._control
        while len(taken) < limit:
            draws = self._next_input is None
            if (draws and control is not None and not self._may_draw(control, taken)) or self.ended:
                break
            index = self._draw()
            upstream = self._upstreams[index]
            run = [self._tried.pop(index)] if index in self._tried else upstream.poll(1)
            if run:
                entry = self._emit(run[0], index)
                if entry.error is not None and control is not None:
                    add_note(entry.error, f"aioloader: source {control.mixture.names[index]!r} of the mix")
                failed = entry.state == ONE_LOST  # which is no sample: it is drawn again, after a resume at least
                if self._meters and not failed:  # by names
                    self._counts[index] += 1
                    self._meters[index].samples += 1
                entry.cursor = self._cursor(entry, self._draws - failed, self._lost - {index})
                taken.append(entry)
                if index in self._lost:
                    self._weigh()
                if index in self._lost or not failed:
                    self._next_input = None
            elif upstream.ended:
                self._next_input = None
                self._over.append(index)
                self._weigh()
            else:
                break
        return taken

    def _may_draw(self, control: MixControl, taken: list[Entry]) -> bool:
        """Whether the weights of the next draw are known, and leave something to draw from; else it may have ended."""
        while True:
            place = self._repetitions, self._draws
            if (number := control.missing(place)) is not None:
                if not self._has_weights(control, number):
                    return False
                continue
            if not self.ended and (failure := control.failure(place)) is not None:
                last = Entry.last(failure, tuple(self._cursors), None)
                last.cursor = self._cursor(last, self._draws, self._lost)
                taken.append(last)
                self._end()
                return False
            control.place = (self._repetitions, self._draws + 1)  # before: who sets weights now is too late
            if control.version != self._version or (self._until is not None and self._draws >= self._until):
                self._weigh()
            if self.ended or self._bounds[-1] or self._until is None:
                return True
            if control.mixture.by_function is not None:
                self._end()
                return False
            self._skip_to(self._until)

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
        if self._control is not None:
            return (*cursor, tuple(sorted(lost)), tuple(self._counts))
        return (*cursor, tuple(sorted(lost))) if lost else cursor

    def _weigh(self) -> None:
        """Work out where each source's part of the draws ends; nothing is left where none has a weight."""
        if self._control is not None:
            self._given, self._until = self._control.weights((self._repetitions, self._draws))
            self._version = self._control.version
        out = {*self._over, *self._lost}
        self._bounds = list(accumulate(0.0 if index in out else weight for index, weight in enumerate(self._given)))
        self.ended = not self._bounds[-1] and not self._to_try and (self._until is None or len(out) == len(self._given))

    def _try_all(self, limit: int, taken: list[Entry]) -> bool:
        """Ask all sources that had failed before a resume; False: one does not know yet, or `taken` is full."""
        while self._to_try:
            if len(taken) == limit or not self._try(self._to_try[0], taken):
                return False
            del self._to_try[0]
            self._weigh()
        return True

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
