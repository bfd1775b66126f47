"""Exceptions that cross between processes: each arrives as its own type, with what of it can be pickled."""

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
    """A stand-in for `error` that any pickle takes, and that is unpickled as an exception of the same type.

    The notes, `__cause__` and `__context__` come along, the traceback as a note. Attributes that cannot be pickled,
    such as open files and locks, are left out, and a note names them.

    Args:
        error: As it was caught. It is not changed.
        where: Names the worker.
    """
    if isinstance(error, _TravellingError):
        return error
    told = traceback.TracebackException.from_exception(error)
    told.__notes__ = None  # they travel with the error
    text = "".join(told.format()).rstrip()
    return _TravellingError(_pack(error, {}, f"aioloader: in {where}:\n{text}"))


class _TravellingError(Exception):
    """Stands for an exception on its way, and is that exception when it arrives."""

    def __init__(self, parcel: "_Parcel") -> None:
        super().__init__(parcel)

    def __reduce__(self) -> Any:
        return _unpack, self.args


class _Parcel(NamedTuple):
    """An exception, as plain data.

    Attributes:
        content: What `encode` made of the exception, or of its `_Parts`; None: neither can be pickled.
        buffers: They belong to `content`.
        words: What is said where its type cannot be had.
        notes: Its notes.
        members: The exceptions of a group.
        cause: Its `__cause__`.
        context: Its `__context__`.
        suppresses: Its `__suppress_context__`.
    """

    content: bytes | None
    buffers: list[bytearray]
    words: str
    notes: list[str]
    members: "list[_Parcel]"
    cause: "_Parcel | None"
    context: "_Parcel | None"
    suppresses: bool


def _pack(error: BaseException, under_way: dict[int, BaseException], *more_notes: str) -> _Parcel:
    """`error` and the exceptions that hang on it.

    Args:
        error: The exception.
        under_way: Those that it hangs on itself, by `id`: chains may have circles.
        more_notes: Are added to its own.
    """
    under_way = {**under_way, id(error): error}

    def linked(other: BaseException | None) -> _Parcel | None:
        return None if other is None or id(other) in under_way else _pack(other, under_way)

    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    left_out: list[str] = []
    content, buffers = _encoded(error) or _encoded_parts(error, under_way, left_out) or (None, [])
    notes = [note for note in vars(error).get("__notes__", ()) if isinstance(note, str)]
    if left_out:
        notes.append(f"aioloader: left behind, since it cannot be pickled: {', '.join(left_out)}")
    return _Parcel(
        content,
        [bytearray(buffer) for buffer in buffers],
        f"{type(error).__qualname__}: {safe_str(error)}",
        [*notes, *(note for note in more_notes if note not in notes)],
        [_pack(member, under_way) for member in group],
        linked(error.__cause__),
        linked(error.__context__),
        error.__suppress_context__,
    )


def _encoded(error: BaseException) -> tuple[bytes, list[memoryview]] | None:
    """As the user's class pickles itself; None: that fails, or gives something else."""
    if isinstance(error, BaseExceptionGroup):
        return None  # its members travel as exceptions of their own
    try:
        encoded = encode(error)
        travelled = decode(*encoded)
        faithful = type(travelled).__qualname__ == type(error).__qualname__ and travelled.args == error.args
    except Exception:
        return None
    return encoded if faithful else None


class _Parts(NamedTuple):
    """What an exception is rebuilt from, without its `__init__`, which may take other arguments than `args`."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]
    members: dict[str, Any]  # what is not in its `__dict__`: `errno` of an `OSError`, `__slots__`

    def put_together(self, group: Sequence[BaseException]) -> BaseException:
        """The exception; `group` are those in it."""
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
        if isinstance(error, HTTPError) and "file" not in self.state:  # where it looks up whatever it does not have
            headers, url, code = map(self.state.get, ("hdrs", "url", "code"))
            addinfourl.__init__(error, BytesIO(), headers, url, code)  # type: ignore[arg-type]  # as they were
        return error


def _encoded_parts(
    error: BaseException, under_way: dict[int, BaseException], left_out: list[str]
) -> tuple[bytes, list[memoryview]] | None:
    """Its `_Parts`; None: not even its class can be pickled. What had to be left out is appended to `left_out`."""

    def carried(values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            try:
                if isinstance(value, BaseException):
                    if id(value) in under_way:
                        continue
                    value = _TravellingError(_pack(value, under_way))
                decode(*encode(value))
                found[name] = value
            except Exception:
                left_out.append(name)
        return found

    group = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    every = error.args[:1] if group else error.args
    args = carried({f"args[{index}]": arg for index, arg in enumerate(every)})
    parts = _Parts(
        type(error),
        tuple(args.get(f"args[{index}]", safe_repr(arg)) for index, arg in enumerate(every)),
        carried({name: value for name, value in vars(error).items() if name != "__notes__"}),
        carried(_members(error)),
    )
    try:
        encoded = encode(parts)
        decode(*encoded).put_together(group)
    except Exception:
        return None
    return encoded


def _members(error: BaseException) -> dict[str, Any]:
    """Attributes that are not in its `__dict__`."""
    found = {}
    for base in type(error).__mro__:
        if base in _BARE:
            continue
        for name, member in vars(base).items():
            if isinstance(member, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                found[name] = getattr(error, name, None)
    if isinstance(error, AttributeError):
        found.pop("obj", None)  # any object of the program; pickle does not take it along either
    return {name: value for name, value in found.items() if value is not None}


_BARE: Final = (BaseExceptionGroup, ExceptionGroup, BaseException, Exception, object)


def _unpack(parcel: _Parcel) -> BaseException:
    """The exception, where it arrives."""
    error: BaseException = RuntimeError(parcel.words)
    if parcel.content is not None:
        with suppress(Exception):  # its class does not exist here
            content = decode(parcel.content, parcel.buffers)
            whole = not isinstance(content, _Parts)
            error = content if whole else content.put_together([_unpack(member) for member in parcel.members])
    for note in parcel.notes:
        if note not in vars(error).get("__notes__", ()):
            add_note(error, note)
    for name, linked in (("__cause__", parcel.cause), ("__context__", parcel.context)):
        if linked is not None:
            object.__setattr__(error, name, _unpack(linked))  # whatever the user's `__setattr__` does
    object.__setattr__(error, "__suppress_context__", parcel.suppresses)
    return error


def cannot_travel(what: str, error: BaseException, *, by_value: bool) -> BaseException:
    """The error for something that cannot be pickled; what ends a program stays what it is.

    Args:
        what: A noun with its article.
        error: Pickle's.
        by_value: Whether cloudpickle is there already.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):  # of the user's `__reduce__`, or a Ctrl-C meanwhile
        return error
    way_out = "make it where it is used, or use threads" if by_value else f"{BY_VALUE}; or use threads"
    refused = pickle.PicklingError(f"{what} cannot cross to another process: {error}; {way_out}")
    refused.__cause__ = error
    return refused
