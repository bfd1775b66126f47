"""What a forked child must reset.

The child has one thread: what the parent's other threads served is dead there, and locks that they held stay locked for
ever. So every object with a lock or a thread is told of the fork, in the child, before anything else runs there. It
lets go of what belongs to the parent (threads, processes, connections) without ending it.
"""

import os
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

__all__ = ["Forkable", "after_fork_in_child", "tell_of_fork"]


class Forkable(Protocol):
    """An object that is told about forks."""

    def _forked(self) -> None:
        """Reset this object, in the child. No other thread runs yet."""


_told: WeakValueDictionary[int, Forkable] = WeakValueDictionary()  # by id: a user's subclass may have no hash


def tell_of_fork(thing: Forkable) -> None:
    """Call `thing._forked()` in every child that is forked while `thing` lives."""
    _told[id(thing)] = thing


def after_fork_in_child(function: Callable[[], None]) -> None:
    """Call `function` in every child that is forked from now on."""
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(after_in_child=function)


def _forked() -> None:
    for thing in list(_told.values()):
        thing._forked()


after_fork_in_child(_forked)
