"""Exceptions that cross between processes: the user's own object where that can be, and the worker's traceback."""

import pickle
import traceback
from typing import Any, Final

from aioloader.executors.processes.wire import decode, encode
from aioloader.notes import add_note, said

__all__ = ["BY_VALUE", "cannot_travel", "portable"]

BY_VALUE: Final = (
    "pip install 'aioloader[process]' brings cloudpickle, which also takes lambdas, closures and what is defined in "
    "__main__"
)


def portable(error: BaseException, where: str) -> BaseException:
    """`error`, or the nearest thing to it that can be pickled, with its traceback as a note.

    Args:
        error: As it was caught. It gets a note.
        where: Names the worker.
    """
    told = traceback.TracebackException.from_exception(error)
    told.__notes__ = None  # the notes travel with the error
    text = "".join(told.format()).rstrip()
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    try:
        travelled = decode(*encode(error))
        faithful = type(travelled).__qualname__ == type(error).__qualname__ and travelled.args == error.args
    except Exception:
        faithful = False
    if not faithful:
        error = _Rebuilt.of(error) or RuntimeError(f"{type(error).__qualname__}: {said(error)}")
    for note in (*notes, f"aioloader: in {where}:\n{text}"):
        if note not in getattr(error, "__notes__", ()):
            add_note(error, note)
    return error


class _Rebuilt:
    """Exceptions whose `__init__` does not take `args`, as pickle supposes, are made without calling it."""

    @staticmethod
    def of(error: BaseException) -> BaseException | None:
        if type(error).__reduce__ is not BaseException.__reduce__ or "__reduce_ex__" in type(error).__dict__:
            return None
        try:
            kind, args, state = type(error), error.args, dict(error.__dict__)
            encode((kind, args, state))
            if type(rebuild(kind, args, state)) is not kind:
                return None
        except Exception:
            return None
        return _CarrierError(kind, args, state)


class _CarrierError(Exception):
    """Stands for an exception on its way, and is that exception when it arrives."""

    def __init__(self, kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(state)
        self.__dict__["_what"] = (kind, args)

    def __reduce__(self) -> Any:
        state = dict(self.__dict__)
        kind, args = state.pop("_what")
        return rebuild, (kind, args, state)


def rebuild(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    """An exception of `kind`, without a call of its `__init__`."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def cannot_travel(what: str, error: BaseException, *, by_value: bool) -> BaseException:
    """The error for something that cannot be pickled.

    Args:
        what: A noun with its article.
        error: Pickle's.
        by_value: Whether cloudpickle is there already.
    """
    way_out = "make it where it is used, or use threads" if by_value else f"{BY_VALUE}; or use threads"
    refused = pickle.PicklingError(f"{what} cannot cross to another process: {error}; {way_out}")
    refused.__cause__ = error
    return refused
