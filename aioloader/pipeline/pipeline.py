"""`Pipeline`: the description of how samples become batches."""

from typing import Any, overload

from torch import Tensor
from torch.utils.data import Dataset

from aioloader.core.limit import Limit
from aioloader.core.typevars import T_co
from aioloader.pipeline.actors import Actors
from aioloader.pipeline.batching import Batching
from aioloader.pipeline.choice import Choice
from aioloader.pipeline.combining import Combining
from aioloader.pipeline.delivery import Delivering
from aioloader.pipeline.order import Order
from aioloader.pipeline.places import Placing
from aioloader.pipeline.ranks import Sharding
from aioloader.pipeline.start import plan_of
from aioloader.pipeline.transforms import Transforms
from aioloader.pipeline.weights import Weights
from aioloader.signatures import AsyncIndexed, Indexed, Many, Stream, Unknown

__all__ = ["Pipeline"]


class Pipeline(
    Transforms[T_co],
    Choice[T_co],
    Order[T_co],
    Batching[T_co],
    Sharding[T_co],
    Placing[T_co],
    Actors[T_co],
    Delivering[T_co],
    Combining[T_co],
    Weights[T_co],
):
    """Samples from a source, through stages, to batches; iterated by `for` or by `async for`.

    A pipeline is an immutable description: each method returns a new one. Each iteration is one epoch.

    ```python
    loader = Pipeline(keys).shuffle(seed=0).map(fetch, concurrency=256).map(decode).batch(64).prefetch(2)
    async for batch in loader: ...
    ```

    Args:
        source: A map-style torch Dataset or any Sequence (with `async def __getitem__` too), an IterableDataset or any
            iterable, an async iterable, another pipeline, or a function of no arguments that returns one of these and
            is called anew for each epoch. A generator is accepted for one epoch. Under `async for`, async sources and
            functions run on the caller's loop; sync ones always run in threads.
        sampler: For an indexable source: gives the keys of an epoch, in order, as a torch sampler does. Its
            `set_epoch`, if it has one, is called with the number of each epoch.
        concurrency: For a source whose samples are loaded by `__getitem__` or `__getitems__`: calls under way at once,
            at least 1, or a `Limit` as for `map`. Default: 64 where they are async; else the threads of the function
            after it, or usable cores.

    Raises:
        TypeError: `source` is none of these, or `sampler` or `concurrency` is for other sources.
        ValueError: `concurrency` is less than 1.
    """

    @overload
    def __init__(
        self: "Pipeline[Any]", source: Unknown, *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    @overload
    def __init__(
        self: "Pipeline[Tensor]", source: Tensor, *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    @overload
    def __init__(
        self, source: Stream[T_co], *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    @overload
    def __init__(
        self, source: AsyncIndexed[T_co], *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    @overload
    def __init__(
        self, source: Indexed[T_co] | Many[T_co], *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    # For pyright: after `DataLoader(dataset)` it may no longer infer what a method without annotations returns (torch's
    # datasets have such), and would find that nothing above matches.
    @overload
    def __init__(  # type: ignore[overload-cannot-match]
        self, source: Dataset[T_co], *, sampler: Any = None, concurrency: int | Limit | None = None
    ) -> None: ...

    def __init__(self, source: Any, *, sampler: Any = None, concurrency: int | Limit | None = None) -> None:
        self._begin_with(plan_of(source, sampler, concurrency))
