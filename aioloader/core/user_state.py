"""States of users' objects as JSON, and back as they were: with tensors, arrays, tuples, bytes and keys of any kind.

torchdata pickles such states, so objects that are written for it may hold anything; JSON alone would give back lists
for tuples, and strings for numbers that are keys. What JSON cannot hold is a dict with one key, which begins with "~".
"""

import json
import sys
from base64 import b64decode, b64encode
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    import numpy

__all__ = ["decoded", "encoded"]

_NUMPY: Final = "?bBhHiIlLqQefdFD"
"""Types of numbers in arrays; nothing that would be unpickled."""


def encoded(state: Any) -> Any:
    """A copy of `state` that JSON gives back as it is, and that shares nothing with it.

    Raises:
        TypeError, ValueError, RecursionError: It holds something that has no such form.
    """
    try:
        text = json.dumps(state)
        if '"~' not in text and (copy := json.loads(text)) == state:
            return copy
    except (TypeError, ValueError):  # in the other way it can be said, or not at all
        pass
    return json.loads(json.dumps(_encode(state)))


def _encode(value: Any) -> Any:
    if (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(value, numpy.ndarray):
            return {"~array": _array(value)}
        if isinstance(value, numpy.generic):
            return {"~number": _array(numpy.asarray(value))}
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, list):
        return [_encode(part) for part in value]
    if isinstance(value, dict):
        return _encode_dict(value)
    if type(value) in (tuple, set, frozenset):
        return {f"~{type(value).__name__}": [_encode(part) for part in value]}
    if isinstance(value, bytes | bytearray):
        return {"~bytes": b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return {"~tensor": _tensor(value)}
    raise TypeError(f"a {type(value).__name__} in a state")


def _encode_dict(value: dict[Any, Any]) -> dict[str, Any]:
    if all(isinstance(key, str) and not key.startswith("~") for key in value):
        return {key: _encode(part) for key, part in value.items()}
    return {"~dict": [[_encode(key), _encode(part)] for key, part in value.items()]}


def _tensor(tensor: torch.Tensor) -> list[Any]:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError("a tensor in a state that is sparse or quantized")
    plain = tensor.detach().cpu().contiguous()
    raw = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), b64encode(raw).decode()]


def _array(array: "numpy.ndarray[Any, Any]") -> list[Any]:
    if array.dtype.char not in _NUMPY:
        raise TypeError(f"an array of {array.dtype} in a state")
    return [array.dtype.str, list(array.shape), b64encode(array.tobytes()).decode()]


def decoded(state: Any) -> Any:
    """What `encoded` was given.

    Raises:
        ValueError: It is not from there.
    """
    try:
        return _decode(state)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"a state of a user's object in it is broken: {error}"[:300]) from None


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not (kind := next(iter(value))).startswith("~"):
        return {key: _decode(part) for key, part in value.items()}
    return _KINDS[kind](value[kind])


def _to_tensor(parts: list[Any]) -> torch.Tensor:
    name, shape, text = parts
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of numbers")
    raw = bytearray(b64decode(text, validate=True))
    flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
    return flat.view(dtype).reshape(shape)


def _to_array(parts: list[Any]) -> "numpy.ndarray[Any, Any]":
    import numpy

    name, shape, text = parts
    dtype = numpy.dtype(name)
    if dtype.char not in _NUMPY:
        raise ValueError(f"{name!r} is no type of numbers")
    return numpy.frombuffer(bytearray(b64decode(text, validate=True)), dtype).reshape(shape)


_KINDS: Final[dict[str, Any]] = {
    "~dict": lambda pairs: {_decode(key): _decode(part) for key, part in pairs},
    "~tuple": lambda parts: tuple(map(_decode, parts)),
    "~set": lambda parts: set(map(_decode, parts)),
    "~frozenset": lambda parts: frozenset(map(_decode, parts)),
    "~bytes": lambda text: b64decode(text, validate=True),
    "~tensor": _to_tensor,
    "~array": _to_array,
    "~number": lambda parts: _to_array(parts)[()],
}
