"""`StandIn`: what torch's global generator would be in the process that a state is from."""

from dataclasses import dataclass
from struct import unpack_from
from typing import Any, Final

import torch

from aioloader.core.seeds import derive_seed

__all__ = ["StandIn", "stand_in"]

BLOCK: Final = 624
"""Numbers that a Mersenne twister makes at once."""

MOST_BLOCKS: Final = 1 << 13
"""Five million numbers: to find out whether so many were drawn takes 0.2 s."""

_NUMBERS: Final = slice(24, 24 + 8 * BLOCK)  # in a state of torch's


@dataclass(frozen=True)
class StandIn:
    """Torch's global generator as it would be, had the program not been begun anew in the middle.

    A program that is resumed draws what it would have drawn: each validation draws a seed for its loader, a
    regularisation its noise. But its generator is another one, unless it has put it back. So this one began in the
    state of the generator of the process that was resumed, and is moved on by as many numbers as are drawn here.

    Attributes:
        since: State of the global generator here, at the place from which numbers are counted.
        instead: State of the other one there.
    """

    since: torch.Tensor
    instead: torch.Tensor

    def moved(self) -> "StandIn | None":
        """As it is now; None: the program has seeded the global generator since, and that decides again."""
        now = torch.get_rng_state()
        if torch.equal(now, self.since):
            return self
        if _seed(now) != _seed(self.since):
            return None
        count = _distance(self.since, now)
        if count is not None:
            return StandIn(now, _moved(self.instead, count))
        if torch.equal(now, torch.Generator().manual_seed(_seed(now)).get_state()):
            return None  # by the same seed
        seed = derive_seed(0, bytes(self.instead.numpy()).hex(), bytes(now.numpy()).hex())  # too far to count
        return StandIn(now, torch.Generator().manual_seed(seed).get_state())


def stand_in(state: torch.Tensor) -> StandIn | None:
    """What stands in for the global generator, which was in `state` there; None: it is in that state here."""
    now = torch.get_rng_state()
    return None if torch.equal(now, state) else StandIn(now, state)


def _seed(state: torch.Tensor) -> int:
    """That which the generator was given."""
    return int(unpack_from("<q", _raw(state))[0])


def _raw(state: torch.Tensor) -> Any:
    return state.numpy().data


def _place(state: torch.Tensor) -> int:
    """Numbers of the block that are drawn."""
    return BLOCK + 1 - int(unpack_from("<i", _raw(state), 8)[0])


def _distance(since: torch.Tensor, now: torch.Tensor) -> int | None:
    """How many numbers were drawn in between; None: too many to count, or it was put into another state."""
    generator = torch.Generator()
    generator.set_state(since)
    block = torch.empty(BLOCK, dtype=torch.int32, device="cpu")
    wanted = now[_NUMBERS]
    for number in range(MOST_BLOCKS):
        if torch.equal(generator.get_state()[_NUMBERS], wanted):
            count = number * BLOCK + _place(now) - _place(since)
            return count if count >= 0 else None
        block.random_(generator=generator)
    return None


def _moved(state: torch.Tensor, count: int) -> torch.Tensor:
    """`state` after `count` numbers more."""
    generator = torch.Generator()
    generator.set_state(state)
    for first in range(0, count, 1 << 16):
        torch.empty(min(1 << 16, count - first), dtype=torch.int32, device="cpu").random_(generator=generator)
    return generator.get_state()
