"""What `Pipeline` and `DataLoader` share: iteration by both faces, epochs, closing, insight."""

import asyncio
import threading
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from secrets import randbits
from typing import Any, Final, Self
from weakref import WeakSet, finalize

import torch
from anyio.to_thread import run_sync

from aioloader.core.checks import check_count
from aioloader.core.cursors import as_count
from aioloader.core.forks import tell_of_fork
from aioloader.core.memory import Alloc
from aioloader.core.safe_text import safe_repr
from aioloader.core.typevars import T_co
from aioloader.device import Transfer, Transferred
from aioloader.engine.delivery import AsyncDelivery, Delivery, Receive, SyncDelivery
from aioloader.engine.faces import AsyncBatches, Batches
from aioloader.engine.loop_thread import LoopThread
from aioloader.engine.pausing import Paused
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import beginning
from aioloader.engine.run import CLOSE_SECONDS, Run
from aioloader.engine.watched import Watched
from aioloader.engine.window import Window
from aioloader.errors import SourceUsedUpError, StateError
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.insight.batch_info import BatchInfo
from aioloader.memory.pool import BatchMemory
from aioloader.plan.state import Shape, check_fits, contents_of, lengths_of, make_state, ranges_of, with_lengths
from aioloader.plan.unsplit import several_ranks, warn_of_unsplit
from aioloader.sources.sampler_order import check_draws, check_generators, packed, unpacked
from aioloader.sources.stand_in import StandIn, stand_in
from aioloader.stages.flow import STRENGTH, Guarantee

__all__ = ["Loader"]

_RANDOM: Final = frozenset(
    {"base_seed", "drawn", "draws_once", "epochs", "generators", "next", "sample_seed", "set_epoch", "weights"}
)


class Loader(Watched[T_co]):
    """An object whose every `iter()` or `aiter()` is one epoch of batches.

    Making an iterator is cheap and starts nothing; work starts, and the epoch is counted, at its first `next()`.
    Several iterators may be alive. When an epoch is over, or its iterator is dropped, no task and no thread of it
    remains; `close` ends everything that is left at once.
    """

    _split_by = "add .shard(), or .shard(0, 1) if this is a rank's part already"  # what to do

    def __init__(self) -> None:
        super().__init__()
        self._next_epoch = 0
        self._deliveries: WeakSet[Delivery] = WeakSet()
        self._progress: Progress | None = None  # of the newest epoch
        self._loaded: dict[str, Any] | None = None  # a state that the next epoch begins with
        self._loaded_epoch_pinned = False  # `set_epoch` has named its epoch since
        self._fixed: dict[str, Any] | None = None  # what the next epoch draws from, since a state has told of it
        self._stand_in: StandIn | None = None  # for torch's global generator, which is that of another process
        self._draws_again = False  # its epochs have begun before, in another loader
        self._entered = 0  # `with` blocks
        self._loop_thread: LoopThread | None = None
        self._transfer: Transfer | None = None
        self._memory: BatchMemory | None = None
        self._processes: WorkerThread | None = None
        self._random_seed: int | None = None
        self._leave_out: dict[int, list[range]] = {}  # steps, by epoch
        self._looked_for_ranks = False
        self._agrees = True  # with other ranks, where it is told to
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: epochs that are under way are the parent's, and so is all that is kept between them."""
        self._lock = threading.RLock()
        self._deliveries = WeakSet()
        self._loop_thread = None
        self._transfer = None
        self._processes = None
        self._forget_trace()

    # -- what a kind of loader says ----------------------------------------------------------------------------------

    @abstractmethod
    def _build(self, progress: Progress) -> Window:
        """The nodes of one epoch, not started, and all that they need."""

    @abstractmethod
    def _nodes(self, progress: Progress) -> Window:
        """The same, only to see whether a cursor fits: nothing is opened, drawn or used up."""

    @abstractmethod
    def _shape(self) -> Shape:
        """What decides which sample comes when."""

    def _lengths(self) -> list[int | None]:
        """Those of the datasets in `_shape`, in its order; they may change from one moment to the next."""
        return lengths_of(self._shape())

    def _ranks(self) -> dict[str, Any] | None:
        """What a state says of the ranks that share the samples; None: it knows of no others."""
        return None

    def _check_ranks(self, ranks: dict[str, Any] | None, begun: bool) -> None:
        """Refuse what a state says of ranks, if this one cannot go on from it.

        Args:
            ranks: What it says.
            begun: It is in the middle of an epoch.

        Raises:
            StateError: Why.
        """

    @abstractmethod
    def _guarantee(self) -> Guarantee:
        """What a resume gives."""

    def _guarantee_without_a_source(self) -> Guarantee:
        """The same after one of several sources has failed in this epoch."""
        return self._guarantee()

    def _sure_length(self, *, resumed: bool) -> int | None:
        """Batches of an epoch, if that is known; no matter of trust but in what the user has said here.

        Args:
            resumed: It is resumed in its middle.
        """
        return None

    def _random_state(self) -> dict[str, Any]:
        """What else the next epoch depends on that is random, or was told to samplers; JSON-able."""
        return {}

    def _generators(self) -> list[torch.Generator]:
        """The user's, from which orders are drawn."""
        return []

    def _draws_globally(self) -> bool:
        """Whether an order is drawn from torch's global generator."""
        return False

    def _set_epochs(self, state: dict[str, Any]) -> None:
        """Let samplers of the user's be in the epochs that `state` tells of, which is as above."""

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        """Refuse what `_set_random_state` could not take, or what is not enough.

        Args:
            state: What `_random_state` and `_order_source` gave.
            begun: It is that of an epoch that has begun.

        Raises:
            ValueError: Why.
        """
        if unknown := state.keys() - _RANDOM:
            raise ValueError(f"it holds {safe_repr(min(unknown))}, which is nothing that is drawn from")
        check_generators(state.get("generators", []), self._generators())
        if self._draws_globally():
            check_draws(state)
        if "sample_seed" in state:
            as_count(state["sample_seed"])

    def _set_random_state(self, state: dict[str, Any]) -> None:
        """Draw from what `state` tells of, once `_check_random_state` has let it pass."""
        self._random_seed = state.get("sample_seed", self._random_seed)
        for generator, its in zip(self._generators(), state.get("generators", ()), strict=False):
            generator.set_state(unpacked(its))

    def _order_source(self) -> dict[str, Any]:
        """The states of the generators that the next epoch draws its orders from, as they are now; JSON-able."""
        state: dict[str, Any] = {}
        if generators := self._generators():
            state["generators"] = [packed(generator.get_state()) for generator in generators]
        if self._draws_globally():
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

    def _gives_all(self) -> bool:
        """Whether each of several ranks would get the same, as far as can be told."""
        return False

    def _tell_of_ranks(self, world_size: int) -> None:
        """Warn of what several ranks may not want; called once, as the first epoch begins.

        Args:
            world_size: How many there are; 0: nobody knows of others.
        """

    def _check_usable(self) -> None:
        """Raise now, at `iter()`, what would make an epoch impossible."""

    # -- iteration ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Batches[T_co]:
        """An iterator for `for`: the loader runs on an event loop in a thread of its own."""
        self._check_usable()
        return Batches(self)

    def __aiter__(self) -> AsyncBatches[T_co]:
        """An iterator for `async for`: the loader runs on the caller's event loop."""
        self._check_usable()
        return AsyncBatches(self)

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
            with suppress(Exception):  # a `__len__` of the user's, which may never be needed
                progress.lengths = self._lengths()
            before_stand_in = self._stand_in
            self._stand_in = self._stands_in(progress, loaded)
            self._progress = progress
            self._loaded = self._fixed = None
            self._next_epoch = epoch + 1
        try:
            if loaded is not None and progress.cursor is not None:  # the dataset may have grown since it was loaded
                check_fits(loaded, loader=self._kind, pipeline=self._shape(), check_ranks=self._check_ranks)
            if loaded is not None or fixed is not None:
                self._set_random_state(progress.loader_state)
            self._begins(progress)
            with suppress(Exception):
                progress.length = self._sure_length(resumed=progress.resumed)
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
        return None if there is None or not self._draws_globally() else stand_in(unpacked(there))

    def _look_for_ranks(self) -> None:
        """Once, when the first epoch begins: trainers make their ranks between the loader and its first batch."""
        if not self._looked_for_ranks:
            self._looked_for_ranks = True
            world_size = several_ranks()
            if world_size and self._gives_all():
                warn_of_unsplit(self, world_size, self._split_by)
            self._tell_of_ranks(world_size)

    def _begins(self, progress: Progress) -> None:
        """An epoch begins: tell those of the user's who are to know, and note on it what they said."""

    def _sample_seed(self, seed: int | None) -> int:
        """For the random numbers of samples: the user's `seed`, else one that is drawn once for this loader."""
        if seed is not None:
            return seed
        with self._lock:
            if self._random_seed is None:
                self._random_seed = randbits(63)  # not from torch's generator, whose draws are the user's
            return self._random_seed

    def _seed_state(self, seed: int | None) -> dict[str, Any]:
        """What a state holds of it: that which the user's code does not."""
        return {} if seed is not None else {"sample_seed": self._sample_seed(None)}

    def _open_run(self) -> Run:
        with self._beginning() as progress:
            window = self._build(progress)
            if progress.cursor is not None:
                window.resume(progress.cursor)
            for begin in window.beginnings:  # here, where a failure leaves everything as it was
                begin()
            run = Run(window, progress.epoch, progress, self._pauses)
            run.tracer, run.tuner = self._tracer, self._tuner
        self._watch(progress, run.meters)
        return run

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
        check_fits(loaded, loader=self._kind, pipeline=self._shape(), check_ranks=self._check_ranks)
        skipped_steps = ranges_of(loaded["left_out"])
        self._check_loaded(loaded)
        with self._lock:
            self._loaded = loaded
            self._loaded_epoch_pinned = False
            self._fixed = None
            self._next_epoch = loaded["epoch"]
            self._leave_out = skipped_steps
        self._set_epochs(loaded["random"] or {})  # now: who tells them another one before that epoch begins means it

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        """Refuse a state that this loader could not go on from.

        Raises:
            StateError: Why.
        """
        cursor = loaded["cursor"]
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
        random, lengths = dict(progress.loader_state), progress.lengths
        guarantee = self._guarantee_without_a_source() if progress.source_failed else self._guarantee()
        if cursor is not None and "drawn" in random:
            random["next"], others_draw = self._next_draws(progress)
            guarantee = max(guarantee, "replayed" if others_draw else "exact", key=STRENGTH.index)
        return self._make_state(progress.epoch, batches, cursor, random, lengths, guarantee=guarantee)

    def _next_draws(self, progress: Progress) -> tuple[str, bool]:
        """What the epoch after one that is under way draws from, and whether that depends on what the program draws."""
        newest = self._progress
        if newest is not None and newest.epoch == progress.epoch + 1:
            return newest.loader_state.get("drawn", progress.loader_state["drawn"]), False
        now = torch.get_rng_state()
        left = progress.left_global
        return packed(self._global_state()), left is not None and not torch.equal(left, now)

    def _make_state(
        self,
        epoch: int,
        batches: int,
        cursor: Any,
        random: dict[str, Any] | None,
        lengths: Sequence[int | None] | None = None,
        *,
        guarantee: Guarantee | None = None,
    ) -> dict[str, Any]:
        """A state.

        Args:
            epoch: See `docs/checkpoint.md`, as for all that follows.
            batches: See there.
            cursor: See there.
            random: See there.
            lengths: Of the datasets, where they are not those of now.
            guarantee: See there; None: that of now.
        """
        return make_state(
            loader=self._kind,
            epoch=epoch,
            batches=batches,
            cursor=cursor,
            guarantee=guarantee or self._guarantee(),
            pipeline=self._shape() if lengths is None else with_lengths(self._shape(), lengths),
            ranks=self._ranks(),
            random=random,
            left_out=self._leave_out,
        )

    @property
    def first_step(self) -> int:
        """The number of the batch that the next epoch begins with: 0, unless a state was loaded."""
        loaded = self._loaded
        return 0 if loaded is None else int(loaded["batches"])

    # -- provenance --------------------------------------------------------------------------------------------------

    def last_batch_info(self) -> BatchInfo | None:
        """Where the batch comes from that the newest epoch gave last; None before its first."""
        return None if self._progress is None else self._progress.info

    def replay(self, step: int) -> T_co:
        """Make batch number `step` of the newest epoch once more, exactly. If it was an error, that is raised again.

        The epoch goes on undisturbed, and no random generator is left changed: samplers, generators and iterables with
        a state are copied, and torch's global generator is restored, so draw nothing from it in another thread
        meanwhile. A source that cannot be entered in the middle is read again up to there, and must give the same
        samples. What had failed by chance may come this time. The replay runs on a loop of its own, as `for` does;
        `areplay` runs on the caller's.

        Args:
            step: From 0, as in `BatchInfo`; one of the last 4096.

        Raises:
            LookupError: The step is not known (any more), or the batch cannot be made again: its samples come in
                another order each time, or are gone.
        """
        with self._replaying(step) as again, torch.random.fork_rng(devices=()), again:
            return next(iter(again))

    async def areplay(self, step: int) -> T_co:
        """`replay` for async code: on the caller's event loop, where its clients and sessions work.

        What your functions draw from torch's global generator meanwhile stays drawn.

        Args:
            step: See `replay`.

        Raises:
            LookupError: See `replay`.
        """
        with self._replaying(step) as again:
            async with again:
                return await anext(aiter(again))

    @contextmanager
    def _replaying(self, step: int) -> Iterator[Self]:
        """A loader of its own whose next batch is that of `step`."""
        step = check_count("step", step, least=0)
        if (why := self._never_again()) is not None:
            raise LookupError(f"replay gives the very batch of an earlier step, but {why}; keep the batch, or its keys")
        progress = self._progress
        done, history = (0, []) if progress is None else (progress.batches, list(progress.history))
        first = done - len(history)
        if progress is None or not first <= step < done:
            known = f"steps {first} to {done - 1} of epoch {progress.epoch}" if progress and history else "none"
            raise LookupError(
                f"replay gives a batch that was handed out before and whose place is still known, got {step=}, known "
                f"are {known}; for others take a state_dict() there, and load it into another loader"
            )
        cursor = history[step - first]
        if cursor is None:
            cursor = beginning(progress.cursor)
        again = self._detached()
        random = self._random_state()
        try:
            again.load_state_dict(
                self._make_state(progress.epoch, step, cursor, progress.loader_state, progress.lengths)
            )
            again._leave_out = {}
            again._draws_again = True
            yield again
        except SourceUsedUpError as error:
            raise LookupError(f"replay reads the source again, but {error}") from error
        finally:
            self._replayed(random)

    def _replayed(self, random: dict[str, Any]) -> None:
        """Put back what a replay has told those of the user's that are not copied; `random` is from before."""

    def _detached(self) -> Self:
        """Another loader of the same, that can be iterated without moving anything that this one draws or reads from.

        Raises:
            LookupError: Something of the user's cannot be copied.
        """
        again = Loader.__new__(type(self))
        again.__setstate__(self.__getstate__())
        again._random_seed = self._random_seed
        again._looked_for_ranks = True
        again._agrees = False
        return again

    def _never_again(self) -> str | None:
        """Why a batch cannot be made once more; None: it can."""
        match self._guarantee():
            case "live":
                return "what has been sent cannot be read again"
            case "at-least-once":
                return "samples come in another order each time"
        return None

    def skip_steps(self, first: int, stop: int, *, epoch: int | None = None) -> None:
        """Leave out batches `first` to `stop - 1` of an epoch, errors included; the state records it.

        They are made and dropped, so that all other batches stay the same.

        Args:
            first: From 0, as in `BatchInfo`.
            stop: More than `first`.
            epoch: Default: the one that is under way, or else the next one.
        """
        first = check_count("first", first, least=0)
        stop = check_count("stop", stop, least=first + 1, hint="skip_steps(3, 5) leaves out steps 3 and 4")
        if epoch is None:
            under_way = self._progress if self._loaded is None else None
            epoch = self._next_epoch if under_way is None or under_way.complete else under_way.epoch
        steps = self._leave_out.setdefault(check_count("epoch", epoch, least=0), [])
        steps.append(range(first, stop))
        for delivery in self._alive():  # one of an older epoch may have no part in that list any more
            if delivery.progress.epoch == epoch:
                delivery.progress.skipped_steps = steps

    def _opened(self, delivery: Delivery) -> None:
        with self._lock:
            self._deliveries.add(delivery)

    def _alive(self) -> list[Delivery]:
        with self._lock:  # another thread may begin an epoch meanwhile
            return list(self._deliveries)

    def _ended(self, progress: Progress) -> None:
        """See `LoaderHooks`."""

    def _receiver(self) -> Receive | None:
        transfer = self._transfer
        if transfer is None:
            return None
        # It stays the iterator's own: `close` may take it from the loader while a `next()` is under way.
        return lambda batch: transfer.receive(batch) if isinstance(batch, Transferred) else batch

    def _alloc(self, transfer: Transfer | None) -> Alloc:
        """Where the default collate puts batches: page-locked memory for a device that can use it, else our own."""
        if transfer is not None and transfer.backend.pins:
            return transfer.backend.alloc_pinned
        with self._lock:
            if self._memory is None:
                self._memory = BatchMemory()
            return self._memory.alloc

    def _open_processes(self) -> WorkerThread:
        """Where worker processes come from; kept between epochs, with those that are to be kept."""
        with self._lock:
            if self._processes is None:
                self._processes = WorkerThread()
                finalize(self, self._processes.close).atexit = False  # the exit hook of `loop_thread` also waits
            return self._processes

    # -- pausing -----------------------------------------------------------------------------------------------------

    def paused(self, drain: bool = False) -> Paused:
        """A block, for `with` or `async with`, in which no sample begins, in any epoch of this loader.

        For what must not change under a sample's feet: the weights that a rollout generates with, a file that is
        replaced. What is under way goes on, and batches that are ready are given; a `next()` for which none is waits
        until the block is left. Sources are not read further either, nor does `flat_map` make more. Blocks may nest and
        overlap, in any threads, and epochs that begin inside begin paused.

        ```python
        async with loader.paused(drain=True):
            await engine.update_weights(policy)
        ```

        A sample begins with its first function, and where `flat_map`, `drop_if` or `shuffle(n)` is between maps, again
        with the first one after that; one that is found in a cache begins when it is looked up. What is already past
        that goes on through the functions after it, and through `batch` and what comes after. A sample that a thread
        (or a user's executor) has just taken counts as under way, though its function may be called a moment later;
        `drain=True` waits for it.

        `with` blocks its thread until the block is entered, and works in the thread of a `for` loop and in any other.
        `DataLoader(num_workers=0)` makes its samples in `next()` itself, so there is nothing to pause.

        Args:
            drain: Enter the block only when no sample is under way. Reading of sources is not waited for.

        Raises:
            RuntimeError: At `with`, in the thread of an event loop on which an epoch runs, for `drain=True` or where
                samples are made in other processes: these could not go on, or answer, while it waits. Use `async with`.
        """
        return Paused(self._pauses, drain=bool(drain))

    # -- closing -----------------------------------------------------------------------------------------------------

    def _shared_loop(self) -> LoopThread | None:
        with self._lock:
            if self._entered and self._loop_thread is None:
                self._loop_thread = LoopThread()
            return self._loop_thread

    def __enter__(self) -> Self:
        """Keep the event loop of `for` for all epochs of the block, so that clients made on it stay usable."""
        self._entered += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._entered -= 1
        if not self._entered:
            self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def close(self) -> None:
        """End all running epochs and release what is kept between epochs. Idempotent.

        Returns when tasks and threads are gone, after a few seconds at most. Epochs of `async for` are only asked to
        end, since their loop may be the caller's: use `aclose` there. The loader itself stays usable.
        """
        for delivery in self._alive():
            if isinstance(delivery, SyncDelivery):
                delivery.close()
            elif isinstance(delivery, AsyncDelivery):
                delivery.closed = True
                delivery.run.leave()
        if self._loop_thread is not None:
            self._loop_thread.request_stop()
            self._loop_thread.join()
            self._loop_thread = None
        self._close_processes()
        self._close_kept()

    async def aclose(self) -> None:
        """`close` for async code: epochs of `async for` on this loop have ended when it returns. Idempotent."""
        for delivery in self._alive():
            if isinstance(delivery, AsyncDelivery):
                if delivery.run.loop is asyncio.get_running_loop():
                    await delivery.aclose()
                else:  # it ends on its own loop
                    delivery.closed = True
                    delivery.run.leave()
        if self._loop_thread is not None or any(isinstance(d, SyncDelivery) for d in self._alive()):
            await run_sync(self.close)
        if self._processes is not None:
            await run_sync(self._close_processes)
        self._close_kept()

    def _close_kept(self) -> None:
        """Let go of what is kept from one epoch to the next."""
        self._close_trace()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        with self._lock:
            memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _close_processes(self) -> None:
        with self._lock:
            processes, self._processes = self._processes, None
        if processes is not None:
            processes.close()
            processes.join(2 * CLOSE_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        """The description, without anything that is running."""
        alive = Loader.__new__(type(self))
        Loader.__init__(alive)
        left_out = {*alive.__dict__, "__orig_class__"}  # the T of `Pipeline[T](...)`, which may be a class of anywhere
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Loader.__init__(self)
        self.__dict__.update(state)
