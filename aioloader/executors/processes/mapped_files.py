"""Arrays and tensors whose memory is a file's: to another process travels the name of the file, which is mapped there.

What counts is where the bytes lie, not how the array came about: `np.memmap`, a view of one, `torch.from_numpy` of
it, `torch.from_file`, an array over `mmap.mmap`. Linux says in `/proc/self/maps` which file an address belongs to;
elsewhere arrays travel by their content.
"""

import ctypes
import mmap
import os
import stat
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MappedFiles"]


@dataclass(frozen=True, eq=False)
class _MappedPart:
    """A part of a file that is mapped here. Pickled, it is mapped where it arrives, once for all arrays in it.

    Attributes:
        begin: The address of its first byte.
        end: That after its last.
        writable: Whether writing to the memory writes to the file.
        path: The file.
        offset: Where in the file it begins.
        device: Of the file, as the kernel has it.
        inode: Likewise.
    """

    begin: int
    end: int
    writable: bool
    path: str
    offset: int
    device: str
    inode: int

    def __reduce__(self) -> Any:
        found = os.stat(self.path)  # noqa: PTH116 - a string that travels
        size = min(self.end - self.begin, found.st_size - self.offset)
        return _map, (self.path, self.offset, size, self.writable, (found.st_dev, found.st_ino))


class MappedFiles:
    """Knows which memory of this process is a file's, as it is at the first question."""

    def __init__(self) -> None:
        self._segments: list[_MappedPart] | None = None
        self._sizes: dict[tuple[str, str, int], int] = {}  # of files; 0: another one, or none, has its name by now

    def reduce(self, value: Any) -> Any:
        """How pickle is to take an array or a tensor apart; `NotImplemented`: its memory is not a file's."""
        if self._segments is None:
            self._segments = _shared_segments()
        if not self._segments:
            return NotImplemented
        is_tensor = isinstance(value, torch.Tensor)
        size = value.element_size() if is_tensor else value.itemsize
        address = value.data_ptr() if is_tensor else value.ctypes.data
        strides = [step * size for step in value.stride()] if is_tensor else value.strides
        low, high = _extent(value.shape, strides, size)
        segment = self._segment(address + low, address + high) if high else None
        if segment is None:
            return NotImplemented
        at = address - segment.begin
        if is_tensor:
            dtype = str(value.dtype).removeprefix("torch.")
            return _tensor, (segment, at, high, dtype, tuple(value.shape), value.stride())
        named = {name: getattr(value, name, None) for name in ("filename", "offset", "mode")}
        about = (value.dtype, value.shape, value.strides, value.flags.writeable)
        return _array, (type(value), segment, at, *about, named)

    def _segment(self, begin: int, end: int) -> _MappedPart | None:
        """The one that holds these addresses, if its file is still there."""
        assert self._segments is not None
        index = bisect_right(self._segments, begin, key=lambda segment: segment.begin) - 1
        if index < 0 or end > self._segments[index].end:
            return None
        segment = self._segments[index]
        file = segment.path, segment.device, segment.inode
        if file not in self._sizes:
            self._sizes[file] = _size_if_same(segment)
        return segment if segment.offset + end - segment.begin <= self._sizes[file] else None


def _extent(shape: Any, steps: Any, size: int) -> tuple[int, int]:
    """Where the bytes of an array lie, from its first element on; (0, 0): it has none."""
    if 0 in shape:
        return 0, 0
    reach = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
    return sum(far for far in reach if far < 0), sum(far for far in reach if far > 0) + size


def _mappings() -> Iterator[tuple[_MappedPart, str]]:
    """All files, and parts of them, that are mapped into this process, in the order of addresses; and the access."""
    if sys.platform != "linux":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
        for line in lines:
            addresses, access, offset, device, inode, *path = line.rstrip("\n").split(None, 5)
            if path:
                begin, end = (int(address, 16) for address in addresses.split("-"))
                name = path[0].replace("\\012", "\n")  # the kernel writes line breaks so
                yield _MappedPart(begin, end, access[1] == "w", name, int(offset, 16), device, int(inode)), access


def _shared_segments() -> list[_MappedPart]:
    """Those that show what is in the file. A private mapping (`mode="c"`) may have been written to."""
    return [segment for segment, access in _mappings() if access[0] == "r" and access[3] == "s"]


def _size_if_same(segment: _MappedPart) -> int:
    """The size of the file at the path of `segment`; 0 if that is gone, or another one by now.

    What `stat` says of a file need not be what the kernel says of a mapping (overlayfs, btrfs), so it is mapped anew.
    """
    try:
        if not stat.S_ISREG(os.stat(segment.path).st_mode):  # noqa: PTH116 - a device is better left alone
            return 0
        with open(segment.path, "rb") as file:  # noqa: PTH123
            size = os.fstat(file.fileno()).st_size
            page = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    same = any(
        (other.device, other.inode) == (segment.device, segment.inode)
        for other, _ in _mappings()
        if other.begin <= address < other.end
    )
    page.close()
    return size if same else 0


# -- where they arrive -------------------------------------------------------------------------------------------------


def _map(path: str, offset: int, size: int, writable: bool, identity: tuple[int, int]) -> mmap.mmap:
    """The part of the file.

    Raises:
        FileNotFoundError: The file is not there any more.
    """
    try:
        with open(path, "r+b" if writable else "rb") as file:  # noqa: PTH123
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) == identity and found.st_size >= offset + size:
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                return mmap.mmap(file.fileno(), size, access=access, offset=offset)
    except FileNotFoundError:
        pass
    raise FileNotFoundError(
        f"a memory-mapped array travels to worker processes as the name of its file, which must stay until they have "
        f"all been started; {path} has been removed or replaced since. Keep the file, or copy the array: np.array(it)"
    )


def _array(
    kind: Any, memory: mmap.mmap, at: int, dtype: Any, shape: Any, strides: Any, writeable: bool, named: dict[str, Any]
) -> Any:
    import numpy as np

    array = np.ndarray.__new__(kind, shape, dtype, memory, at, strides)
    array.flags.writeable = writeable
    if kind is np.memmap:
        vars(array).update(named, _mmap=memory)
    return array


def _tensor(memory: mmap.mmap, at: int, size: int, dtype: str, shape: Any, strides: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a file that is mapped to be read cannot be written to
        storage = torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=size).untyped_storage()
    tensor: torch.Tensor = torch.empty(0, dtype=getattr(torch, dtype), device="cpu")
    return tensor.set_(storage, 0, shape, strides)
