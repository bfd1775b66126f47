"""Arrays and tensors over mapped files: they travel as the name of the file, which the other process maps again.

Only the address of the bytes counts, not how the array was made: `np.memmap`, a view of one, `torch.from_numpy` of
it, `torch.from_file`, or an array over `mmap.mmap`. Linux says in `/proc/self/maps` which file an address belongs to;
on other systems arrays travel by content.
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
    """A mapped part of a file. When it is unpickled, the other process maps it once for all arrays in it."""

    begin: int  # addresses
    end: int
    writable: bool  # whether writing to the memory writes to the file
    path: str
    offset: int  # in the file
    device: str  # as the kernel shows it
    inode: int

    def __reduce__(self) -> Any:
        found = os.stat(self.path)  # noqa: PTH116 - a string that travels
        size = min(self.end - self.begin, found.st_size - self.offset)
        return _map, (self.path, self.offset, size, self.writable, (found.st_dev, found.st_ino))


class MappedFiles:
    """The mapped files of this process, as they are at the first `reduce`."""

    def __init__(self) -> None:
        self._parts: list[_MappedPart] | None = None
        self._sizes: dict[tuple[str, str, int], int] = {}  # of files; 0: the path names another file by now, or none

    def reduce(self, value: Any) -> Any:
        """How to pickle an array or a tensor; `NotImplemented` if its memory is not a mapped file."""
        if self._parts is None:
            self._parts = _shared_parts()
        if not self._parts:
            return NotImplemented
        is_tensor = isinstance(value, torch.Tensor)
        size = value.element_size() if is_tensor else value.itemsize
        address = value.data_ptr() if is_tensor else value.ctypes.data
        strides = [step * size for step in value.stride()] if is_tensor else value.strides
        low, high = _extent(value.shape, strides, size)
        part = self._part(address + low, address + high) if high else None
        if part is None:
            return NotImplemented
        at = address - part.begin
        if is_tensor:
            dtype = str(value.dtype).removeprefix("torch.")
            return _tensor, (part, at, high, dtype, tuple(value.shape), value.stride())
        named = {name: getattr(value, name, None) for name in ("filename", "offset", "mode")}
        about = (value.dtype, value.shape, value.strides, value.flags.writeable)
        return _array, (type(value), part, at, *about, named)

    def _part(self, begin: int, end: int) -> _MappedPart | None:
        """The part that holds these addresses, if its file still exists."""
        assert self._parts is not None
        index = bisect_right(self._parts, begin, key=lambda part: part.begin) - 1
        if index < 0 or end > self._parts[index].end:
            return None
        part = self._parts[index]
        file = part.path, part.device, part.inode
        if file not in self._sizes:
            self._sizes[file] = _size_if_same(part)
        return part if part.offset + end - part.begin <= self._sizes[file] else None


def _extent(shape: Any, steps: Any, size: int) -> tuple[int, int]:
    """The first and last byte of an array, relative to its first element; (0, 0) if it is empty."""
    if 0 in shape:
        return 0, 0
    reach = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
    return sum(far for far in reach if far < 0), sum(far for far in reach if far > 0) + size


def _mappings() -> Iterator[tuple[_MappedPart, str]]:
    """All mapped parts of files in this process with their access, in the order of addresses."""
    if sys.platform != "linux":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
        for line in lines:
            addresses, access, offset, device, inode, *path = line.rstrip("\n").split(None, 5)
            if path:
                begin, end = (int(address, 16) for address in addresses.split("-"))
                name = path[0].replace("\\012", "\n")  # how the kernel escapes line breaks
                yield _MappedPart(begin, end, access[1] == "w", name, int(offset, 16), device, int(inode)), access


def _shared_parts() -> list[_MappedPart]:
    """The shared mappings. A private one (`mode="c"`) may have been written to, and then differs from the file."""
    return [part for part, access in _mappings() if access[0] == "r" and access[3] == "s"]


def _size_if_same(part: _MappedPart) -> int:
    """The size of the file that `part` maps; 0 if its path names another file by now, or none.

    On overlayfs and btrfs, `stat` and the kernel's list of mappings disagree about a file. So it is mapped again, and
    the two mappings are compared.
    """
    try:
        if not stat.S_ISREG(os.stat(part.path).st_mode):  # noqa: PTH116 - opening a device may have effects
            return 0
        with open(part.path, "rb") as file:  # noqa: PTH123
            size = os.fstat(file.fileno()).st_size
            page = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    same = any(
        (other.device, other.inode) == (part.device, part.inode)
        for other, _ in _mappings()
        if other.begin <= address < other.end
    )
    page.close()
    return size if same else 0


# -- in the other process ----------------------------------------------------------------------------------------------


def _map(path: str, offset: int, size: int, writable: bool, identity: tuple[int, int]) -> mmap.mmap:
    """Map the part of the file.

    Raises:
        FileNotFoundError: The file has been removed or replaced.
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
        warnings.simplefilter("ignore", UserWarning)  # the mapping is read-only
        storage = torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=size).untyped_storage()
    tensor: torch.Tensor = torch.empty(0, dtype=getattr(torch, dtype), device="cpu")
    return tensor.set_(storage, 0, shape, strides)
