"""The common part of stage descriptions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

from aioloader.core.address import Address
from aioloader.core.limit import Limit
from aioloader.core.memory import Alloc
from aioloader.core.rate import Rate
from aioloader.core.seeds import derive_seed
from aioloader.device import Transfer
from aioloader.engine.fuse import FusedOps
from aioloader.engine.node import Fold, FoldNode, Node
from aioloader.engine.ops import Op
from aioloader.engine.skipping import SkipRule
from aioloader.engine.window import Window
from aioloader.errors import UnknownLengthError
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.key_order import KeyOrder

__all__ = ["Builder", "Evenness", "FoldStage", "Pass", "Stage", "UnknownLengthError", "order_of"]


Evenness = Literal["kept", "lost", "given"]
"""What becomes of ranks that have as many samples each: they still do; they may not any more; or they do from here on,
whatever came in."""


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

    def seed_of_samples(self, address: Address) -> int | None:
        """That of the random numbers that samples draw in the function at `address`."""
        if self.sample_seed is None:
            return None
        return self.seed(self.sample_seed, f"sample {'.'.join(map(str, address))}")

    def repeated(self, repetition: int) -> "Pass":
        """Repetition number `repetition` within this pass."""
        return replace(self, repetitions=(*self.repetitions, repetition))


class Builder(Protocol):
    """A pipeline while its nodes are made, stage after stage: what `Stage.build` adds to.

    Attributes:
        node: Gives what the stages so far make, but for what `fused` does.
        fused: What is done to that in the window that comes next.
        this_pass: Which epoch.
        flow: What is known of the samples that come into the stage that is built.
        following: The stages after it.
        key_stages: Those so far that act on the keys of an indexable source; see `FoldStage.reorder`.
        prefetch: Batches ahead of the consumer, those that are being made included.
        transfer: The loader's way to its device; None: there is none.
        alloc: Where the default collate puts batches; None: into fresh memory.
        processes: Gives the loader's worker processes; called when something runs there.
        beginnings: See `Node`.
        rule: What leaves out what failed, in the window that comes last.
    """

    node: Node
    beginnings: list[Callable[[], None]]
    fused: FusedOps
    this_pass: Pass
    flow: Flow
    following: "Sequence[Stage]"
    key_stages: "list[FoldStage]"
    transfer: Transfer | None
    alloc: Alloc | None
    rule: SkipRule | None

    @property
    def prefetch(self) -> int: ...

    @property
    def described(self) -> str:
        """The stages so far, in words: the same for all ranks that read the same."""

    def admitting(self, window: Window) -> Window:
        """`window`, which knows who decides when samples may begin."""

    @property
    def processes(self) -> Callable[[], WorkerThread]: ...

    def fuse(self, op: Op) -> None:
        """Do `op` in the next window, with an address and random numbers of its own."""

    def close(self, *, room: int | None = None, again: bool = False) -> Node:
        """Put what is fused so far into a window, if there is anything, and begin anew.

        Args:
            room: Entries that it holds, exactly; then there is a window in any case.
            again: Entries may be sent back into it, see `AgainWindow`.

        Returns:
            The node that gives what all stages so far make, which `node` is from now on.
        """

    def again(self, *, closed: bool, warns: bool = True) -> Callable[[], Node]:
        """Gives the nodes of all stages before this one once more, not started.

        Args:
            closed: What is fused by them is in a window at their end; else left out.
            warns: Say so when a source is read again only to drop samples.
        """

    def repetitions(self) -> Callable[[int], Node]:
        """Gives the nodes of all stages before this one, not started, for each repetition of them by its number."""

    def run_in_process(self) -> None:
        """Let all stages before this one run in a process of their own."""

    def run_in_ray(self, stage: Any) -> None:
        """Let all stages before `stage`, an `InRay`, run in actors."""


class Stage(ABC):
    """The description of one step of a pipeline: immutable, checked when it is made.

    What a stage means is said in its own class. The defaults promise nothing: a stage that forgets to speak gets a
    weaker guarantee, never a false one.

    Attributes:
        exact_in_any_order: A resume stays exact if the samples before this stage come in another order each time: its
            cursors have no numbers of their own, or none that are about one entry ("two rows of the batch are out").
        keeps_samples: It changes no sample and runs no user code: what comes out is what came in.
        same_each_epoch: If its input is the same in each epoch, in the same order, then so is its output.
        only_reads: What it makes has no part of its input in it: a cache need not copy what it hands to this stage.
        part_by_part: What it makes of each part of its input is as good as what it makes of all of it: `in_ray` runs it
            once for each part. One that counts its input, such as `enumerate`, does not.
        encloses: It builds what is before it itself, maybe several times.
        caches: It keeps samples for later epochs, so that reading its input again is no surprise.
        passes: It gives each entry on or leaves it out, at once: a fold that waits for others before it gives one, or
            gives several of one, does not. (`batch` waits, but for its own.)
        reorders: Where samples are those of an indexable source by their keys (`Flow.by_key`), it is arithmetic on the
            keys, and moves no samples.
        makes_anew: It makes a sample of another one, and can do so again.
        logs_order: It records the order of its results, or has one to keep to.
        only_selects: It is a step of the same window as the maps around it, and gives samples on as they are.
        batches: It gives batches of samples.
        gathers: Entries that it takes for one that it gives.
        here_only: In a process of its own nothing could come of it.
        for_several_ranks: Several ranks are to get the same.
        parts: Into how many parts it deals what is before it, each with stages of its own; 0: it does not.
        on_device: Its output may be in the memory of a device.
        must_be_last: Nothing can be done to its output here.
        cache_label: What a cache after it says of it. A cache on disk belongs to one such pipeline.
        functions: The user's functions that work for it.
        executor: Where they run, as the user has said; None: in threads of ours, or on the loop.
        limit: The limit on its concurrency that others may share.
        rate: How many of its calls begin in a second, which others may share.
    """

    exact_in_any_order: ClassVar[bool] = False
    keeps_samples: ClassVar[bool] = False
    same_each_epoch: ClassVar[bool] = False
    only_reads: ClassVar[bool] = False
    part_by_part: ClassVar[bool] = False
    encloses: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    passes: ClassVar[bool] = False
    reorders: ClassVar[bool] = False
    makes_anew: ClassVar[bool] = False
    logs_order: ClassVar[bool] = False
    only_selects: ClassVar[bool] = False
    batches: ClassVar[bool] = False
    gathers: int = 1
    here_only: ClassVar[bool] = False
    for_several_ranks: ClassVar[bool] = False
    parts: int = 0
    on_device: ClassVar[bool] = False
    must_be_last: ClassVar[bool] = False
    functions: tuple[Any, ...] = ()
    executor: Any = None
    limit: Limit | None = None
    rate: Rate | None = None

    @property
    def cache_label(self) -> str:
        return self.label

    @property
    @abstractmethod
    def label(self) -> str:
        """The stage as the user wrote it, `map(decode)`: its name in statistics and errors."""

    @property
    def shown(self) -> str:
        """The same in the repr of a pipeline, where its seed is to be seen."""
        return self.label

    @abstractmethod
    def length(self, upstream: int) -> int:
        """How many entries it gives of `upstream` ones.

        Raises:
            UnknownLengthError: Only running it tells.
        """

    @property
    def evenness(self) -> Evenness:
        """See there; right for any stage that has a length."""
        try:
            self.length(1)
        except UnknownLengthError:
            return "lost"
        return "kept"

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

    def with_ranks(self) -> Self:
        """The same with rank and world size as they are now: looked up once, so that an epoch is of one rank."""
        return self

    def deal(self, source: Any) -> Any:
        """What this rank reads of the stream that the samples come from; with rank and world size as they are now.

        Raises:
            ValueError: It cannot be dealt.
        """
        return source

    def without_report(self) -> "Stage":
        """The same, but it writes nothing down: for samples that are made a second time."""
        return self

    def keeping_last(self) -> Self:
        """The same, but nothing is left out because there is too little of it."""
        return self

    def open_transfer(self) -> Transfer | None:
        """The way to the device that its output goes to; None: to none."""
        return None

    def memory(self) -> Alloc | None:
        """Where batches that come to it are best collated, in a new epoch; None: anywhere."""
        return None

    @abstractmethod
    def build(self, builder: Builder) -> None:
        """Add what runs it. Pure: nothing is started, and no user code is called."""


class FoldStage(Stage):
    """A stage that runs as a fold.

    Unless it is `exact_in_any_order`, a resume after samples without a fixed order forgets the numbers in its cursor
    (see `FoldNode`): some samples come twice rather than never. If it `reorders`, it has `reorder`.
    """

    @abstractmethod
    def fold(self, this_pass: Pass) -> Fold:
        """Its rule, with fresh state."""

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        """What it makes of the order of the keys.

        Args:
            order: The keys so far.
            this_pass: Which epoch.
            permute: False: only the positions must be right, no key need move.
        """
        raise NotImplementedError(f"{self.label} does not reorder keys")

    def build(self, builder: Builder) -> None:
        if self.reorders and builder.flow.by_key:
            builder.key_stages.append(self)
            return
        first = builder.fused.first and not builder.fused.ops
        recounts = not self.exact_in_any_order
        unordered_input = recounts and bool(builder.flow.completion_order)
        fold = self.fold(builder.this_pass)
        builder.node = FoldNode(builder.close(), fold, unordered_input=unordered_input, recounts=recounts)
        builder.fused = FusedOps(first=first)


def order_of(length: int, stages: Sequence[FoldStage], this_pass: Pass, *, permute: bool = True) -> KeyOrder:
    """The keys of a source of `length` samples after `stages`, see `FoldStage.reorder`."""
    order = KeyOrder(range(length))
    for stage in stages:
        order = stage.reorder(order, this_pass, permute=permute)
    return order
