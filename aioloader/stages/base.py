"""The common part of stage descriptions."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from aioloader.core.seeds import derive_seed
from aioloader.engine.node import Fold
from aioloader.stages.flow import Flow, Shared

__all__ = ["FoldStage", "Pass", "Stage", "UnknownLengthError"]


class UnknownLengthError(TypeError):
    """How many samples a stage gives is known only when it has run; `len()` raises it, as trainers expect."""


@dataclass(frozen=True)
class Pass:
    """Which pass over the data a running pipeline makes.

    Attributes:
        epoch: The number of the epoch.
        repetitions: The numbers of the enclosing `repeat` stages' repetitions, outermost first.
        sample_seed: Of the random numbers of samples; None: there are none.
    """

    epoch: int
    repetitions: tuple[int, ...] = ()
    sample_seed: int | None = None

    def seed(self, seed: int, purpose: str) -> int:
        """A seed for `purpose` in this pass; in a first repetition that of a pass without `repeat`."""
        path = list(self.repetitions)
        while path and path[-1] == 0:
            path.pop()
        return derive_seed(seed, purpose, self.epoch, *path)

    def repeated(self, repetition: int) -> "Pass":
        """Repetition number `repetition` within this pass."""
        return replace(self, repetitions=(*self.repetitions, repetition))


class Stage(ABC):
    """The description of one step of a pipeline: immutable, checked when it is made.

    What a stage means is said in its own class. The defaults promise nothing: a stage that forgets to speak gets a
    weaker guarantee, never a false one.

    Attributes:
        exact_in_any_order: A resume stays exact if the samples before this stage come in another order each time: its
            cursors have no numbers of their own, or none that are about one entry ("two rows of the batch are out").
        keeps_samples: It changes no sample and runs no user code: what comes out is what came in.
        same_each_epoch: If its input is the same in each epoch, in the same order, then so is its output.
    """

    exact_in_any_order: ClassVar[bool] = False
    keeps_samples: ClassVar[bool] = False
    same_each_epoch: ClassVar[bool] = False

    @property
    @abstractmethod
    def label(self) -> str:
        """The stage as the user wrote it, `map(decode)`."""

    @abstractmethod
    def length(self, upstream: int) -> int:
        """How many entries it gives of `upstream` ones.

        Raises:
            UnknownLengthError: Only running it tells.
        """

    def shape(self) -> dict[str, Any] | None:
        """What a state says of this stage, and must find again: all that decides which sample comes when.

        A dict that JSON can hold, with the kind of stage as "stage"; "name" is told and not compared. None: a stage
        that moves no sample.
        """
        return {"stage": self.label}

    def flow(self, before: Flow) -> Flow:
        """What is known of the samples after this stage.

        The default is right for any stage, and pessimistic: nothing is known by key any more, other ranks cannot go on
        from this one's state, and where samples come in another order each time, some may come again after a resume,
        unless it is `exact_in_any_order`. A stage that can promise more says so here.

        Args:
            before: What is known of the samples that come in.
        """
        after = before.cut().limited(Shared.SAME_RANK, self.label).closed()
        return after if self.exact_in_any_order else after.counted()


class FoldStage(Stage):
    """A stage that runs as a fold.

    Unless it is `exact_in_any_order`, a resume after samples without a fixed order forgets the numbers in its cursor
    (see `FoldNode`): some samples come twice rather than never.
    """

    @abstractmethod
    def fold(self, this_pass: Pass) -> Fold:
        """Its rule, with fresh state."""
