"""States of torch's generators as text."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from aioloader.core.safe_text import safe_repr

__all__ = ["check_draws", "check_generators", "packed", "unpacked"]


def packed(state: torch.Tensor) -> str:
    """A generator's state as text: 5 KiB of bytes as 6.6 KiB of base64."""
    return _base64(bytes(state.numpy()))


@lru_cache(maxsize=16)
def _base64(state: bytes) -> str:
    """Mostly that of the call before: then it is the same string, of which the hash is known."""
    return b64encode(state).decode()


def unpacked(text: str) -> torch.Tensor:
    """The state that `packed` was given.

    Raises:
        ValueError: It is not base64.
    """
    return torch.frombuffer(bytearray(b64decode(text, validate=True)), dtype=torch.uint8)


def check_generators(states: Any, generators: Sequence[torch.Generator]) -> None:
    """Refuse states that do not fit `generators`.

    Raises:
        ValueError: Why.
    """
    if not isinstance(states, list) or len(states) != len(generators):
        raise ValueError(f"states of {len(generators)} generators were expected, got {safe_repr(states)}")
    for its, generator in zip(states, generators, strict=True):
        _check_generator(its, generator.device)


def check_draws(state: Mapping[str, Any]) -> None:
    """Refuse a state of a loader without the state that the order of its epoch is drawn from.

    Raises:
        ValueError: Why.
    """
    if "drawn" not in state:
        raise ValueError("'drawn', the state of the global generator that the order is drawn from, is missing")
    for name in ("drawn", "next"):
        if name in state:
            _check_generator(state[name], torch.device("cpu"))


def _check_generator(state: Any, device: torch.device) -> None:
    if not isinstance(state, str):
        raise ValueError(f"the state of a generator is a string, got {safe_repr(state)}")
    try:
        torch.Generator(device=device).set_state(unpacked(state))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the state of a generator is broken: {error}"[:300]) from None
