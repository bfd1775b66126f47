"""Notes on the user's exceptions, and text for them: making these must never fail, whatever the user's classes do.

They show no secrets: URLs are shown without passwords and signatures, see `aioloader.masking`.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aioloader.masking import masked

__all__ = ["add_note", "safe_repr", "safe_repr_list", "safe_str"]


def add_note(error: BaseException, note: str) -> None:
    """Add a note if `error` takes one. A frozen dataclass does not, and raises an error that must not replace it.

    Surrogates, from file names that are not UTF-8, are escaped, since `print` refuses them.
    """
    with suppress(Exception):
        error.add_note(masked(note).encode("utf-8", "backslashreplace").decode())


def safe_repr(value: object, most: int = 200) -> str:
    """The `repr` of `value`, at most `most` characters; works even if its `__repr__` raises."""
    try:
        text = masked(repr(value))  # before it is cut: in a URL that is cut off, a password cannot be recognised
    except Exception as broken:
        text = f"<{type(value).__name__} whose repr raises {type(broken).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe_repr_list(values: Sequence[Any]) -> str:
    """A list of the first six values, each by `safe_repr`."""
    words = [safe_repr(value, 60) for value in values[:6]]
    return f"[{', '.join([*words, '...'] if len(values) > 6 else words)}]"


def safe_str(error: BaseException) -> str:
    """The message of `error`; works even if its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return safe_repr(error)
