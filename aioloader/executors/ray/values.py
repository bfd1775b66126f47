"""Values on their way through Ray's object store: a pickle, and the memory of tensors and arrays beside it.

Ray pickles tensors inside its own pickle, which takes 165 to 365 ms for 38 MB; as NumPy arrays they take 10 to 12.

What comes out of the object store is the store's own memory. NumPy says that it is read-only, but torch does not look:
writing to a tensor over it changes it, in silence, for everybody who reads that result. So what arrives is copied,
always.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from aioloader.core.memory import Alloc
from aioloader.executors.processes.wire import decode, encode
from aioloader.memory.pool import SMALLEST_BYTES

__all__ = ["Packed", "encoded", "nbytes_of", "pack", "unpack"]

Packed: TypeAlias = tuple[bytes, list[Any]]
"""A pickle, and a NumPy array of bytes for each buffer."""


def pack(value: Any) -> Packed:
    """`value` for an argument or a result of Ray. Its tensors and arrays are not copied: Ray does that.

    Raises:
        Exception: Whatever pickling a user's object raises.
    """
    return encoded(*encode(value))


def encoded(stream: bytes, buffers: Iterable[memoryview]) -> Packed:
    """The same of what `encode` gives."""
    import numpy

    return stream, [numpy.frombuffer(buffer, numpy.uint8) for buffer in buffers]


def unpack(packed: Packed, alloc: Alloc | None = None) -> Any:
    """The value, in memory of its own.

    Args:
        packed: Of `pack`, as Ray gives it.
        alloc: Gives memory for buffers of `SMALLEST_BYTES` and more; None: they are new.

    Raises:
        Exception: It cannot be unpickled here.
    """
    stream, arrays = packed
    return decode(stream, [_copied(array, alloc) for array in arrays])


def nbytes_of(packed: Packed) -> int:
    """Its size in the object store."""
    stream, arrays = packed
    return len(stream) + sum(int(array.nbytes) for array in arrays)


def _copied(array: Any, alloc: Callable[[Sequence[int], torch.dtype], torch.Tensor] | None) -> Any:
    if alloc is None or array.nbytes < SMALLEST_BYTES:
        return bytearray(array)
    memory: Any = alloc((array.nbytes,), torch.uint8).numpy()
    memory[:] = array
    return memoryview(memory)
