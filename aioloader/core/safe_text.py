"""Notes on exceptions of the user's, and the words for them: they must never fail, whatever the user's classes do.

Nor do they tell secrets: a URL is shown without its password and its signature, see `aioloader.masking`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aioloader.masking import masked

__all__ = ["add_note", "safe_repr", "safe_repr_list", "safe_str"]


def add_note(error: BaseException, note: str) -> None:
    """Add a note, where `error` takes one: a frozen dataclass does not, and must not be replaced by that error.

    Surrogates, of names of files that are no UTF-8, are written out: `print` refuses them.
    """
    with suppress(Exception):
        error.add_note(masked(note).encode("utf-8", "backslashreplace").decode())


def safe_repr(value: Any, most: int = 200) -> str:
    """What `value` looks like, in so many characters at most; also where its `__repr__` raises."""
    try:
        text = masked(repr(value))  # as a whole: of a URL that is cut off, nobody knows where its password begins
    except Exception as broken:
        text = f"<{type(value).__name__} whose repr raises {type(broken).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe_repr_list(values: Sequence[Any]) -> str:
    """The first six of `values`, each as it is `safe_repr`."""
    words = [safe_repr(value, 60) for value in values[:6]]
    return f"[{', '.join([*words, '...'] if len(values) > 6 else words)}]"


def safe_str(error: BaseException) -> str:
    """The message of `error`; also where its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return safe_repr(error)
