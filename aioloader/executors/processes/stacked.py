"""A batch of what a worker has put into its segment sample after sample: no copy is needed."""

from collections.abc import Sequence
from typing import Final

import torch

from aioloader.core.memory import memory_at, tensor_over
from aioloader.memory.mapping import mapping_of

__all__ = ["STACKED_FROM", "stacked_in_place"]

STACKED_FROM: Final = 1 << 20  # bytes; a copy of less costs nothing to speak of
MOST_KEPT: Final = 4  # times its size: a batch that is kept keeps the whole segment


def stacked_in_place(tensors: Sequence[torch.Tensor], taken: list[tuple[int, int]]) -> torch.Tensor | None:
    """What `torch.stack` makes of `tensors`, one of each sample of a batch, in their own memory.

    What one worker sent together may share memory: a function may return `(x, x)`, or for several keys the same tensor.
    So the samples of the batch must be all that came together, and what another part of the batch is made of is copied.

    Args:
        tensors: Nobody else has them. The result keeps them alive, and so the segment.
        taken: The memory of other parts of the same batch, from and to which address; gets that of the result.

    Returns:
        The batch; None: they do not lie one after the other in a segment of a worker, or are not all that is there.
    """
    first, count = tensors[0], len(tensors)
    if any(type(tensor) is not torch.Tensor or tensor.layout is not torch.strided for tensor in tensors):
        return None
    if first.device.type != "cpu":
        return None
    each, begin = first.nbytes, first.data_ptr()
    end = begin + each * count
    if each * count < STACKED_FROM or any(begin < other_end and other < end for other, other_end in taken):
        return None
    for number, tensor in enumerate(tensors):
        if (
            tensor.data_ptr() != begin + number * each
            or tensor.dtype != first.dtype
            or tensor.shape != first.shape
            or tensor.requires_grad
            or not tensor.is_contiguous()
        ):
            return None
    segment = mapping_of(first)
    if segment is None or segment.samples != count or segment.size > MOST_KEPT * each * count:
        return None
    if end > segment.address + segment.size:
        return None
    taken.append((begin, end))
    return tensor_over(memory_at(begin, each * count, owner=list(tensors)), (count, *first.shape), first.dtype)
