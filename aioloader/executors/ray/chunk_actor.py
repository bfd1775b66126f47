"""The actors that run chunks."""

from typing import Any

from aioloader.executors.ray.actors import ActorBase
from aioloader.executors.ray.chunk_runner import AsyncChunkRunner, ChunkRunner
from aioloader.executors.ray.same_host import Told
from aioloader.executors.ray.values import Packed

__all__ = ["AsyncChunkActor", "ChunkActor"]


class ChunkActor(ActorBase):
    """Runs chunks of sync calls, one after the other.

    Args:
        slot: Its number in its pool.
    """

    def __init__(self, slot: int) -> None:
        self._runner = ChunkRunner(slot, self.place())

    def load(self, packed: Packed) -> Packed | None:
        """See `ChunkRunner`."""
        return self._runner.load(packed)

    def run(self, payload: Packed, told: Told | None = None) -> tuple[Any, ...]:
        """See `ChunkRunner`."""
        return self._runner.run(payload, told)

    def serve(self, name: bytes) -> bool:
        """See `ChunkRunner`."""
        return self._runner.serve(name)


class AsyncChunkActor(ActorBase):
    """Awaits chunks of async calls, several side by side.

    Args:
        slot: Its number in its pool.
    """

    def __init__(self, slot: int) -> None:
        self._runner = AsyncChunkRunner(slot, self.place())

    def load(self, packed: Packed) -> Packed | None:
        """See `ChunkRunner`."""
        return self._runner.load(packed)

    async def run(self, payload: Packed, told: Told | None = None) -> tuple[Any, ...]:
        """See `ChunkRunner`."""
        return await self._runner.run(payload, told)
