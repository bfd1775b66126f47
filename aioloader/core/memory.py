"""Where the memory of a tensor comes from."""

from collections.abc import Callable, Sequence

import torch

__all__ = ["Alloc"]

Alloc = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Gives uninitialised, contiguous host memory of this shape and dtype, for instance page-locked or used before."""
