"""What is known of the samples at one place of a pipeline, before anything runs.

A plan is walked once, from its source to its last stage: each stage turns what is known before it into what is known
after it (`Stage.flow`). Order, guarantee, ranks and time dependence are read from the result.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, Literal

__all__ = ["STRENGTH", "Again", "Flow", "Guarantee", "Ranks", "Shared", "Steps"]

Again = Literal["head", "all", "none"]
"""How the first samples of an epoch are had once more, in the middle of it. `head`: from another reader, which stops
after them. `all`: by reading everything again, since another reader might be given others. `none`: not at all."""

Guarantee = Literal["exact", "replayed", "at-least-once", "live"]
"""What a resume gives. `exact`: what was to come. `replayed`: that too, if a source that cannot be entered in the
middle gives the same samples again. `at-least-once`: all that was to come, and maybe some samples once more. `live`:
what comes from now on; live data cannot be read again."""

STRENGTH: Final[tuple[Guarantee, ...]] = ("exact", "replayed", "at-least-once", "live")
"""From the strongest guarantee to the weakest."""


class Shared(IntEnum):
    """Who may go on from a rank's state; each value includes those after it."""

    ANY_WORLD = 0
    SAME_WORLD = 1  # every rank has the same state, but it counts what only so many ranks have
    SAME_RANK = 2  # each rank has its own


@dataclass(frozen=True)
class Ranks:
    """The ranks that samples have been dealt to.

    Attributes:
        rank: Of this process.
        world_size: How many there are.
        shared: Who may go on from a state.
        because: The stage that allows no more than that.
        by_file: What they have been dealt are files.
    """

    rank: int
    world_size: int
    shared: Shared = Shared.ANY_WORLD
    because: str = ""
    by_file: bool = False

    def limited(self, shared: Shared, because: str) -> "Ranks":
        """The same after a stage that allows no more than `shared`."""
        return self if shared <= self.shared else replace(self, shared=shared, because=because)


@dataclass(frozen=True)
class Steps:
    """Neighbouring maps and filters, which run in one window and therefore have one order.

    Attributes:
        unordered: The first map among them that gives samples as they finish; empty: none does.
        only_maps: Each gives one sample for one, so that `shard` after them may deal what goes into them.
        input_order: `Flow.completion_order` of what goes into them.
    """

    unordered: str = ""
    only_maps: bool = True
    input_order: str = ""


@dataclass(frozen=True)
class Flow:
    """What is known of the samples at one place of a plan.

    Attributes:
        by_key: They are samples of an indexable source. Order stages here are arithmetic on its keys, and therefore go
            before the maps that are written before them.
        keyed: They are samples of an indexable source, maybe not all, and nothing but maps and filters was done to
            them: the key of one names it in every epoch.
        again: How a resumed reader gets the first ones of the epoch.
        completion_order: The stage that gives samples as they finish; empty: they come in the same order each time.
        timed: The stage by which it is a matter of time what a batch holds; empty: there is none.
        rank_order: The stage that makes the order while it runs, so that each rank would see another one; empty: all
            ranks see the same.
        guarantee: What a resume gives.
        guarantee_if_cut: The same if a later stage ends the epoch before its source does.
        batch_size: Samples per batch on this rank; None: they are not batched.
        collated: The newest batches among them come from the default collate.
        one_a_step: They are rows or batches of no fixed number of samples: a step is one of them for each rank, and
            those to come are the same, however many ranks they are dealt to.
        ranks: None: all ranks get all samples.
        steady: There are as many batches per epoch, whatever the number of ranks.
        steps: The maps and filters right before this place.
    """

    by_key: bool = False
    keyed: bool = False
    again: Again = "head"
    completion_order: str = ""
    timed: str = ""
    rank_order: str = ""
    guarantee: Guarantee = "exact"
    guarantee_if_cut: Guarantee = "exact"
    batch_size: int | None = None
    collated: bool = False
    one_a_step: bool = False
    ranks: Ranks | None = None
    steady: bool = True
    steps: Steps = Steps()

    @property
    def elastic(self) -> bool:
        """Whether any number of ranks can go on, with the same global batch: steps are what is counted."""
        counted = self.batch_size is not None or self.one_a_step
        return self.ranks is not None and self.ranks.shared is Shared.ANY_WORLD and counted

    @property
    def global_batch(self) -> int | None:
        """Samples per batch on all ranks together."""
        return None if self.ranks is None or self.batch_size is None else self.batch_size * self.ranks.world_size

    def limited(self, shared: Shared, because: str) -> "Flow":
        """After a stage that lets no others than `shared` go on from a rank's state."""
        return self if self.ranks is None else replace(self, ranks=self.ranks.limited(shared, because))

    def at_least(self, guarantee: Guarantee) -> "Flow":
        """After a stage that guarantees no more than `guarantee`."""
        if STRENGTH.index(guarantee) <= STRENGTH.index(self.guarantee):
            return self
        return replace(self, guarantee=guarantee)

    def counted(self) -> "Flow":
        """After a stage whose cursor counts what comes from one sample, or the samples that it holds.

        Such a number would be another sample's where they come in another order each time: a resume forgets it.
        """
        return self.at_least("at-least-once") if self.completion_order else self

    def cut(self) -> "Flow":
        """After a stage that may end the epoch before its source does."""
        return self.at_least(self.guarantee_if_cut)

    def closed(self) -> "Flow":
        """After a stage that has the steps before it in a window of their own."""
        return replace(
            self,
            by_key=False,
            keyed=False,
            rank_order=self.rank_order or self.steps.unordered,
            steps=Steps(input_order=self.completion_order),
        )

    def before_shard(self) -> "Flow":
        """What `shard` deals: it goes before maps, which then run on this rank's samples alone."""
        return self if self.steps.only_maps else self.closed()
