"""Admission: the consumer decides when samples may begin."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aioloader.engine.node import Node

__all__ = ["Admission", "Gate"]


class Gate(Protocol):
    """Where samples begin."""

    def wake(self) -> None:
        """More may begin, or fewer."""


def _nobody() -> int:
    return 0


class Admission:
    """Lets no sample begin before the batch that is `batches` in front of its own has been asked for.

    What is alive (begun, and neither handed out nor left out) is at most `(waiting + batches) * batch_size` samples,
    where `waiting` is how many batches the consumer is asking for now. Nothing is added up over time: what is alive is
    counted where it is, in the windows, in folds and between threads. So whatever way a sample leaves, filtered,
    dropped, failed, left over at an end, it makes its room free, and none can be lost.

    A finished or shorter batch counts as a full one, or the samples after it would be a batch too early.

    The consumer always gets its batch: while it waits for one, at least as many samples may be alive as that takes, and
    nothing between the gate and the batch holds any back (`Stage.passes`).

    Args:
        batches: At least 0.
        batch_size: Samples of a batch, at least 1.

    Attributes:
        waiting: How many batches are asked for and not handed out. The delivery sets it.
    """

    def __init__(self, batches: int, batch_size: int) -> None:
        self.batches = batches
        self.batch_size = batch_size
        self.waiting: Callable[[], int] = _nobody
        self.output: Node
        self._gates: list[Gate] = []

    def add(self, gate: Gate) -> None:
        """Samples begin in `gate`, from now on."""
        self._gates.append(gate)

    def remove(self, gate: Gate) -> None:
        """`gate` is closed."""
        if gate in self._gates:
            self._gates.remove(gate)

    @property
    def free(self) -> int:
        """How many samples may begin."""
        return (self.waiting() + self.batches) * self.batch_size - self.output.alive(self.batch_size)

    def changed(self) -> None:
        """A batch is asked for, or samples have left."""
        for gate in self._gates:
            gate.wake()
