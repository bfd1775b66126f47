"""The slot of one worker of a step whose calls are limited."""

from aioloader.core.limit import Slots

__all__ = ["WorkerSlot"]


class WorkerSlot:
    """The slot of one worker, if it has one.

    Args:
        slots: Those of its step.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held = False

    def ready(self) -> bool:
        """Whether a call may begin: there is a slot. One that it has is kept where nobody waits for one."""
        slots = self._slots
        if self._held and slots.pressed:
            self._held = slots.keep()
        if not self._held:
            self._held = slots.take()
        return self._held

    def leave(self, *, idle: bool = False) -> None:
        """Have no slot. `idle`: nor does the step have use for one."""
        if self._held:
            self._held = False
            self._slots.release()
        if idle:
            self._slots.give_back(waits=False)
