"""Calls of a user's functions that begin one by one, each with leave: to find the one that ends its process.

Whoever grants the leave is in another process, and outlives the call. When the process dies, the call that has got
leave last is the one that it has died of.
"""

import asyncio
import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from aioloader.core.safe_text import safe_repr
from aioloader.engine.ops import Op
from aioloader.errors import WorkerDiedError
from aioloader.executors.current_sample import current_sample
from aioloader.executors.ray.suspects import CallName, Suspects

__all__ = ["Asked", "CallGate"]


@dataclass(frozen=True)
class Asked:
    """A call that waits for leave.

    Attributes:
        name: Which one it is.
        stage: The name of its stage.
        key: Of its sample, for texts.
        begin: Gives leave.
    """

    name: CallName
    stage: str
    key: str
    begin: Callable[[], None]


class CallGate:
    """What functions are wrapped with.

    Args:
        on_loop: Calls a function on the event loop, from any thread.
        suspects: What is known.
    """

    def __init__(self, on_loop: Callable[..., object], suspects: Suspects) -> None:
        self._on_loop = on_loop
        self._guilty = suspects.guilty
        self._open = not suspects.one_by_one
        self._waiting: deque[Asked] = deque()
        self._number = 0  # of the call whose turn it is
        self._begun = False  # it has
        self._watching: dict[int, asyncio.Future[Asked | None]] = {}

    def wrap(self, op: Op) -> Op:
        """`op`, which asks before each call. One in worker processes of the actor, which may die, does not."""
        if op.executor is not None or op.in_place:
            return op
        fn = self._of_async(op) if op.is_async else self._of_sync(op)
        return replace(op, fn=fn, many=None)

    def _of_sync(self, op: Op) -> Callable[[Any], Any]:
        def call(sample: Any) -> Any:
            key = self._check(op)
            if self._open:
                return op.fn(sample)
            leave = threading.Event()
            self._on_loop(self._ask, _asked(op, key, leave.set))
            leave.wait()
            try:
                return op.fn(sample)
            finally:
                self._on_loop(self._ended)

        return call

    def _of_async(self, op: Op) -> Callable[[Any], Any]:
        async def call(sample: Any) -> Any:
            key = self._check(op)
            if self._open:
                return await op.fn(sample)
            leave = asyncio.Event()
            self._ask(_asked(op, key, leave.set))
            await leave.wait()
            try:
                return await op.fn(sample)
            finally:
                self._ended()

        return call

    def _check(self, op: Op) -> tuple[Any, int | None]:
        """The key and the position of the sample at hand.

        Raises:
            WorkerDiedError: The call is guilty.
        """
        context = current_sample.get()
        found = (None, None) if context is None or context.name is None else (context.name.key, context.name.position)
        if self._guilty:
            name = _name(op, *found)
            for known, text in self._guilty:
                if name.same(known):
                    raise WorkerDiedError(text)
        return found

    # -- on the loop -------------------------------------------------------------------------------------------------

    def _ask(self, asked: Asked) -> None:
        if self._open:
            asked.begin()
            return
        self._waiting.append(asked)
        self._tell()

    def _tell(self) -> None:
        watching = self._watching.get(self._number)
        if self._waiting and not self._begun and watching is not None and not watching.done():
            watching.set_result(self._waiting[0])

    def _ended(self) -> None:
        if not self._open:
            self._begun = False
            self._watching.pop(self._number, None)
            self._number += 1
            self._tell()

    async def watch(self, number: int) -> Asked | None:
        """The call number `number`, from 0, as soon as it waits for leave; None: there is no more need to look."""
        if self._open or number < self._number:
            return None
        watching: asyncio.Future[Asked | None] = asyncio.get_running_loop().create_future()
        self._watching[number] = watching
        self._tell()
        return await watching

    def go(self, number: int | None) -> None:
        """Let call number `number` begin; None: let all, from now on."""
        if self._open:
            return
        if number is None:
            self._open = True
            for asked in self._waiting:
                asked.begin()
            self._waiting.clear()
            for watching in self._watching.values():
                if not watching.done():
                    watching.set_result(None)
            self._watching.clear()
        elif number == self._number and self._waiting and not self._begun:
            self._begun = True
            self._waiting.popleft().begin()


def _asked(op: Op, sample: tuple[Any, int | None], begin: Callable[[], None]) -> Asked:
    return Asked(_name(op, *sample), op.label, safe_repr(sample[0]), begin)


def _name(op: Op, key: Any, position: int | None) -> CallName:
    return CallName(op.address, _PLACE.sub("", safe_repr(key)), position)


_PLACE: Final = re.compile(r" at 0x[0-9a-fA-F]+")  # in the text of objects that have none of their own
