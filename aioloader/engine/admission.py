"""Admission: the consumer decides when samples may begin."""

from collections.abc import Callable
from typing import Protocol

__all__ = ["Admission", "AdmissionGate", "ConsumerAdmission", "RemoteAdmission"]


class AdmissionGate(Protocol):
    """Where samples begin."""

    def wake(self) -> None:
        """More may begin, or fewer."""


class HoldsSamples(Protocol):
    """Where samples are alive; see `Node`."""

    def alive(self, size: int) -> int: ...


def _nobody() -> int:
    return 0


class Admission:
    """See `free`; what the two kinds share is who is told.

    Attributes:
        output: The last node of those that samples are alive in.
    """

    output: HoldsSamples

    def __init__(self) -> None:
        self._gates: list[AdmissionGate] = []

    @property
    def free(self) -> int:
        """How many samples may begin."""
        raise NotImplementedError

    def add(self, gate: AdmissionGate) -> None:
        """Samples begin in `gate`, from now on."""
        self._gates.append(gate)

    def remove(self, gate: AdmissionGate) -> None:
        """`gate` is closed."""
        if gate in self._gates:
            self._gates.remove(gate)

    def changed(self) -> None:
        """A batch is asked for, or samples have left."""
        for gate in self._gates:
            gate.wake()


class ConsumerAdmission(Admission):
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
        super().__init__()
        self.batches = batches
        self.batch_size = batch_size
        self.waiting: Callable[[], int] = _nobody

    @property
    def free(self) -> int:
        return (self.waiting() + self.batches) * self.batch_size - self.output.alive(self.batch_size)


class RemoteAdmission(Admission):
    """The same in a process of its own, where the consumer's decision arrives as a number that only grows.

    It counts samples since the beginning: so many may have been begun, all in all. What has been sent is nobody's here
    any more, so it is counted once, as sent.

    Args:
        size: For how many samples one of the entries that are sent stands.

    Attributes:
        allowed: Samples that may have been begun, and not been left out here.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.allowed = 0
        self._sent = 0

    @property
    def free(self) -> int:
        return self.allowed - self._sent - self.output.alive(self.size)

    def allow(self, samples: int) -> None:
        """So many may have been begun."""
        self.allowed = samples
        self.changed()

    def sent(self, entries: int) -> None:
        """These are the consumer's."""
        self._sent += entries * self.size
