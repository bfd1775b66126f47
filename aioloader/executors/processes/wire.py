"""What crosses between two processes: values as a pickle and large buffers, and messages on a socket."""

import array
import io
import os
import pickle
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple

import torch

from aioloader.core.memory import memory_at, tensor_over
from aioloader.executors.processes.mapped_files import MappedFiles

try:  # at import time: a fork while a thread imports it would leave it half done in the child
    import cloudpickle
except ImportError:
    cloudpickle = None

__all__ = ["SMALL_BYTES", "Connection", "Message", "can_pickle_by_value", "decode", "encode"]

SMALL_BYTES: Final = 1024  # smaller tensors and arrays stay inside the pickle

# -- values ------------------------------------------------------------------------------------------------------------


def encode(
    value: Any, files: MappedFiles | None = None, modules: dict[str, None] | None = None
) -> tuple[bytes, list[memoryview]]:
    """Pickle `value`; returns the pickle, and the memory of its tensors and arrays, which is not copied.

    Functions and classes of `__main__`, lambdas and closures are pickled by value where cloudpickle is installed.

    Args:
        value: Anything.
        files: If given, tensors and arrays over mapped files are pickled as the names of these files. Use it for a
            program only: mapping a file takes longer than copying a sample.
        modules: If given, gets the names of the modules that `decode` will import.

    Raises:
        Exception: Whatever pickling a user's object raises.
    """
    buffers: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < SMALL_BYTES:
            return True  # keep it in the pickle
        buffers.append(raw)
        return False

    file = io.BytesIO()
    make = _pickler() if modules is None else _recorder()
    pickler = make(file, protocol=5, buffer_callback=take)
    pickler.files = files
    pickler.modules = modules
    pickler.dump(value)
    return file.getvalue(), buffers


def decode(stream: Any, buffers: Sequence[Any] = ()) -> Any:
    """The value that `encode` pickled. Its tensors and arrays use the memory of `buffers`, and keep it alive."""
    return pickle.loads(stream, buffers=buffers)


def can_pickle_by_value() -> bool:
    """Whether cloudpickle is installed."""
    return cloudpickle is not None


@cache
def _pickler() -> Any:
    """A pickler for tensors: torch's own reducer writes each storage into a file in memory, with a header."""
    base: Any = pickle.Pickler
    reduce_otherwise: Callable[[Any, Any], Any] | None = None
    if can_pickle_by_value():
        base = cloudpickle.Pickler
        reduce_otherwise = base.reducer_override

    class Pickler(base):  # type: ignore[misc]  # one of two
        files: MappedFiles | None

        def reducer_override(self, value: Any) -> Any:
            if self.files is not None and _is_memory(value):
                reduced = self.files.reduce(value)
                if reduced is not NotImplemented:
                    return reduced
            if type(value) is torch.Tensor and _is_plain(value):
                return _reduce_tensor(value)
            if type(value) is CodeType and reduce_otherwise is not None:
                # cloudpickle drops the file name, and tracebacks from the worker would show no source.
                make, args, *_ = self.dispatch_table[CodeType](value)
                return make, tuple(value.co_filename if arg == "<dynamic-code>" else arg for arg in args)
            if reduce_otherwise is None:
                return NotImplemented
            if isinstance(value, FunctionType | type):
                _pickle_by_value_if_needed(value.__module__)
            return reduce_otherwise(self, value)

    return Pickler


@cache
def _recorder() -> Any:
    """The same pickler, which also records the modules of what is pickled by reference."""
    base: Any = _pickler()

    class ModuleRecorder(base):  # type: ignore[misc]  # made at runtime
        modules: dict[str, None]

        def reducer_override(self, value: Any) -> Any:
            reduced = super().reducer_override(value)
            if isinstance(value, ModuleType):
                self.modules[value.__name__] = None
            elif reduced is NotImplemented and isinstance(value, type | FunctionType | BuiltinFunctionType):
                module = getattr(value, "__module__", None)
                if isinstance(module, str):  # some builtin functions have none
                    self.modules[module] = None
            return reduced

    return ModuleRecorder


def _pickle_by_value_if_needed(name: str) -> None:
    """Let cloudpickle pickle a module's definitions by value, as it does for `__main__`, if workers cannot import it.

    They cannot import modules that were made by hand (from code that was `exec`uted), nor `__mp_main__`, the name of
    the user's script in a process that multiprocessing has spawned, for instance by torch's `mp.spawn`.
    """
    module = sys.modules.get(name)
    if module is None or "." in name or name == "__main__" or name in cloudpickle.list_registry_pickle_by_value():
        return  # a name with a dot belongs to a package; some parts of torch's look as if made by hand
    if (name == "__mp_main__" or getattr(module, "__spec__", None) is None) and module.__name__ == name:
        cloudpickle.register_pickle_by_value(module)


def _is_memory(value: Any) -> bool:
    """Whether `value` is a tensor or an array with no state besides its memory."""
    if type(value) is torch.Tensor:
        return _is_plain(value)
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) in (numpy.ndarray, numpy.memmap)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor.__dict__
    )


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    shape, strides = tuple(tensor.shape), None
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        return _make_empty, (dtype, shape)
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.permute(order)
        if dense.is_contiguous():  # transposed or channels-last: the strides are kept
            strides, tensor = tensor.stride(), dense
        else:
            tensor = tensor.contiguous()
    memory = memory_at(tensor.data_ptr(), tensor.nbytes, owner=tensor)
    return _put_together, (pickle.PickleBuffer(memory), dtype, shape, strides)


def _put_together(memory: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> torch.Tensor:
    return tensor_over(memory, shape, getattr(torch, dtype), strides=strides)


def _make_empty(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")


# -- messages ----------------------------------------------------------------------------------------------------------

_HEADER: Final = struct.Struct("<IIQ")  # the length of the head, the number of descriptors, the length of the body
_MAX_FDS: Final = 16  # in one message
_MAX_PIECES: Final = 512  # in one call of sendmsg, which takes 1024 at most


class Message(NamedTuple):
    """One message. The first item of its head names its kind; the receiver closes the descriptors."""

    head: tuple[Any, ...]
    body: bytearray
    fds: list[int]


class Connection:
    """Messages over a stream socket, blocking or not, which is closed with the connection. Used by one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._out: deque[tuple[list[memoryview], list[int]]] = deque()
        self._header = bytearray(_HEADER.size)
        self._head: bytearray | None = None  # None: the header is being read
        self._body = bytearray()
        self._fd_count = 0
        self._fds: list[int] = []
        self._filling = [memoryview(self._header)]

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether there is something that the socket has not taken yet."""
        return bool(self._out)

    def send(self, head: tuple[Any, ...], pieces: Sequence[Any] = (), fds: Sequence[int] = ()) -> None:
        """Send a message with its body in `pieces`; what the socket does not take now stays pending.

        At most 16 descriptors can be sent; they are closed once they are.

        Raises:
            OSError: The other side has closed the connection.
        """
        assert len(fds) <= _MAX_FDS
        packed = pickle.dumps(head, 5)
        body = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        header = _HEADER.pack(len(packed), len(fds), sum(map(len, body)))
        self._out.append(([memoryview(header + packed), *body], list(fds)))
        self.flush()

    def flush(self) -> None:
        """Send what is pending, as far as the socket takes it."""
        while self._out:
            pieces, fds = self._out[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._socket.sendmsg(pieces[:_MAX_PIECES], ancillary)
            except BlockingIOError:
                return
            for fd in fds:  # they go with the first byte
                os.close(fd)
            fds.clear()
            done = 0
            while done < len(pieces) and sent >= len(pieces[done]):
                sent -= len(pieces[done])
                done += 1
            del pieces[:done]
            if pieces:
                pieces[0] = pieces[0][sent:]
            else:
                self._out.popleft()

    def receive(self) -> Iterator[Message]:
        """The messages that come; ends when none is there, if the socket does not block.

        Raises:
            EOFError: The other side has closed the connection.
        """
        ancillary_bytes = socket.CMSG_SPACE(4 * _MAX_FDS)
        while True:
            if not self._filling:
                if (message := self._next_part()) is not None:
                    yield message
                continue
            try:
                read, ancillary, _, _ = self._socket.recvmsg_into(self._filling, ancillary_bytes, _RECEIVE_FLAGS)
            except BlockingIOError:
                return
            except ConnectionResetError:
                read, ancillary = 0, []
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds = array.array("i")
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                    self._fds.extend(fds)
            if not read:
                raise EOFError
            self._filled(read)

    def _filled(self, count: int) -> None:
        """So many bytes have come."""
        filling = self._filling
        while filling and count >= len(filling[0]):
            count -= len(filling.pop(0))
        if count:
            filling[0] = filling[0][count:]

    def _next_part(self) -> Message | None:
        """Go on after the header, or begin with the next one; returns the message that is complete."""
        if self._head is None:
            head_bytes, self._fd_count, body_bytes = _HEADER.unpack(self._header)
            self._head = bytearray(head_bytes)
            self._body = bytearray(body_bytes)
            self._filling = [memoryview(part) for part in (self._head, self._body) if part]
            return None
        fds, self._fds = self._fds[: self._fd_count], self._fds[self._fd_count :]
        message = Message(pickle.loads(self._head), self._body, fds)
        self._head, self._body = None, bytearray()
        self._filling = [memoryview(self._header)]
        return message

    def hang_up(self) -> None:
        """End the connection, in all processes that have it: a forked child may have this end, too."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Close the socket, and the descriptors that still wait to be sent or taken."""
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        for fd in self._fds:
            os.close(fd)
        self._out.clear()
        self._fds.clear()
        self._socket.close()


_RECEIVE_FLAGS: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
