"""`Skip`: which errors are left out, and how many at most."""

import os
import tempfile
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from aioloader.core.checks import check_count
from aioloader.core.policies import Errors, check_exceptions

__all__ = ["Skip", "as_skip"]


@dataclass(frozen=True)
class Skip:
    """Samples that fail are left out, counted and reported, instead of raising in their place.

    Past a limit, `TooManySkippedError` is raised at the place of the sample that is one too many, with that sample's
    error as its cause. So is every further error, as long as the limit is passed: `max_errors` until the epoch ends,
    `max_share` until the share has fallen again. If you go on all the same, the good samples still come.

    Args:
        on: The exception types that are left out, one or a tuple; errors of other types are raised in their place.
        max_errors: Errors that are left out in an epoch, at most; None: any number. After a resume the count goes on.
        max_share: Errors as a share, 0 to 1, of the last 1,000 samples that came here; looked at from the 20th on.
            None: any share.
        report: A file that gets a line of JSON for each error that is left out, see `docs/failures.md`. It is only
            appended to, each time in one write, so that several processes of a machine may share it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A limit is out of its range, or the report cannot be written.
    """

    on: Errors = Exception
    max_errors: int | None = None
    max_share: float | None = None
    report: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "on", check_exceptions("on", self.on))
        if self.max_errors is not None:
            hint = "leave it out for any number"
            object.__setattr__(self, "max_errors", check_count("max_errors", self.max_errors, least=0, hint=hint))
        if self.max_share is not None:
            object.__setattr__(self, "max_share", _check_share(self.max_share))
        if self.report is not None:
            object.__setattr__(self, "report", _check_report(self.report))

    @property
    def label(self) -> str:
        """As the user wrote it, but for its limits."""
        types = self.on if isinstance(self.on, tuple) else (self.on,)
        if types == (Exception,):
            return "skip_errors()"
        names = ", ".join(kind.__name__ for kind in types)
        return f"skip_errors(({names}))" if len(types) > 1 else f"skip_errors({names})"

    @property
    def path(self) -> Path | None:
        """Of the report."""
        return None if self.report is None else Path(self.report)


def as_skip(skip: object) -> Skip | None:
    """`skip_errors=` of a loader: a `Skip`, True for its defaults, False or None for none.

    Raises:
        TypeError: It is none of these.
    """
    if skip is None or skip is False:
        return None
    if skip is True:
        return Skip()
    if not isinstance(skip, Skip):
        raise TypeError(
            f"skip_errors must be a Skip, True or False, got {skip!r}; pass for instance Skip(on=OSError, max_errors=9)"
        )
    return skip


def _check_share(share: object) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"max_share must be a number from 0 to 1, got {share!r}; 0.01 allows 1 error in 100 samples")
    if not (isfinite(share) and 0 <= share <= 1):
        raise ValueError(f"max_share must be from 0 to 1, got {share!r}; 0.01 allows 1 error in 100 samples")
    return float(share)


def _check_report(report: object) -> Path:
    """The path of a report, as one that does not depend on the working directory of the process that writes it.

    Raises:
        TypeError: It is no path.
        ValueError: It cannot be written.
    """
    if not isinstance(report, str | os.PathLike) or isinstance(path := os.fspath(report), bytes):
        raise TypeError(f"report must be the path of a file, got {report!r}; pass for instance 'skipped.jsonl'")
    absolute = Path(path).absolute()
    try:
        if absolute.exists():
            with absolute.open("ab"):
                pass
        else:  # not by making the file: a pipeline that is only described leaves nothing behind
            with tempfile.TemporaryFile(dir=absolute.parent):
                pass
    except OSError as error:
        raise ValueError(
            f"report must be a file that can be written, got {report!r}: {error.strerror or error}; make its folder "
            f"first, or pass another path"
        ) from error
    return absolute
