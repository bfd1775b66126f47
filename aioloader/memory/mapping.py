"""Shared memory that is mapped in this process; a device may page-lock it where it is."""

import ctypes
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final, Protocol

import torch

from aioloader.core.memory import memory_at
from aioloader.memory.lease import lease

__all__ = ["Mapping", "PageLocker", "mapping_of"]


class PageLocker(Protocol):
    """Page-locks memory where it is, which takes about a millisecond for 4 MiB. Called in any thread."""

    def register(self, address: int, nbytes: int) -> bool:
        """Page-lock whole pages; False: it cannot, and says so itself."""
        ...

    def unregister(self, address: int) -> None:
        """What `register` has page-locked is about to be unmapped."""
        ...


class Mapping:
    """A mapped segment, which stays mapped as long as this object or a lease of it lives.

    Python's `mmap` keeps a file descriptor for each mapping: a consumer that keeps a thousand batches would run into
    the limit of open files, as it does with torch's workers.

    Args:
        fd: Of the segment; may be closed at once.
        size: In bytes.
        private: Changes stay in this process.
        lockable: `mapping_of` finds it, and so a device may page-lock it. Only for memory that is used by its leases
            alone, and that nobody writes to before the last of them has died.

    Page-locked memory is read by the device after the call that queued the copy has returned. Why that is safe:

    - *The segment is given back while a copy is under way.* It is given back when its lease dies. `Transfer` keeps the
      tensors that it copies from, and so their lease, until the event after the copies is done.
    - *The worker dies, or its segment is trimmed.* This process then forgets the mapping, not the memory: leases keep
      the mapping, and a file without a name lives as long as it is mapped somewhere.
    - *The loader is closed, or dropped, during a copy.* `Transfer.close` waits for the events before it lets go of the
      tensors, and so does a transfer that nobody closes.
    - *Unmapped while page-locked.* The driver would keep an address that may be mapped again to something else. So the
      last reference unlocks first and unmaps then, in the thread that drops it: the device thread, that of the worker
      processes, or one that closes the loader.
    - *Two transfers, or two device threads, meet one segment.* The driver page-locks a page once only: there is a lock,
      and the first device keeps the segment. A copy to another one goes by `pin`, as without this.
    - *A fork.* The child has the memory, but no driver to unlock it with: it does not touch what the parent has locked.
    - *Private mappings.* To page-lock one copies all of its pages, which then no longer show what is written to the
      segment. Hence they are not lockable.
    """

    def __init__(self, fd: int, size: int, *, private: bool = False, lockable: bool = False) -> None:
        assert not (private and lockable), "a private mapping must not be page-locked"
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {size} bytes of shared memory")
        self.address: int = address
        self.size = size
        self._pid = os.getpid()
        self._lockable = lockable
        self._locking = threading.Lock()
        self._locker: PageLocker | None = None
        self._unmap = _libc().munmap
        if lockable:
            _lockable.add(self)

    def __del__(
        self, getpid: Callable[[], int] = os.getpid, is_finalizing: Callable[[], bool] = sys.is_finalizing
    ) -> None:
        # The defaults are for interpreter exit, when the globals of this module may be cleared already.
        if not hasattr(self, "_unmap"):  # the constructor has failed
            return
        locker = self._locker if getpid() == self._pid else None
        if locker is not None and is_finalizing():  # the driver may have ended: the system takes both
            return
        if self._lockable:
            _lockable.discard(self)
        try:
            if locker is not None:
                locker.unregister(self.address)
        finally:
            self._unmap(self.address, self.size)

    def page_lock(self, locker: PageLocker) -> bool:
        """Page-lock it, unless that is done; whether it is page-locked by `locker` now, and stays so until unmapped.

        Called in a device thread, since the first call takes long.
        """
        if not self._lockable or self._pid != os.getpid():
            return False
        if self._locker is None:
            self._lock_once(locker)
        return self._locker is locker

    def _lock_once(self, locker: PageLocker) -> None:
        with self._locking:
            if self._locker is None and locker.register(self.address, self.size):
                self._locker = locker

    def forget_changes(self) -> None:
        """Of a private mapping: what this process has written is gone, and it shows what is in the segment. On Linux.

        Raises:
            OSError: The system refuses.
        """
        if _libc().madvise(self.address, self.size, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), f"cannot refresh {self.size} bytes of shared memory")

    def memory(self) -> memoryview:
        """All of it; stays mapped as long as the view, or anything made over it, lives."""
        return memory_at(self.address, self.size, owner=self)

    def lend(self, on_return: Callable[..., object], *args: Any) -> memoryview:
        """The whole segment. `on_return(*args)` is called once when the last view of it has died, as `lease` says."""
        return memoryview(lease(self.memory(), self.size, partial(on_return, *args))).cast("B")


def mapping_of(tensor: torch.Tensor) -> Mapping | None:
    """The lockable mapping that the memory of a CPU tensor lies in. torch does not tell what a tensor is made over."""
    return _lockable.find(tensor.data_ptr())


class _Mapped:
    """Mappings by address.

    Mappings die in any thread and between any two bytecodes, so there is no lock that one of them could wait for. Each
    change is one call into C that compares ints, which the GIL makes atomic. `find` takes two steps: where a change
    comes between them it may miss a mapping, and its tensor is then copied as if it were in plain memory. It never
    gives a wrong one, nor one that is dying: the tensor that is asked about keeps the right one alive.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._found: dict[int, tuple[int, weakref.ref[Mapping]]] = {}

    def add(self, mapping: Mapping) -> None:
        self._found[mapping.address] = (mapping.address + mapping.size, weakref.ref(mapping))
        insort(self._starts, mapping.address)

    def discard(self, mapping: Mapping) -> None:
        """Before it is unmapped: afterwards, another one may have its address."""
        self._starts.remove(mapping.address)
        del self._found[mapping.address]

    def find(self, address: int) -> Mapping | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        try:
            start = self._starts[index]
        except IndexError:
            return None
        end, mapping = self._found.get(start, (0, None))
        return mapping() if mapping is not None and start <= address < end else None


_lockable: Final = _Mapped()


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_longlong)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
