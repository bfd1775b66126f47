"""What crosses between two processes: values, taken apart into a pickle and large buffers, and messages on a socket."""

import array
import io
import os
import pickle
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple

import torch

from aioloader.core.memory import memory_at, tensor_over
from aioloader.executors.processes.mapped_files import MappedFiles

try:  # now and not when it is needed: a fork in the middle of an import by a thread leaves it half done in the child
    import cloudpickle
except ImportError:
    cloudpickle = None

__all__ = ["SMALL_BYTES", "Connection", "Message", "can_pickle_by_value", "decode", "encode"]

SMALL_BYTES: Final = 1024  # the memory of tensors and arrays below this stays inside the pickle

# -- values ------------------------------------------------------------------------------------------------------------


def encode(
    value: Any, files: MappedFiles | None = None, modules: dict[str, None] | None = None
) -> tuple[bytes, list[memoryview]]:
    """Take `value` apart: a pickle, and the memory of its tensors and arrays, which is not copied.

    Functions and classes of `__main__`, lambdas and closures travel by value where cloudpickle is installed.

    Args:
        value: Anything.
        files: Tensors and arrays whose memory is a file's travel as the name of that; None: by content, too. That is
            for what is small, or does not stay: mapping a file takes longer than copying a sample.
        modules: Gets the names of those that `decode` will import.

    Raises:
        Exception: Whatever pickling an object of the user's raises.
    """
    buffers: list[memoryview] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < SMALL_BYTES:
            return True  # into the pickle
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
    """Put together what `encode` took apart. Tensors and arrays lie in `buffers`, and keep them alive."""
    return pickle.loads(stream, buffers=buffers)


def can_pickle_by_value() -> bool:
    """Whether cloudpickle is there."""
    return cloudpickle is not None


@cache
def _pickler() -> Any:
    """A pickler that knows tensors; torch's own way writes each storage into a file in memory, with a header."""
    base: Any = pickle.Pickler
    otherwise: Callable[[Any, Any], Any] | None = None
    if can_pickle_by_value():
        base = cloudpickle.Pickler
        otherwise = base.reducer_override

    class Pickler(base):  # type: ignore[misc]  # one of two
        files: MappedFiles | None

        def reducer_override(self, value: Any) -> Any:
            if self.files is not None and _is_memory(value):
                taken = self.files.reduce(value)
                if taken is not NotImplemented:
                    return taken
            if type(value) is torch.Tensor and _is_plain(value):
                return _unpack_error(value)
            if type(value) is CodeType and otherwise is not None:
                # cloudpickle forgets the file, and tracebacks from the worker would show no source.
                make, args, *_ = self.dispatch_table[CodeType](value)
                return make, tuple(value.co_filename if arg == "<dynamic-code>" else arg for arg in args)
            if otherwise is None:
                return NotImplemented
            if isinstance(value, FunctionType | type):
                _by_value_if_need_be(value.__module__)
            return otherwise(self, value)

    return Pickler


@cache
def _recorder() -> Any:
    """The same pickler, which takes down where that which travels by reference is defined."""
    base: Any = _pickler()

    class BufferRecorder(base):  # type: ignore[misc]  # made at runtime
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

    return BufferRecorder


def _by_value_if_need_be(name: str) -> None:
    """Let cloudpickle send what a module defines by value, as it does for `__main__`, where a worker cannot import it.

    That is so for modules that were made by hand (of code that was `exec`uted), and for `__mp_main__`: what the user's
    script is called in a process that multiprocessing has spawned, for instance by torch's `mp.spawn`.
    """
    module = sys.modules.get(name)
    if module is None or "." in name or name == "__main__" or name in cloudpickle.list_registry_pickle_by_value():
        return  # what has a dot belongs to a package; those of torch have parts that look like made by hand
    if (name == "__mp_main__" or getattr(module, "__spec__", None) is None) and module.__name__ == name:
        cloudpickle.register_pickle_by_value(module)


def _is_memory(value: Any) -> bool:
    """Whether `value` is an array or a tensor, and nothing more than the memory that it shows."""
    if type(value) is torch.Tensor:
        return _is_plain(value)
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) in (numpy.ndarray, numpy.memmap)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor.__dict__
    )


def _unpack_error(tensor: torch.Tensor) -> Any:
    shape, strides = tuple(tensor.shape), None
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        return _make_empty, (dtype, shape)
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        dense = tensor.permute(order)
        if dense.is_contiguous():  # transposed, or channels-last: it keeps its strides
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

_HEADER: Final = struct.Struct("<IIQ")  # lengths of head and body, and between them the number of file descriptors
_MAX_FDS: Final = 16  # in one message
_MAX_PARTS: Final = 512  # in one call of sendmsg, which takes 1024 at most


class Message(NamedTuple):
    """One message.

    Attributes:
        head: A small tuple; its first item names the kind.
        body: Raw bytes.
        fds: File descriptors, now the receiver's to close.
    """

    head: tuple[Any, ...]
    body: bytearray
    fds: list[int]


class Connection:
    """Messages over a stream socket, blocking or not, as the socket is. Used by one thread.

    Args:
        sock: One end of a socket pair; it is closed with the connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._out: deque[tuple[list[memoryview], list[int]]] = deque()
        self._header = bytearray(_HEADER.size)
        self._head: bytearray | None = None  # None: the header is being read
        self._body = bytearray()
        self._reading_body = False
        self._fd_count = 0
        self._fds: list[int] = []
        self._filling = memoryview(self._header)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether something waits until the socket takes it."""
        return bool(self._out)

    def send(self, head: tuple[Any, ...], parts: Sequence[Any] = (), fds: Sequence[int] = ()) -> None:
        """Send a message, as far as the socket takes it now.

        Args:
            head: See `Message`.
            parts: The body, in pieces.
            fds: At most 16; they are closed when they have been sent.

        Raises:
            OSError: The other side is gone.
        """
        assert len(fds) <= _MAX_FDS
        packed = pickle.dumps(head, 5)
        pieces = [memoryview(part).cast("B") for part in parts if len(part)]
        header = _HEADER.pack(len(packed), len(fds), sum(map(len, pieces)))
        self._out.append(([memoryview(header + packed), *pieces], list(fds)))
        self.flush()

    def flush(self) -> None:
        """Go on sending what is pending."""
        while self._out:
            pieces, fds = self._out[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._socket.sendmsg(pieces[:_MAX_PARTS], ancillary)
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
        """The messages that come, until none is there (a socket that does not block).

        Raises:
            EOFError: The other side is gone.
        """
        ancillary_bytes = socket.CMSG_SPACE(4 * _MAX_FDS)
        while True:
            if not self._filling:
                if (message := self._next_part()) is not None:
                    yield message
                continue
            try:
                read, ancillary, _, _ = self._socket.recvmsg_into([self._filling], ancillary_bytes, _RECEIVE_FLAGS)
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
            self._filling = self._filling[read:]

    def _next_part(self) -> Message | None:
        """What is being read is complete; go on with what comes after it, or give the message."""
        if self._head is None:
            head_bytes, self._fd_count, body_bytes = _HEADER.unpack(self._header)
            self._head = bytearray(head_bytes)
            self._body = bytearray(body_bytes)
            self._filling = memoryview(self._head)
            self._reading_body = False
            return None
        if not self._reading_body and self._body:
            self._reading_body = True
            self._filling = memoryview(self._body)
            return None
        fds, self._fds = self._fds[: self._fd_count], self._fds[self._fd_count :]
        message = Message(pickle.loads(self._head), self._body, fds)
        self._head, self._body = None, bytearray()
        self._filling = memoryview(self._header)
        return message

    def close(self) -> None:
        """Close the socket, and descriptors that were never sent or taken."""
        for _, fds in self._out:
            for fd in fds:
                os.close(fd)
        for fd in self._fds:
            os.close(fd)
        self._out.clear()
        self._fds.clear()
        self._socket.close()


_RECEIVE_FLAGS: Final = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
