"""The actor in which parts of a pipeline run."""

import asyncio
from time import process_time
from typing import Any, Final, Protocol

from aioloader.core.cores import use_cores
from aioloader.executors.processes.failures import portable
from aioloader.executors.ray.actors import ActorBase
from aioloader.executors.ray.owners import Owner, is_gone
from aioloader.executors.ray.same_host import Told
from aioloader.executors.ray.values import Packed, pack, unpack

__all__ = ["ReaderActor", "ServesParts"]

LOOK_SECONDS: Final = 1.0  # that it may take to ask who still lives


class ServesParts(Protocol):
    """Runs parts of one pipeline on the event loop of its actor."""

    async def open(self, wire: str, request: Any) -> None:
        """Begin a part.

        Raises:
            Exception: It cannot begin.
        """

    async def read(self, wire: str, number: int, more: int, handed_out: int, told: Told | None = None) -> Any:
        """What comes next of it, see `ReaderActor.read`."""

    async def rest(self, wire: str, pause: int, drain: bool) -> None:
        """Begin no sample; returns when none begins any more, or when none is under way either."""

    def let_go(self, wire: str, pause: int) -> None:
        """Begin samples again."""

    async def watch(self, wire: str, number: int) -> Any:
        """The call number `number` of a part whose calls begin one by one, which waits for `go`."""

    def go(self, wire: str, number: int | None) -> None:
        """Let that call begin; None: let all, from now on."""

    def end(self, wire: str) -> None:
        """Stop a part."""

    async def close(self) -> None:
        """Stop all of them; returns when they have let go of what they had open."""


class ReaderActor(ActorBase):
    """Parts run on its event loop. Its calls begin in any order, so each says which one it is.

    What a part was opened for is known by its *wire*, a name that nobody uses twice: a part that has been opened again
    elsewhere has another one, and whatever still comes over this one falls on deaf ears.

    Args:
        cores: How many cores it may use.
    """

    def __init__(self, cores: int) -> None:
        use_cores(cores)
        self._programs: dict[str, ServesParts] = {}
        self._serves: dict[str, ServesParts] = {}
        self._owners: dict[str, Owner] = {}  # of each program
        self._looks = False

    async def open(
        self, wire: str, whose: tuple[str, Owner], program: Packed, shared: bool, request: Packed
    ) -> Packed | None:
        """Begin a part; returns what it failed with, if it did.

        Args:
            wire: Of this part, this time; begins with the name of the program.
            whose: The name of the program, and who reads.
            program: Gives who serves the parts.
            shared: Parts may share a copy of it.
            request: Which part, and where it begins.
        """
        where = f"Ray reader ({self.place()})"
        name, owner = whose
        self._owners[name] = owner
        await self._end_what_is_nobodys()
        try:
            serves = self._programs.get(name) if shared else None
            if serves is None:
                serves = unpack(program).begin(where)
                if shared:
                    self._programs[name] = serves
            await serves.open(wire, unpack(request))
        except BaseException as error:  # it is raised where it is waited for
            return pack(portable(error, where))
        self._serves[wire] = serves
        return None

    async def read(self, wire: str, number: int, more: int, handed_out: int, told: Told | None = None) -> Any:
        """What comes next of a part: as soon as something does, and after what reads with lower numbers have got.

        Args:
            wire: Of the part.
            number: Of this read, from 0.
            more: So many entries more may come.
            handed_out: Batches that the consumer has got.
            told: From a process on this host, to which values go in segments.

        Returns:
            `("entries", places, values)`, `("ended", meters)`, `("failed", error)`, or `("gone",)` when nobody knows
            of the part any more; and the CPU time of this process.
        """
        serves = self._serves.get(wire)
        answer = ("gone",) if serves is None else await serves.read(wire, number, more, handed_out, told)
        return answer, process_time()

    async def rest(self, wire: str, pause: int, drain: bool) -> None:
        """See `ServesParts`."""
        if (serves := self._serves.get(wire)) is not None:
            await serves.rest(wire, pause, drain)

    async def let_go(self, wire: str, pause: int) -> None:
        """See `ServesParts`."""
        if (serves := self._serves.get(wire)) is not None:
            serves.let_go(wire, pause)

    async def watch(self, wire: str, number: int) -> Any:
        """See `ServesParts`."""
        serves = self._serves.get(wire)
        return None if serves is None else await serves.watch(wire, number)

    async def go(self, wire: str, number: int | None) -> None:
        """See `ServesParts`."""
        if (serves := self._serves.get(wire)) is not None:
            serves.go(wire, number)

    async def end(self, wire: str) -> None:
        """See `ServesParts`."""
        if (serves := self._serves.pop(wire, None)) is not None:
            serves.end(wire)

    async def forget(self, name: str) -> None:
        """Nobody runs this program any more."""
        self._programs.pop(name, None)
        self._owners.pop(name, None)

    async def _end_what_is_nobodys(self) -> None:
        """End the parts of processes that were killed: nobody else does, and the actor outlives them in a pool.

        Whoever comes next looks, so that nothing polls.
        """
        owners = set(self._owners.values())
        if len(owners) < 2 or self._looks:
            return
        self._looks = True
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                gone = await asyncio.to_thread(lambda: {owner for owner in owners if is_gone(owner)})
        except TimeoutError:
            return
        finally:
            self._looks = False
        for name in [name for name, owner in self._owners.items() if owner in gone]:
            for wire in [wire for wire in self._serves if wire.startswith(name)]:
                await self.end(wire)
            await self.forget(name)

    async def close(self) -> None:
        """Let go of what is open: the actor is about to be killed."""
        for serves in {id(serves): serves for serves in self._serves.values()}.values():
            await serves.close()
        self._serves.clear()
