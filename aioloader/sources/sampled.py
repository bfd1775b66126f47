"""The dataset of a `DataLoader` as a source: by the keys that are drawn for an epoch, or iterated."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aioloader.core.safe_text import safe_repr
from aioloader.engine.progress import Progress
from aioloader.engine.turns import Turns
from aioloader.errors import ReplayWarning, StateError
from aioloader.sources.epoch_sampling import BaseSeed, EpochSampling
from aioloader.sources.resolve import StreamData
from aioloader.sources.sampler_order import Draws

__all__ = ["Sampled"]


@dataclass
class Sampled(StreamData):
    """What a `DataLoader` reads, and all that its state says of that.

    Attributes:
        make: The dataset if it is iterated, else the sampler.
        sampling: Draws what an epoch needs, and tells samplers and dataset its number.
        dataset: The user's.
        iterable: It is iterated.
        turns: The source of worker processes that iterate a copy of the dataset each; None: nobody does.
        ordered: Batches come in the order of their keys.
        in_order: What the user said of that, and of the order in which such workers are read.
        skips: Samples that fail are left out.
        base: Gets the base seed of the epoch's workers.
    """

    make: Any
    call: bool = False
    single_use: bool = False
    sampling: EpochSampling = field(kw_only=True)
    dataset: Any = field(kw_only=True)
    iterable: bool = field(kw_only=True)
    turns: Turns | None = field(kw_only=True)
    ordered: bool = field(kw_only=True)
    in_order: bool = field(kw_only=True)
    skips: bool = field(kw_only=True)
    base: BaseSeed = field(default_factory=BaseSeed, kw_only=True)

    # -- an epoch ----------------------------------------------------------------------------------------------------

    def of_epoch(self, epoch: int, draws: Draws) -> StreamData:
        if self.turns is not None:
            return StreamData(self.turns, call=False, single_use=False)
        if self.iterable:
            return self
        return StreamData(partial(self.sampling.of, epoch, draws, self.base), call=True, single_use=False)

    def begin(self, epoch: int, draws: Draws) -> None:
        if self.turns is not None:
            self._begin_turns(epoch, draws)
        elif self.iterable:
            self.sampling.draw_base_seed(epoch, draws)

    def _begin_turns(self, epoch: int, draws: Draws) -> None:
        """Give workers that iterate the dataset their base seed: that which they had, where the epoch goes on."""
        progress = draws.progress
        assert progress is not None, "an epoch of a loader"
        record = progress.loader_state
        if progress.cursor is None:
            self.sampling.draw_base_seed(epoch, draws, self.base)
            record["base_seed"] = self.base.value
            return
        if self.sampling.generator is not None:
            self.sampling.draw_base_seed(epoch, draws)  # it moves on, as it did when the epoch began
        self.base.value = record["base_seed"]
        warnings.warn(
            f"worker processes cannot enter their parts of an IterableDataset in the middle: the resumed epoch reads "
            f"the {progress.batches_before} batches before it again and drops them",
            ReplayWarning,
            stacklevel=2,
        )

    def note(self, progress: Progress) -> None:
        """An epoch begins: let samplers and dataset be in it, and note on `progress` what they say."""
        if not self.iterable:
            progress.batch_size = self.sampling.batch_size
        if progress.cursor is not None:  # the rest of it comes in that order, whatever they were told since
            self.sampling.set_epochs(progress.loader_state, told=not progress.epoch_pinned)
        progress.loader_state |= self.sampling.epochs()

    # -- what is known of its epochs ---------------------------------------------------------------------------------

    @property
    def draws_globally(self) -> bool:
        """Whether what comes depends on torch's global generator."""
        sampling = self.sampling
        if self.iterable:  # its workers' seeds, where these decide what comes
            return self.turns is not None and sampling.seed is None and sampling.generator is None
        return sampling.draws_globally

    @property
    def batches(self) -> int | None:
        """How many there are in an epoch, where that is sure."""
        sampling = self.sampling
        if self.skips:
            return None  # nobody knows whether a batch is left of them
        if self.iterable or not sampling.repeatable or sampling.generators:
            return None  # a generator may be drawn from once more at the end
        try:
            return len(sampling.sampler)
        except TypeError:
            return None

    # -- state -------------------------------------------------------------------------------------------------------

    def check_state(self, state: dict[str, Any], *, begun: bool) -> None:
        """Refuse what `sampling` could not take, or what is not enough.

        Args:
            state: What a state says of what is drawn.
            begun: It is that of an epoch that has begun.

        Raises:
            ValueError: Why.
        """
        self.sampling.check_state(state)
        if begun and self.turns is not None and "base_seed" not in state:
            raise ValueError("'base_seed', which the seeds of the epoch's workers begin with, is missing")

    def place(self, batches: int, cursor: Any) -> tuple[int, Any]:
        """What a state says of where an epoch is, after `batches` of which the last one had `cursor`."""
        if self.turns is None:
            return batches, cursor
        if not self.in_order:  # the epoch is begun again
            return 0, None
        return batches, None if cursor is None else (self.turns.workers, batches)

    def check_place(self, batches: int, cursor: Any) -> None:
        """Refuse a place in an epoch that others read.

        Raises:
            StateError: Why.
        """
        if not self.iterable:
            return
        theirs, ours = _reading_workers(cursor), 0 if self.turns is None else self.turns.workers
        if theirs != ours or (ours and not self.in_order):
            raise StateError(
                f"the state is in the middle of an epoch of an IterableDataset that {_readers(theirs)} read, and "
                f"this loader has {_readers(ours)}{'' if self.in_order else ', in_order=False'}, so its parts or "
                f"their order are others; go on with the former, or begin the epoch anew"
            )
        if ours and cursor[1] != batches:
            raise StateError(
                f"the 'cursor' of the state is after {safe_repr(cursor[1])} batches, and its 'batches' are "
                f"{batches}: it is broken"
            )


def _reading_workers(cursor: Any) -> int:
    """Of how many worker processes that iterate a dataset each a cursor is; 0: of none."""
    of_workers = isinstance(cursor, list | tuple) and len(cursor) == 2 and all(type(part) is int for part in cursor)
    return cursor[0] if of_workers else 0


def _readers(workers: int) -> str:
    return f"{safe_repr(workers)} worker processes" if workers else "one reader (num_workers=0 or worker_type='thread')"
