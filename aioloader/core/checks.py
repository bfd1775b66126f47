"""Checks of arguments that many stages take. Errors give the rule, the value found and the way out."""

import inspect
from math import inf, isfinite
from operator import index
from types import FunctionType, MethodType
from typing import Any, Final

__all__ = [
    "Errors",
    "callable_name",
    "check_ahead",
    "check_callable",
    "check_count",
    "check_exceptions",
    "check_gives_one",
    "check_integer",
    "check_number",
    "check_positive",
    "check_seconds",
    "is_async_callable",
]

Errors = type[Exception] | tuple[type[Exception], ...]

_ASYNC: Final = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def check_count(name: str, value: object, *, least: int, hint: str = "") -> int:
    """`value` as an integer of at least `least`.

    Raises:
        TypeError: It is not an integer, or a bool.
        ValueError: It is too small.
    """
    way_out = f"; {hint}" if hint else ""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}{way_out}")
    number = index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}{way_out}")
    return number


def check_ahead(
    ahead: object, ahead_bytes: object, concurrency: int | None, *, of: str = "concurrency"
) -> tuple[int | None, int | None]:
    """How far ahead a stage may be, in samples and in bytes.

    Args:
        ahead: In samples; None: not said.
        ahead_bytes: In bytes; None: not said.
        concurrency: Samples that are under way at once; None: not said.
        of: What that is called.

    Raises:
        TypeError: One of them is not an integer.
        ValueError: It is too small.
    """
    if ahead is not None:
        ahead = check_count("ahead", ahead, least=1, hint="leave it out for the default")
        if concurrency is not None and ahead < concurrency:
            raise ValueError(
                f"ahead must be at least {of}, since what is under way counts, got {ahead=} and {of}={concurrency}; "
                f"raise ahead, or lower {of}"
            )
    if ahead_bytes is not None:
        ahead_bytes = check_count("ahead_bytes", ahead_bytes, least=1, hint="leave it out for the default")
    return ahead, ahead_bytes


def check_integer(name: str, value: object) -> int:
    """`value` as an integer of any size.

    Raises:
        TypeError: It is not an integer, or a bool.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return index(value)


def check_seconds(name: str, value: object) -> float:
    """`value` as seconds, 0 or more.

    Raises:
        TypeError: It is not a number, or a bool.
        ValueError: It is negative or not finite.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
    seconds = float(value)
    if not (isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} must be 0 or more seconds, got {value!r}; leave it out to wait without a limit")
    return seconds


def check_callable(name: str, fn: object, *, arguments: int, example: str) -> None:
    """Refuse a function that cannot be called with this number of arguments.

    Raises:
        TypeError: `fn` is not callable, or its signature does not allow it.
    """
    if not callable(fn):
        raise TypeError(
            f"{name} must be a function, got {fn!r} of type {type(fn).__name__}; pass for instance {example}"
        )
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a built-in without a signature
        return
    try:
        signature.bind(*[None] * arguments)
    except TypeError as error:
        raise TypeError(
            f"{name} must be callable with {arguments} argument{'s' if arguments != 1 else ''}, but "
            f"{callable_name(fn)}{signature} is not ({error}); pass for instance {example}"
        ) from None


def check_gives_one(stage: str, fn: object, way_out: str) -> None:
    """Refuse a generator function where one value per sample is needed.

    Raises:
        TypeError: `fn` is a sync or async generator function, also inside a `functools.partial` or as `__call__`.
    """
    plain = _without_partial(fn)
    call = getattr(type(plain), "__call__", None)  # noqa: B004 - its definition is inspected
    if any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in (plain, call)):
        raise TypeError(
            f"{stage} takes a function that returns one value, got the generator function {callable_name(fn)}, which "
            f"yields several; {way_out}"
        )


def is_async_callable(fn: object) -> bool:
    """Whether calling `fn` gives an awaitable or an async generator, as far as its definition tells.

    Looks through `functools.partial`, bound methods and objects with an `async def __call__`.
    """
    fn = _without_partial(fn)
    plain = fn.__func__ if type(fn) is MethodType else fn
    if type(plain) is FunctionType and not plain.__dict__:  # nor marked as one: `inspect` takes 20 times as long
        return bool(plain.__code__.co_flags & _ASYNC)
    call = getattr(type(fn), "__call__", None)  # noqa: B004 - the definition of the call is what is looked at
    return any(inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in (fn, call))


def _without_partial(fn: object) -> Any:
    while hasattr(fn, "func") and hasattr(fn, "keywords"):
        fn = fn.func
    return fn


def callable_name(fn: object) -> str:
    """The name of the user's function in stage names and errors, without module and `<locals>`."""
    fn = _without_partial(fn)
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).rpartition("<locals>.")[2]


def check_number(name: str, value: object, *, least: float, most: float = inf, hint: str = "") -> float:
    """`value` as a finite number from `least` to `most`.

    Raises:
        TypeError: It is no number, or a bool.
        ValueError: It is too small, too large, or not finite.
    """
    way_out = f"; {hint}" if hint else ""
    number = _finite(name, value, way_out)
    if not least <= number <= most:
        upper = "" if most == inf else f" to {most:g}"
        raise ValueError(f"{name} must be {least:g}{upper or ' or more'}, got {value!r}{way_out}")
    return number


def check_positive(name: str, value: object, hint: str) -> float:
    """`value` as a finite number of more than 0.

    Raises:
        TypeError: It is no number, or a bool.
        ValueError: It is not positive, or not finite.
    """
    number = _finite(name, value, f"; {hint}")
    if number <= 0:
        raise ValueError(f"{name} must be more than 0, got {value!r}; {hint}")
    return number


def _finite(name: str, value: object, way_out: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}{way_out}")
    if not isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}{way_out}")
    return float(value)


def check_exceptions(name: str, kinds: object) -> Errors:
    """`kinds` as exception types, for `except`.

    Raises:
        TypeError: It is neither an exception type nor a tuple of them.
    """
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    if not types or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in types):
        raise TypeError(
            f"{name} must be an exception type or a tuple of them, got {kinds!r}; pass Exception or types derived from "
            f"it, for instance (OSError, TimeoutError)"
        )
    return types
