"""The type of what a loader or a source gives: `Pipeline[T]`, `DataLoader[T]`, `Channel[T]`."""

from typing import Any

from typing_extensions import TypeVar  # which torch needs, too; the standard one has no defaults before 3.13

__all__ = ["T", "T_co"]

T_co = TypeVar("T_co", covariant=True, default=Any)
"""`Pipeline` alone is `Pipeline[Any]`. Covariant, since a loader only gives: one of `int` is one of `float`, too."""

T = TypeVar("T", default=Any)
"""The same for what is also sent: `Channel[T]`."""
