"""How long a sample is, as the user says it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from aioloader.core.checks import callable_name, check_callable, check_gives_one, is_async_callable
from aioloader.core.safe_text import safe_repr

__all__ = ["Length", "check_length"]


@dataclass(frozen=True)
class Length:
    """The tokens of a sample.

    Args:
        of: A function of the sample, or the name of the field that is as long.
    """

    of: Callable[[Any], Any] | str

    @property
    def name(self) -> str:
        """For people."""
        return self.of if isinstance(self.of, str) else callable_name(self.of)

    @property
    def only_reads(self) -> bool:
        """Whether it is built in: a user's function might change the sample."""
        return isinstance(self.of, str) or self.of is len

    def __call__(self, sample: Any) -> int:
        """Tokens, at least 1.

        Raises:
            TypeError: The function gives no integer, or the field has no length.
            ValueError: It gives less than 1, or there is no such field.
        """
        told = self._of_field(sample, self.of) if isinstance(self.of, str) else self.of(sample)
        if type(told) is not int:
            if isinstance(told, bool) or not hasattr(told, "__index__"):
                raise TypeError(f"{self._rule}, got {safe_repr(told, 80)} of type {type(told).__name__}")
            told = index(told)
        if told < 1:
            raise ValueError(f"{self._rule}, got {told}; leave empty samples out, for instance with filter()")
        return told

    def _of_field(self, sample: Any, name: str) -> int:
        try:
            field = sample[name]
        except Exception as error:
            there = (
                f"the fields {safe_repr(list(sample), 80)}" if isinstance(sample, Mapping) else safe_repr(sample, 80)
            )
            raise ValueError(
                f"the length of a sample is that of its field {name!r}, and this one has none of that name, got "
                f"{there}; name another one, or pass a function of the sample"
            ) from error
        try:
            return len(field)
        except TypeError as error:
            raise TypeError(f"{self._rule}, and that field has no length: {error}") from None

    @property
    def _rule(self) -> str:
        return f"the length of a sample, here by {self.name}, must be an integer of at least 1"


def check_length(length: Any, example: str) -> Length:
    """`length` as given to a stage.

    Raises:
        TypeError: It is neither a sync function of one argument nor a name.
    """
    if isinstance(length, str):
        return Length(length)
    check_callable("length", length, arguments=1, example=example)
    check_gives_one("length", length, "return the number of tokens")
    if is_async_callable(length):
        raise TypeError(
            f"length must be a sync function, got {callable_name(length)}, which is async; measure samples in a map "
            f"before, and read the number here"
        )
    return Length(length)
