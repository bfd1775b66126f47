"""`shard`: this rank's part, the same number of samples on every rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import LAST, ONE_LOST, Entry, begun_each_of, places_of
from aioloader.engine.node import Fold, FoldNode, Kick, Node
from aioloader.engine.resumable import beginning
from aioloader.stages.base import Builder, FoldStage, Pass, UnknownLengthError
from aioloader.stages.flow import Again, Flow, Ranks, Shared
from aioloader.stages.key_order import KeyOrder
from aioloader.stages.rank import (
    Even,
    check_group,
    check_mesh,
    check_rank,
    current_rank,
    group_rank,
    mesh_rank,
    uneven,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from aioloader.engine.run import Run

__all__ = ["UNCOUNTED", "By", "Shard", "ShardFold"]

By = Literal["sample", "file"]
"""What `shard` deals to ranks."""

_EVEN: Final = get_args(Even)
_BY: Final = get_args(By)

UNCOUNTED: Final = ("keep", "agree")
"""Values of `even` with which a rank gives what it has."""

AGAIN_AT_ONCE: Final = 4096  # samples that come once more are asked for in such runs, however many there are


@dataclass(frozen=True)
class Shard(FoldStage):
    """Every `world_size`-th sample, from number `rank` on.

    All ranks get the same number, so that none waits for ever in a collective. The samples are dealt in *rounds*, one
    to each rank, and it is rounds that count: a cursor is the position in the order of all ranks after a round, so it
    is the same on every rank that has got as many samples, and however many ranks go on from it, what they get between
    them is what comes after it.

    Args:
        rank: None: found out when iteration begins, see `place`.
        world_size: Likewise.
        group: The ranks are those of this process group.
        mesh: The ranks are those along one dimension of a mesh, see `check_mesh`.
        even: What becomes of a last round with fewer samples than ranks: it is filled from the beginning, as torch's
            DistributedSampler does, or dropped, or an error. `keep`: each rank gives what it has, also what is in its
            files; None, by file alone: likewise, and nobody has said so. `agree`: likewise, and iterators of all ranks
            end together, see `engine/agreement.py`.
        by: What is dealt. `file`: the source reads the files of this rank alone, and no stage is left of this one when
            it runs, see `deal`.
    """

    rank: int | None = None
    world_size: int | None = None
    group: "ProcessGroup | None" = None
    mesh: "DeviceMesh | tuple[DeviceMesh, Any] | None" = None
    even: Even | None = "pad"
    by: By = "sample"

    exact_in_any_order = True  # which it refuses, see `ranks.check_one_order`
    keeps_samples = True
    same_each_epoch = True
    part_by_part = True
    reorders = True

    def __post_init__(self) -> None:
        numbers = self.rank is not None or self.world_size is not None
        given = [
            name
            for name, there in (
                ("rank and world_size", numbers),
                ("group", self.group is not None),
                ("mesh", self.mesh is not None),
            )
            if there
        ]
        if len(given) > 1:
            raise ValueError(f"shard takes one of rank and world_size, group, and mesh, got {' and '.join(given)}")
        if numbers:
            check_rank(self.rank, self.world_size)
        if self.group is not None:
            check_group(self.group)
        if self.mesh is not None:
            check_mesh(self.mesh)
        if self.by not in _BY:
            raise ValueError(f"by must be 'sample' or 'file', got {self.by!r}")
        if self.even not in _EVEN and not (self.even is None and self.by == "file"):
            raise ValueError(f"even must be one of {', '.join(map(repr, _EVEN))}, got {self.even!r}")

    @property
    def label(self) -> str:
        given = []
        if self.rank is not None:
            given = [f"{self.rank}, {self.world_size}"]
        elif self.group is not None:
            given = ["group=..."]
        elif self.mesh is not None:
            given = ["mesh=..."]
        if self.by != "sample":
            given.append(f"by={self.by!r}")
        if self.even not in ("pad", None):
            given.append(f"even={self.even!r}")
        return f"shard({', '.join(given)})"

    @property
    def cache_label(self) -> str:
        rank, world_size = self.place()
        return f"shard({rank}, {world_size}{'' if self.by == 'sample' else f', by={self.by!r}'})"

    @property
    def by_numbers(self) -> bool:
        """Whether the user has said by numbers which rank of how many this is."""
        return self.rank is not None

    def place(self) -> tuple[int, int]:
        """Rank and world size, now. Never a collective call."""
        if self.rank is not None and self.world_size is not None:
            return self.rank, self.world_size
        if self.group is not None:
            return group_rank(self.group)
        if self.mesh is not None:
            return mesh_rank(check_mesh(self.mesh))
        return current_rank()

    def with_ranks(self) -> "Shard":
        """The same with rank and world size as they are now."""
        rank, world_size = self.place()
        return replace(self, rank=rank, world_size=world_size, group=None, mesh=None)

    def deal(self, source: Any) -> Any:
        if self.by != "file":
            return source
        rank, world_size = self.place()
        return source.dealt(rank, world_size, self.even)

    def length(self, upstream: int) -> int:
        if self.by == "file":
            raise UnknownLengthError(f"{self.label} has no length: it depends on which files this rank gets")
        rank, world_size = self.place()
        rounds, rest = divmod(upstream, world_size)
        if self.even == "agree":
            raise UnknownLengthError(f"{self.label} has no length: it turns out how many batches all ranks have")
        if self.even == "keep":
            return rounds + (rank < rest)
        if rest and self.even == "error":
            raise uneven(upstream, world_size)
        return rounds + 1 if rest and self.even == "pad" else rounds

    def shape(self) -> dict[str, Any]:
        return {"stage": "shard", "even": self.even, "by": self.by}  # the state itself says of how many ranks it is

    def flow(self, before: Flow) -> Flow:
        after = replace(before.before_shard().cut(), steady=before.steady and self.even in ("pad", "error"))
        rank, world_size = self.rank or 0, self.world_size or 1  # before it is `with_ranks`, one of one
        if self.by == "file":
            its = Ranks(rank, world_size, Shared.SAME_RANK, "shard(by='file')", by_file=True)
            return replace(before.cut(), ranks=its, steady=False)
        ranks = before.ranks
        if ranks is None:
            ranks = Ranks(rank, world_size)
        else:
            world_size *= ranks.world_size
            both = replace(ranks, rank=ranks.rank + ranks.world_size * rank, world_size=world_size)
            ranks = both.limited(Shared.SAME_WORLD, f"a second {self.label}")
        if self.even == "keep":
            ranks = ranks.limited(Shared.SAME_RANK, self.label)
        elif self.even == "agree":
            ranks = ranks.limited(Shared.SAME_WORLD, self.label)
        return replace(after, ranks=ranks)

    def fold(self, this_pass: Pass) -> Fold:
        assert self.even is not None
        return ShardFold(*self.place(), self.even)

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        assert self.even is not None
        return order.dealt(*self.place(), self.even)

    def build(self, builder: Builder) -> None:
        """A map gives one sample for one, so maps before this run on this rank's samples alone."""
        if self.by == "file":
            return  # the source gives this rank's part already
        assert self.even is not None
        if builder.flow.by_key:
            builder.key_stages.append(self)
            return
        commutes = builder.fused.one_for_one
        again = builder.again(closed=not commutes)
        node = builder.node if commutes else builder.close()
        fold = ShardFold(*self.place(), self.even, builder.flow.again)
        if fold.head and builder.flow.again == "head":
            node = HeadNode(node, again, fold.head)
        builder.node = FoldNode(node, fold)


class ShardFold:
    """The part of a stream, given round by round.

    A rank's sample goes on when its round is complete: so every rank has the same cursor after it, and a round that
    stays incomplete can be dropped by all of them.

    Cursor: that of the round's last entry, and how many entries of all ranks came up to there.

    Args:
        rank: Of this process.
        world_size: Of all.
        even: See `Shard`.
        again: What comes once more after a resume, since it may have to fill the last round: the first `head` entries,
            before those that are to come; or all, from the beginning; or none, where nothing comes twice.
    """

    full = False

    def __init__(self, rank: int, world_size: int, even: Even, again: Again = "all") -> None:
        self._rank = rank
        self._world_size = world_size
        self._even = even
        self._again_from = again
        self._seen = 0  # entries of all ranks
        self._resumed_at = 0  # of them
        self._in_round = 0
        self._mine: Entry | None = None  # of the round that is not complete
        self._newest: Any = None  # cursor
        self._after: Any = None  # cursor and count of the last complete round
        self._first: list[Entry] = []
        self._again = 0  # entries that come once more after a resume

    @property
    def head(self) -> int:
        """How many of the first samples are kept, to fill the last round."""
        return self._world_size - 1 if self._even == "pad" else 0

    def resume(self, cursor: object) -> Any:
        upstream, seen = cursor_parts(cursor, 2)
        self._seen = self._resumed_at = as_count(seen)
        self._after = (upstream, seen)
        if self._again_from == "all" and self.head:
            self._again = self._seen
            return beginning(upstream)
        self._again = self.head if self._again_from == "head" else 0
        return upstream

    def failed_at(self, cursor: object) -> Any:
        return (cursor, self._seen) if self._even == "pad" and not self._in_round else self._after

    def wants(self, limit: int) -> int:
        return min(self._again, AGAIN_AT_ONCE) + limit * self._world_size - self._in_round

    def feed(self, run: list[Entry]) -> list[Entry]:
        mine = []
        for entry in run:
            if len(self._first) < self.head:
                self._first.append(_copy(entry))
            if self._again:
                self._again -= 1
                continue
            if self._in_round == self._rank:
                self._mine = entry
            self._newest = entry.cursor
            self._seen += 1
            self._in_round += 1
            if self._in_round == self._world_size:
                mine.append(self._end_round())
        return mine

    def _end_round(self) -> Entry:
        entry, self._mine = self._mine, None
        assert entry is not None
        entry.cursor = self._after = (self._newest, self._seen)
        self._in_round = 0
        return entry

    def flush(self) -> list[Entry]:
        if not self._in_round or self._even == "drop":
            return []
        if self._even in UNCOUNTED:
            return [] if self._mine is None else [self._end_round()]
        if self._even == "error":
            complete = self._seen - self._in_round
            error = uneven(self._seen, self._world_size, self._resumed_at)
            return [Entry.last(error, self._after, complete // self._world_size)]
        if self._mine is None:
            self._mine = _copy(self._first[(self._rank - self._in_round) % len(self._first)])
        return [self._end_round()]


def _copy(entry: Entry) -> Entry:
    copy = entry.derived(entry.value, entry.cursor, entry.key, entry.position)
    copy.error = entry.error
    if (places := places_of(entry)) is not None:
        copy.places = places
    if (begun := begun_each_of(entry)) is not None:
        copy.begun_each = begun
    copy.state = entry.state
    return copy


class HeadNode(Node):
    """An upstream that, when it is resumed, first gives the beginning of its stream once more.

    Args:
        upstream: What goes on after a cursor.
        again: Gives the same from its beginning; called after a resume only.
        count: How many entries come once more, if there are as many.
    """

    def __init__(self, upstream: Node, again: Callable[[], Node], count: int) -> None:
        self._upstream = upstream
        self._again = again
        self._left = count
        self._head: Node | None = None

    def resume(self, cursor: object) -> None:
        if self._left:
            self._head = self._again()
        self._upstream.resume(cursor)

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room

    @property
    def live(self) -> bool:
        return self._upstream.live

    @property
    def gaps(self) -> bool:
        return self._upstream.gaps

    def start(self, run: "Run", kick: Kick) -> None:
        self._run, self._kick = run, kick
        (self._head or self._upstream).start(run, kick)

    def poll(self, limit: int) -> list[Entry]:
        if self._head is not None:
            taken = self._head.poll(min(limit, self._left))
            self._left -= sum(entry.state != ONE_LOST for entry in taken)
            if taken and taken[-1].state == LAST:
                self.ended = True
                return taken
            if not self._left or self._head.ended:
                self._head.close()
                self._head = None
                self._upstream.start(self._run, self._kick)
            if taken or self._head is not None:
                return taken
        taken = self._upstream.poll(limit)
        self.ended = self._upstream.ended
        return taken

    def close(self) -> None:
        if self._head is not None:
            self._head.close()
        self._upstream.close()
