"""Buffers in one row of bytes, each at an aligned offset: how pickled values travel, and how they are stored."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["ALIGNMENT", "Layout", "aligned", "lay_out", "layout_of", "open_buffers"]

ALIGNMENT: Final = 64  # bytes; a cache line, and more than any dtype needs

Layout: TypeAlias = Sequence[tuple[int, int]]
"""The offset and the size of each buffer."""


def aligned(size: int) -> int:
    """`size` rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout_of(sizes: Iterable[int], start: int = 0) -> Layout:
    """Where buffers of these sizes lie, the first one at `start` or soon after it."""
    layout = []
    end = start
    for size in sizes:
        offset = aligned(end)
        layout.append((offset, size))
        end = offset + size
    return layout


def lay_out(buffers: Sequence[Any], start: int = 0) -> tuple[Layout, list[Any]]:
    """The layout of `buffers`, flat ones, and the pieces to write one after the other: padding and buffer in turn.

    The pieces begin after `start` bytes that are written before.
    """
    layout = layout_of(map(len, buffers), start)
    pieces: list[Any] = []
    end = start
    for buffer, (offset, size) in zip(buffers, layout, strict=True):
        pieces += [bytes(offset - end), buffer]
        end = offset + size
    return layout, pieces


def open_buffers(memory: memoryview, layout: Layout) -> list[memoryview]:
    """The buffers in `memory`, which are not copied."""
    return [memory[offset : offset + size] for offset, size in layout]
