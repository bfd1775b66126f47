"""What is known of calls that end their process."""

from dataclasses import dataclass
from typing import Any

from aioloader.core.address import Address

__all__ = ["Suspects"]


@dataclass(frozen=True)
class Suspects:
    """What an actor is told of them.

    Attributes:
        one_by_one: Calls of the user's functions are to begin one by one, each with leave.
        guilty: Of calls that are not made any more, the address of the stage, the key of the sample, and what is raised
            instead.
    """

    one_by_one: bool
    guilty: tuple[tuple[Address, Any, str], ...] = ()
