"""Exceptions that cross between processes: each keeps its type, and everything of it that can be pickled."""

import pickle
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, NamedTuple
from urllib.error import HTTPError
from urllib.response import addinfourl

from aioloader.core.safe_text import add_note, safe_repr, safe_str
from aioloader.executors.processes.wire import decode, encode

__all__ = ["BY_VALUE", "cannot_travel", "portable"]

BY_VALUE: Final = (
    "pip install 'aioloader[process]' brings cloudpickle, which also takes lambdas, closures and what is defined in "
    "__main__"
)


def portable(error: BaseException, where: str) -> BaseException:
    """A stand-in for `error` that can always be pickled, and is unpickled as an exception of the same type.

    It carries the notes, `__cause__` and `__context__`, and the traceback as a note that names `where` it was raised.
    Attributes that cannot be pickled, such as open files and locks, are left out and named in a note. `error` itself is
    not changed.
    """
    if isinstance(error, _TravellingError):
        return error
    shown = traceback.TracebackException.from_exception(error)
    shown.__notes__ = None  # they travel with the error
    text = "".join(shown.format()).rstrip()
    return _TravellingError(_pack(error, {}, f"aioloader: in {where}:\n{text}"))


class _TravellingError(Exception):
    """Stands for an exception while it travels; unpickling it gives the exception."""

    def __init__(self, parcel: "_Parcel") -> None:
        super().__init__(parcel)

    def __reduce__(self) -> Any:
        return _unpack, self.args


class _Parcel(NamedTuple):
    """An exception as plain data.

    `content` is the pickle of the exception or of its `_Parts`, with its `buffers`; None: neither can be pickled.
    `words` is the message used where the exception's type cannot be imported.
    """

    content: bytes | None
    buffers: list[bytearray]
    words: str
    notes: list[str]
    members: "list[_Parcel]"
    cause: "_Parcel | None"
    context: "_Parcel | None"
    suppresses: bool


def _pack(error: BaseException, outer: dict[int, BaseException], *more_notes: str) -> _Parcel:
    """Pack `error` and the exceptions that it refers to, without those in `outer` (by `id`), which refer to it."""
    outer = {**outer, id(error): error}

    def linked(other: BaseException | None) -> _Parcel | None:
        return None if other is None or id(other) in outer else _pack(other, outer)

    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    dropped: list[str] = []
    content, buffers = _encoded(error) or _encoded_parts(error, outer, dropped) or (None, [])
    notes = [note for note in vars(error).get("__notes__", ()) if isinstance(note, str)]
    if dropped:
        notes.append(f"aioloader: left behind, since it cannot be pickled: {', '.join(dropped)}")
    return _Parcel(
        content,
        [bytearray(buffer) for buffer in buffers],
        f"{type(error).__qualname__}: {safe_str(error)}",
        [*notes, *(note for note in more_notes if note not in notes)],
        [_pack(member, outer) for member in group],
        linked(error.__cause__),
        linked(error.__context__),
        error.__suppress_context__,
    )


def _encoded(error: BaseException) -> tuple[bytes, list[memoryview]] | None:
    """The exception as its class pickles it; None: that fails, or unpickling gives something else."""
    if isinstance(error, BaseExceptionGroup):
        return None  # its members are packed one by one
    try:
        encoded = encode(error)
        travelled = decode(*encoded)
        faithful = type(travelled).__qualname__ == type(error).__qualname__ and travelled.args == error.args
    except Exception:
        return None
    return encoded if faithful else None


class _Parts(NamedTuple):
    """What an exception is rebuilt from without its `__init__`, which may take other arguments than `args`."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]
    members: dict[str, Any]  # what is not in its `__dict__`: `errno` of an `OSError`, `__slots__`

    def rebuild(self, group: Sequence[BaseException]) -> BaseException:
        """The exception; `group` has the members if it is an exception group."""
        kind = self.kind
        builtin = (vars(base).get("__new__") for base in kind.__mro__)
        make = next(new for new in builtin if isinstance(new, BuiltinFunctionType))
        error: BaseException = make(kind, *self.args, *([group] if group else []))
        if not group:
            error.args = self.args
        vars(error).update(self.state)
        for name, value in self.members.items():
            with suppress(AttributeError, TypeError):  # some are read-only
                object.__setattr__(error, name, value)
        if isinstance(error, HTTPError) and "file" not in self.state:  # its `__getattr__` reads from the file
            headers, url, code = map(self.state.get, ("hdrs", "url", "code"))
            addinfourl.__init__(error, BytesIO(), headers, url, code)  # type: ignore[arg-type]  # as they were
        return error


def _encoded_parts(
    error: BaseException, outer: dict[int, BaseException], dropped: list[str]
) -> tuple[bytes, list[memoryview]] | None:
    """Its `_Parts`; None: not even its class can be pickled. Names of what is left out are appended to `dropped`."""

    def picklable(values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            try:
                if isinstance(value, BaseException):
                    if id(value) in outer:
                        continue
                    value = _TravellingError(_pack(value, outer))
                decode(*encode(value))
                found[name] = value
            except Exception:
                dropped.append(name)
        return found

    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    own_args = error.args[:1] if group else error.args
    args = picklable({f"args[{index}]": arg for index, arg in enumerate(own_args)})
    parts = _Parts(
        type(error),
        tuple(args.get(f"args[{index}]", safe_repr(arg)) for index, arg in enumerate(own_args)),
        picklable({name: value for name, value in vars(error).items() if name != "__notes__"}),
        picklable(_members(error)),
    )
    try:
        encoded = encode(parts)
        decode(*encoded).rebuild(group)
    except Exception:
        return None
    return encoded


def _members(error: BaseException) -> dict[str, Any]:
    """Attributes of `error` that are not in its `__dict__`."""
    found = {}
    for base in type(error).__mro__:
        if base in _NO_MEMBERS:
            continue
        for name, member in vars(base).items():
            if isinstance(member, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                found[name] = getattr(error, name, None)
    if isinstance(error, AttributeError):
        found.pop("obj", None)  # may be any object of the program, and pickle leaves it out too
    return {name: value for name, value in found.items() if value is not None}


_NO_MEMBERS: Final = (BaseExceptionGroup, ExceptionGroup, BaseException, Exception, object)


def _unpack(parcel: _Parcel) -> BaseException:
    error: BaseException = RuntimeError(parcel.words)
    if parcel.content is not None:
        with suppress(Exception):  # its class does not exist here
            content = decode(parcel.content, parcel.buffers)
            if isinstance(content, _Parts):
                content = content.rebuild([_unpack(member) for member in parcel.members])
            error = content
    for note in parcel.notes:
        if note not in vars(error).get("__notes__", ()):
            add_note(error, note)
    for name, linked in (("__cause__", parcel.cause), ("__context__", parcel.context)):
        if linked is not None:
            object.__setattr__(error, name, _unpack(linked))  # the class may have its own `__setattr__`
    object.__setattr__(error, "__suppress_context__", parcel.suppresses)
    return error


def cannot_travel(what: str, error: BaseException, *, by_value: bool) -> BaseException:
    """The error for something that cannot be pickled; what ends a program stays what it is. `what` has its article."""
    if isinstance(error, KeyboardInterrupt | SystemExit):  # of the user's `__reduce__`, or a Ctrl-C meanwhile
        return error
    way_out = "make it where it is used, or use threads" if by_value else f"{BY_VALUE}; or use threads"
    refused = pickle.PicklingError(f"{what} cannot cross to another process: {error}; {way_out}")
    refused.__cause__ = error
    return refused
