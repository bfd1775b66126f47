"""`Loader`: where its batches come from, and how one is made once more, by another loader of the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from aioloader.core.checks import check_count
from aioloader.core.typevars import T_co
from aioloader.engine.resumable import beginning
from aioloader.errors import SourceUsedUpError
from aioloader.insight.batch_info import BatchInfo
from aioloader.loader.running import Running
from aioloader.plan.plan import flow_of

__all__ = ["Loader"]


class Loader(Running[T_co]):
    """An object whose every `iter()` or `aiter()` is one epoch of batches.

    Making an iterator is cheap and starts nothing; work starts, and the epoch is counted, at its first `next()`.
    Several iterators may be alive. When an epoch is over, or its iterator is dropped, no task and no thread of it
    remains; `close` ends everything that is left at once.
    """

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
            again.load_state_dict(self._make_state(progress.epoch, step, cursor, progress.loader_state, progress.shape))
            again._leave_out = {}
            again._draws_again = True
            yield again
        except SourceUsedUpError as error:
            raise LookupError(f"replay reads the source again, but {error}") from error
        finally:
            if self._sampled is not None:  # what is not copied was told another epoch
                self._sampled.sampling.set_epoch_of_dataset(random)

    def _never_again(self) -> str | None:
        """Why a batch cannot be made once more; None: it can."""
        flow = flow_of(self._plan)
        if flow.guarantee == "live":
            return "what has been sent cannot be read again"
        if flow.guarantee == "at-least-once" or flow.completion_order:
            return "samples come in another order each time"
        return "which samples a batch holds depends on time" if flow.timed else None

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

    # -- another one of the same -------------------------------------------------------------------------------------

    def _detached(self) -> Self:
        """Another loader of the same, that can be iterated without moving anything that this one draws or reads from.

        Raises:
            LookupError: Something of the user's cannot be copied.
        """
        again: Self = Loader.__new__(type(self))
        again.__setstate__(self.__getstate__())
        again._random_seed = self._random_seed
        again._alone = True
        return again

    def __getstate__(self) -> dict[str, Any]:
        """The description, without anything that is running."""
        alive = Loader.__new__(type(self))
        Loader.__init__(alive)
        left_out = {*alive.__dict__, "__orig_class__"}  # the T of `Pipeline[T](...)`, which may be a class of anywhere
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Loader.__init__(self)
        self.__dict__.update(state)
