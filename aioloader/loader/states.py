"""Epochs that are counted, saved and resumed."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from aioloader.core.checks import check_count
from aioloader.core.generator_states import packed, unpacked
from aioloader.core.typevars import T_co
from aioloader.engine.progress import Progress
from aioloader.errors import StateError
from aioloader.loader.planned import Planned
from aioloader.plan.lengths import sure_length
from aioloader.plan.parts import generators_in, global_draws
from aioloader.plan.plan import with_ranks
from aioloader.plan.ranks import is_sharded, shard_state
from aioloader.plan.shape import ShapeThen, shape_of
from aioloader.plan.state import check_fits, contents_of, make_state, ranges_of
from aioloader.sources.stand_in import StandIn, stand_in
from aioloader.stages.flow import STRENGTH, Guarantee
from aioloader.stages.rank import has_process_group

__all__ = ["Resumable"]


class Resumable(Planned[T_co]):
    """A loader that knows which epoch comes next, and where it begins."""

    def __init__(self) -> None:
        super().__init__()
        self._next_epoch = 0
        self._progress: Progress | None = None  # of the newest epoch
        self._loaded: dict[str, Any] | None = None  # a state that the next epoch begins with
        self._loaded_epoch_pinned = False  # `set_epoch` has named its epoch since
        self._fixed: dict[str, Any] | None = None  # what the next epoch draws from, since a state has told of it
        self._stand_in: StandIn | None = None  # for torch's global generator, which is that of another process
        self._draws_again = False  # its epochs have begun before, in another loader
        self._leave_out: dict[int, list[range]] = {}  # steps, by epoch

    # -- how an epoch begins -----------------------------------------------------------------------------------------

    @abstractmethod
    def _look_for_ranks(self) -> None:
        """Called before an epoch begins."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch`; later ones count on from there.

        A loaded state that has not begun is kept if it is of this epoch, since trainers call this before each one. A
        state of another epoch is dropped, with a warning if it was in the middle of that epoch.

        Args:
            epoch: At least 0. Shuffle orders depend on it.
        """
        number = check_count("epoch", epoch, least=0)
        loaded = self._loaded
        if loaded is not None and loaded["epoch"] == number:
            self._loaded_epoch_pinned = True
        elif loaded is not None:
            self._loaded = None
            if loaded["cursor"] is not None:
                warnings.warn(
                    f"set_epoch({number}) drops the state that was loaded, which is of epoch {loaded['epoch']} after "
                    f"{loaded['batches']} batches; call set_epoch({loaded['epoch']}) to go on there",
                    stacklevel=2,
                )
        self._next_epoch = number

    @contextmanager
    def _beginning(self) -> Iterator[Progress]:
        """Count an epoch; one that was loaded begins where its state says. If the block fails, none has begun.

        `state_dict` may be asked meanwhile, in another thread or a signal handler, which cannot wait for a lock of the
        code that it has interrupted. So the place of the epoch is there before what was loaded is taken, and it finds
        one of them.
        """
        self._look_for_ranks()
        with self._lock:
            loaded, epoch_pinned, before, epoch = (
                self._loaded,
                self._loaded_epoch_pinned,
                self._progress,
                self._next_epoch,
            )
            fixed = self._fixed
            if loaded is None:
                progress = Progress(epoch)
                progress.loader_state = self._random_state() | (self._order_source() if fixed is None else fixed)
            else:
                progress = Progress(epoch, loaded["cursor"], loaded["batches"])
                progress.loader_state = self._random_of(loaded)
                progress.epoch_pinned = epoch_pinned
            if self._tracer is not None:
                progress.meter = self._tracer.consumer(epoch)
            progress.begun_before |= self._draws_again
            progress.skipped_steps = self._leave_out.get(epoch, [])
            others = {number: steps for number, steps in self._leave_out.items() if steps}
            self._leave_out = {epoch: progress.skipped_steps} | others
            with suppress(Exception):  # the dataset's own `__len__`, which may never be needed
                progress.shape = ShapeThen(self._plan)
            before_stand_in = self._stand_in
            self._stand_in = self._stands_in(progress, loaded)
            self._progress = progress
            self._loaded = self._fixed = None
            self._next_epoch = epoch + 1
        try:
            if loaded is not None and progress.cursor is not None:  # the dataset may have grown since it was loaded
                check_fits(
                    loaded, loader=self._kind, pipeline=shape_of(self._plan_of_state), check_ranks=self._check_ranks
                )
            if loaded is not None or fixed is not None:
                self._set_random_state(progress.loader_state)
            self._begins(progress)
            with suppress(Exception):
                progress.length = sure_length(self._plan, resumed=progress.resumed)
            yield progress
        except BaseException:
            with self._lock:
                if loaded is not None or self._progress is progress:  # whatever it was: the state is not lost with it
                    self._loaded, self._loaded_epoch_pinned, self._next_epoch = loaded, epoch_pinned, epoch
                    self._progress, self._fixed, self._stand_in = before, fixed, before_stand_in
            raise

    def _stands_in(self, progress: Progress, loaded: dict[str, Any] | None) -> StandIn | None:
        """What stands in for torch's global generator when an epoch begins, `loaded` or not."""
        if loaded is None:
            return None if self._stand_in is None else self._stand_in.moved()
        there = progress.loader_state.get("drawn")
        if progress.cursor is not None:  # what it draws is drawn
            there = progress.loader_state.get("next", there)
        return None if there is None or not global_draws(self._plan) else stand_in(unpacked(there))

    def _begins(self, progress: Progress) -> None:
        """An epoch begins: tell those of the user's who are to know, and note on it what they said."""
        self._begun_plan = with_ranks(self._plan) if has_process_group() and is_sharded(self._plan) else None
        if self._sampled is not None:
            self._sampled.note(progress)

    def _order_source(self) -> dict[str, Any]:
        """The states of the generators that the next epoch draws its orders from, as they are now; JSON-able."""
        state: dict[str, Any] = {}
        if generators := generators_in(self._plan):
            state["generators"] = [packed(generator.get_state()) for generator in generators]
        if global_draws(self._plan):
            state["drawn"] = packed(self._global_state())
        return state

    def _global_state(self) -> torch.Tensor:
        """What the next epoch would draw from if it began now, where it draws from torch's global generator."""
        stand_in = self._stand_in
        if stand_in is None or (moved := stand_in.moved()) is None:
            return torch.get_rng_state()
        return moved.instead

    def _fixed_random_state(self) -> dict[str, Any]:
        """What the next epoch depends on, from now on: whatever is drawn meanwhile, it begins as a state says."""
        with self._lock:
            if self._fixed is None:
                self._fixed = self._order_source()
            return self._random_state() | self._fixed

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position of the newest epoch: after the last batch that its iterator gave.

        A small dict that JSON can hold, the same for every concurrency, kind of worker and face. Its keys never change,
        and its values are integers and strings. Call it at any time, from any thread; it costs nothing unless you do. A
        batch that raised an error counts as given, batches made ahead do not. After the last batch the state is the
        beginning of the next epoch, and asking for it settles that epoch's order. Right after `load_state_dict` it is
        what was loaded.

        `docs/checkpoint.md` has the schema. `"guarantee"` says what a resume gives: `"exact"`, `"replayed"` (a source
        is read again from its beginning, which is exact if it gives the same again) or `"at-least-once"`.
        """
        loaded = self._loaded
        if loaded is not None:
            random = self._random_of(loaded)
            return self._make_state(
                loaded["epoch"], loaded["batches"], loaded["cursor"], random, guarantee=loaded["guarantee"]
            )
        return self._state_of(self._progress)

    def _random_of(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """What else the epoch of a state that was loaded depends on, with what was said since."""
        return dict(loaded["random"] or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next epoch continue the one that `state` was taken from, right after the last batch it had given.

        Running iterators are not touched. Concurrency, number and kind of workers, prefetch, executor, device and
        face may differ from those the state was taken with; what decides the order may not.

        Raises:
            StateError: `state` is no state, or is of another version, other stages or another dataset. The loader is
                unchanged.
        """
        loaded = contents_of(state)
        check_fits(loaded, loader=self._kind, pipeline=shape_of(self._plan_of_state), check_ranks=self._check_ranks)
        skipped_steps = ranges_of(loaded["left_out"])
        self._check_loaded(loaded)
        with self._lock:
            self._loaded = loaded
            self._loaded_epoch_pinned = False
            self._fixed = None
            self._next_epoch = loaded["epoch"]
            self._leave_out = skipped_steps
        if self._sampled is not None:  # now: who tells them another one before that epoch begins means it
            self._sampled.sampling.set_epochs(loaded["random"] or {})

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        """Refuse a state that this loader could not go on from.

        Raises:
            StateError: Why.
        """
        cursor = loaded["cursor"]
        if self._sampled is not None and cursor is not None:
            self._sampled.check_place(loaded["batches"], cursor)
        part = "random"
        try:
            self._check_random_state(loaded["random"] or {}, begun=cursor is not None)
            part = "cursor"
            if cursor is not None:
                self._nodes(Progress(loaded["epoch"], cursor, loaded["batches"])).resume(cursor)
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise StateError(f"{part!r} of the state does not fit this loader, or is broken: {error}") from error

    def _state_of(self, progress: Progress | None) -> dict[str, Any]:
        if progress is None:
            if self._loaded is not None:
                return self.state_dict()
            return self._make_state(self._next_epoch, 0, None, self._fixed_random_state())
        if not progress.complete:
            return self._state_at(progress, progress.batches, progress.cursor)
        newest = self._progress
        if newest is None or progress is newest:
            return self._make_state(self._next_epoch, 0, None, self._fixed_random_state())
        epoch = progress.epoch + 1
        random = dict(newest.loader_state) if newest.epoch == epoch else self._fixed_random_state()
        return self._make_state(epoch, 0, None, random)

    def _state_at(self, progress: Progress, batches: int, cursor: Any) -> dict[str, Any]:
        """The state where the epoch of `progress` had given `batches`, and `cursor` was that of the last one."""
        random = dict(progress.loader_state)
        guarantee = self._guarantee_without_a_source if progress.source_failed else self._guarantee
        if cursor is not None and "drawn" in random:
            random["next"], others_draw = self._next_draws(progress)
            guarantee = max(guarantee, "replayed" if others_draw else "exact", key=STRENGTH.index)
        return self._make_state(progress.epoch, batches, cursor, random, progress.shape, guarantee=guarantee)

    def _next_draws(self, progress: Progress) -> tuple[str, bool]:
        """What the epoch after one that is under way draws from, and whether that depends on what the program draws."""
        newest = self._progress
        if newest is not None and newest.epoch == progress.epoch + 1:
            return newest.loader_state.get("drawn", progress.loader_state["drawn"]), False
        now, left = packed(torch.get_rng_state()), progress.left_global
        drawn = now if self._stand_in is None else packed(self._global_state())
        return drawn, left is not None and left != now

    def _make_state(
        self,
        epoch: int,
        batches: int,
        cursor: Any,
        random: dict[str, Any] | None,
        shape: ShapeThen | None = None,
        *,
        guarantee: Guarantee | None = None,
    ) -> dict[str, Any]:
        """A state.

        Args:
            epoch: See `docs/checkpoint.md`, as for all that follows.
            batches: See there.
            cursor: See there.
            random: See there.
            shape: Of the plan, where it is not that of now.
            guarantee: See there; None: that of now.
        """
        if self._sampled is not None:
            batches, cursor = self._sampled.place(batches, cursor)
        return make_state(
            loader=self._kind,
            epoch=epoch,
            batches=batches,
            cursor=cursor,
            guarantee=guarantee or self._guarantee,
            pipeline=shape_of(self._plan_of_state) if shape is None else shape.shape,
            ranks=shard_state(self._plan_of_state) if self._sampled is None else None,
            random=self._random_kept(random, epoch, batches, cursor),
            left_out=self._leave_out,
        )

    def _random_kept(
        self, random: dict[str, Any] | None, epoch: int, batches: int, cursor: Any
    ) -> dict[str, Any] | None:
        """What a state keeps of `random`: that which decides what comes after `cursor`."""
        return random

    @property
    def first_step(self) -> int:
        """The number of the batch that the next epoch begins with: 0, unless a state was loaded."""
        loaded = self._loaded
        return 0 if loaded is None else int(loaded["batches"])
