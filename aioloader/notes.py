"""Notes on exceptions of the user's, and the words for them: they must never fail, whatever the user's classes do."""

from contextlib import suppress
from typing import Any

__all__ = ["add_note", "said", "shown"]


def add_note(error: BaseException, note: str) -> None:
    """Add a note, where `error` takes one: a frozen dataclass does not, and must not be replaced by that error.

    Surrogates, of names of files that are no UTF-8, are written out: `print` refuses them.
    """
    with suppress(Exception):
        error.add_note(note.encode("utf-8", "backslashreplace").decode())


def shown(value: Any) -> str:
    """What `value` looks like, in some 200 characters at most; also where its `__repr__` raises."""
    try:
        text = repr(value)
    except Exception as broken:
        text = f"<{type(value).__name__} whose repr raises {type(broken).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."


def said(error: BaseException) -> str:
    """The message of `error`; also where its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return shown(error)
