"""A batch of what a worker has put into its segment sample after sample: no copy is needed."""

from collections.abc import Sequence
from typing import Final

import torch

from aioloader.core.memory import memory_at, tensor_over
from aioloader.memory.mapping import mapping_of

__all__ = ["STACKED_FROM", "stacked_in_place"]

STACKED_FROM: Final = 1 << 20  # bytes; a copy of less costs nothing to speak of
MOST_KEPT: Final = 4  # times its size: a batch that is kept keeps the whole segment


def stacked_in_place(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What `torch.stack` makes of `tensors`, in their own memory.

    None: they do not lie one after the other in a segment of a worker, or do not take most of it. The result shares
    their memory, so they must be nobody's else. It keeps them alive, and so the segment.
    """
    first = tensors[0]
    address, each, count = first.data_ptr(), first.nbytes, len(tensors)
    if each * count < STACKED_FROM or first.device.type != "cpu":
        return None
    for number, tensor in enumerate(tensors):
        if (
            type(tensor) is not torch.Tensor
            or tensor.data_ptr() != address + number * each
            or tensor.dtype != first.dtype
            or tensor.shape != first.shape
            or tensor.requires_grad
            or not tensor.is_contiguous()
        ):
            return None
    segment = mapping_of(first)
    if segment is None or segment.size > MOST_KEPT * each * count:
        return None
    if address + each * count > segment.address + segment.size:
        return None
    memory = memory_at(address, each * count, owner=list(tensors))
    return tensor_over(memory, (count, *first.shape), first.dtype)
