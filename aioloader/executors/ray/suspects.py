"""What is known of calls that end their process."""

from dataclasses import dataclass
from typing import NamedTuple

from aioloader.core.address import Address

__all__ = ["CallName", "Suspects"]


class CallName(NamedTuple):
    """Tells one call of a user's function from the others, in whatever process it is made.

    Attributes:
        address: Of the stage.
        key: Of the sample, as text without what depends on the process.
        position: Of the sample; None: not known there.
    """

    address: Address
    key: str
    position: int | None

    def same(self, other: "CallName") -> bool:
        """Whether both are one call."""
        known = None not in (self.position, other.position)
        return self[:2] == other[:2] and (not known or self.position == other.position)


@dataclass(frozen=True)
class Suspects:
    """What an actor is told of them.

    Attributes:
        one_by_one: Calls of the user's functions are to begin one by one, each with leave.
        guilty: Calls that are not made any more, and what is raised instead.
    """

    one_by_one: bool
    guilty: tuple[tuple[CallName, str], ...] = ()
