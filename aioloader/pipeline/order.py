"""The stages that decide which sample comes when."""

from typing import TYPE_CHECKING

from aioloader.core.checks import check_count, check_integer
from aioloader.core.typevars import T_co
from aioloader.pipeline.described import Described
from aioloader.plan.parts import streams_of
from aioloader.plan.plan import flow_of
from aioloader.sources.resolve import describe
from aioloader.stages.repeat import Repeat
from aioloader.stages.select import Enumerate, SkipFirst, Take
from aioloader.stages.shuffle import Shuffle

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Order"]


class Order(Described[T_co]):
    """Of samples as they are."""

    def shuffle(self, buffer_size: int | None = None, *, seed: int = 0) -> "Pipeline[T_co]":
        """Give the samples in another order in each epoch, which depends only on `seed` and the number of the epoch.

        Args:
            buffer_size: None: a full permutation, for an indexable source, with nothing but `map`, `shard`, `take` and
                `skip` in between. Else at least 1: this many samples are held, and each output is drawn from them.
            seed: Any integer.

        Raises:
            ValueError: No `buffer_size`, and what comes before is a stream.
        """
        if buffer_size is not None:
            buffer_size = check_count("buffer_size", buffer_size, least=1)
        elif not flow_of(self._plan).by_key:
            raise ValueError(
                f"shuffle() without buffer_size permutes an indexable source, but {self!r} is a stream; "
                f"pass shuffle(buffer_size=1000), or shuffle right after the source"
            )
        return self._then(Shuffle(buffer_size, check_integer("seed", seed)))

    def take(self, n: int) -> "Pipeline[T_co]":
        """Give the first `n` samples; no more are read."""
        return self._then(Take(check_count("n", n, least=0)))

    def skip(self, n: int) -> "Pipeline[T_co]":
        """Leave out the first `n` samples."""
        return self._then(SkipFirst(check_count("n", n, least=0)))

    def repeat(self, n: int | None = None) -> "Pipeline[T_co]":
        """Give everything before this `n` times, or for ever, shuffled anew each time."""
        if n is not None:
            n = check_count("n", n, least=0, hint="leave it out to repeat for ever")
        for stream in streams_of(self._plan):
            if stream.single_use and (n is None or n > 1):
                raise ValueError(
                    f"repeat({'' if n is None else n}) reads its source again, but {describe(stream.make)} can be "
                    f"iterated once; pass the generator function itself (without calling it)"
                )
        return self._then(Repeat(n))

    def enumerate(self) -> "Pipeline[tuple[int, T_co]]":
        """Give pairs `(number, sample)`, counted from 0 in each epoch."""
        return self._then(Enumerate())
