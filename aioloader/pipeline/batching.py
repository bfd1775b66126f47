"""The stages that make batches of samples, or rows, and samples of batches."""

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import Tensor

from aioloader.core.checks import check_callable, check_count, check_seconds
from aioloader.core.typevars import T_co
from aioloader.pipeline.described import Described
from aioloader.plan.plan import flows_of
from aioloader.signatures import DictOfStackables, ListOfStackables, Stackable, TupleWithNames, Unknown
from aioloader.stages.batch import Batch, CollateWith, Unbatch
from aioloader.stages.batch_by_length import BatchByLength, TooLong
from aioloader.stages.length import check_length
from aioloader.stages.length_plan import TokenBudget
from aioloader.stages.pack import OverRow, Pack
from aioloader.stages.pack_plan import Strategy
from aioloader.stages.packed import Packed

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Batching"]

B = TypeVar("B")
K = TypeVar("K")


class Batching(Described[T_co]):
    """By count, by length, packed; and undone."""

    @overload
    def batch(
        self,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[T_co]], Coroutine[Any, Any, B]],
        max_wait: float | None = None,
    ) -> "Pipeline[B]": ...

    @overload
    def batch(
        self,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[T_co]], B],
        max_wait: float | None = None,
    ) -> "Pipeline[B]": ...

    @overload
    def batch(
        self: "Described[Unknown]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Any]": ...

    @overload
    def batch(  # type: ignore[overload-overlap]  # a tuple of its own kind
        self: "Described[Packed]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Packed]": ...

    @overload
    def batch(
        self: "Described[Stackable]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Tensor]": ...

    @overload
    def batch(
        self: "Described[str]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[str]]": ...

    @overload
    def batch(
        self: "Described[bytes]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[bytes]]": ...

    @overload
    def batch(
        self: "Described[dict[K, Unknown]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[dict[K, Any]]": ...

    @overload
    def batch(
        self: "Described[DictOfStackables[K]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[dict[K, Tensor]]": ...

    @overload
    def batch(
        self: "Described[dict[K, Any]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[dict[K, Any]]": ...

    @overload
    def batch(
        self: "Described[TupleWithNames]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Any]": ...

    @overload
    def batch(
        self: "Described[tuple[Stackable, ...]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[Tensor]]": ...

    @overload
    def batch(
        self: "Described[list[Unknown]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[Any]]": ...

    @overload
    def batch(
        self: "Described[ListOfStackables]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[Tensor]]": ...

    @overload
    def batch(
        self: "Described[tuple[Any, ...]]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[list[Any]]": ...

    @overload
    def batch(
        self: "Described[Any]",
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Any]": ...

    def batch(
        self,
        batch_size: int,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        max_wait: float | None = None,
    ) -> "Pipeline[Any]":
        """Group samples into batches of `batch_size`.

        Args:
            batch_size: At least 1.
            drop_last: Leave out a shorter batch at the end of the source. Batches that `max_wait` cuts short are given.
            collate_fn: From a list of samples to a batch, off the event loop (an async one on it). Default: torch's
                `default_collate`, which says which samples do not fit. `list` or `tuple`: the samples as they are,
                which costs nothing.
            max_wait: Seconds, 0 or more, after which a batch is given as it is, counted from its first sample. For live
                sources. None: a batch waits until it is full. `stats()` counts short batches as `partial`.
        """
        size = check_count("batch_size", batch_size, least=1)
        if collate_fn is not None:
            check_callable("collate_fn", collate_fn, arguments=1, example="batch(64, collate_fn=pad)")
        if max_wait is not None:
            max_wait = check_seconds("max_wait", max_wait)
        return self._then(Batch(size, bool(drop_last), CollateWith(collate_fn), max_wait))

    @overload
    def batch_by_length(
        self,
        max_tokens: int,
        length: Callable[[T_co], int] | str,
        *,
        padded: bool = True,
        max_samples: int | None = None,
        window: int | None = 2048,
        seed: int = 0,
        too_long: TooLong = "alone",
        collate_fn: Callable[[list[T_co]], Coroutine[Any, Any, B]],
    ) -> "Pipeline[B]": ...

    @overload
    def batch_by_length(
        self,
        max_tokens: int,
        length: Callable[[T_co], int] | str,
        *,
        padded: bool = True,
        max_samples: int | None = None,
        window: int | None = 2048,
        seed: int = 0,
        too_long: TooLong = "alone",
        collate_fn: Callable[[list[T_co]], B],
    ) -> "Pipeline[B]": ...

    @overload
    def batch_by_length(
        self,
        max_tokens: int,
        length: Callable[[T_co], int] | str,
        *,
        padded: bool = True,
        max_samples: int | None = None,
        window: int | None = 2048,
        seed: int = 0,
        too_long: TooLong = "alone",
        collate_fn: None = None,
    ) -> "Pipeline[Any]": ...

    def batch_by_length(
        self,
        max_tokens: int,
        length: Callable[[Any], int] | str,
        *,
        padded: bool = True,
        max_samples: int | None = None,
        window: int | None = 2048,
        seed: int = 0,
        too_long: TooLong = "alone",
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> "Pipeline[Any]":
        """Group samples into batches of at most `max_tokens` tokens, of samples that are about as long.

        `window` samples are sorted by their lengths and cut into batches, which are given in an order that depends on
        `seed`, the number of the epoch and that of the window. So the first batch waits for a whole window; while its
        batches are given, the next window comes in. Where a sample has failed, only that is raised: before the batches
        of its window, or with `window=None` between those before it and those after it.

        Before `shard()` whole batches are dealt, the same number to each rank.

        ```python
        loader = Pipeline(documents).map(tokenize).batch_by_length(16384, len, collate_fn=pad).shard()
        ```

        Args:
            max_tokens: At least 1.
            length: How many tokens a sample has, at least 1: a sync function of it, or the name of the field that is
                as long.
            padded: All samples of a batch are padded to the longest, so that count times longest is what counts. False:
                the sum of the lengths.
            max_samples: Samples in a batch, at least 1. None: any number.
            window: Samples that are sorted together, at least 1. A resume in the middle of a window reads it again.
                None: the order is kept, and a batch is closed before the sample that would pass the budget.
            seed: Any integer.
            too_long: What becomes of a sample that is longer than `max_tokens`: `"alone"` makes a batch of it,
                `"drop"` leaves it out (`stats()` counts it as `dropped`), `"error"` raises in its place.
            collate_fn: As for `batch`. The default stacks, which fails for samples of several lengths: pass one that
                pads.

        Raises:
            TypeError: `length` cannot be called with one argument, or is async, or a number is none.
            ValueError: A number is too small, or `too_long` is something else.
        """
        of = check_length(length, "batch_by_length(16384, len)")
        if collate_fn is not None:
            check_callable("collate_fn", collate_fn, arguments=1, example="batch_by_length(16384, len, collate_fn=pad)")
        budget = TokenBudget(max_tokens, bool(padded), max_samples)
        return self._then(BatchByLength(budget, of, window, seed, too_long, CollateWith(collate_fn)))

    def pack(
        self,
        seq_len: int,
        *,
        length: Callable[[T_co], int] | str | None = None,
        strategy: Strategy = "best_fit",
        open_rows: int = 64,
        max_documents: int | None = None,
        too_long: OverRow = "split",
        pad_value: float | Mapping[str, float] = 0,
        pad_to: int = 1,
    ) -> "Pipeline[Packed]":
        """Pack documents into rows of `seq_len` tokens; gives `Packed`.

        A document is a tensor, array or list of numbers, or a mapping of names to these, all of one length: each field
        is packed alike. What is after the last document of a row is padding. A document that failed, or is none, raises
        in its turn, and the rows are made of the others.

        Before `shard()` whole rows are dealt. `batch(n)` after it stacks rows, see `Packed`.

        ```python
        loader = Pipeline(documents).map(tokenize).pack(4096).shard().batch(8)
        ```

        Args:
            seq_len: Tokens of a row, at least 1.
            length: Is compared with what a document has: a sync function, or the name of a field. None: nothing is.
            strategy: Where a document goes. `"best_fit"`: into the open row that it fills best; `"first_fit"`: into the
                oldest open row that has room; `"split"`: after the one before it, cut where the row ends.
            open_rows: Rows that are filled at a time, at least 1: more of them need less padding. A resume reads again
                what is in them.
            max_documents: Of a row, at least 1. None: any number.
            too_long: A document of more than `seq_len` tokens: `"split"` cuts it, `"drop"` leaves it out (`stats()`
                counts it as `dropped`), `"error"` raises in its place.
            pad_value: What padding is; for documents with fields, also a mapping of their names. `labels` are padded
                with -100 unless it names them.
            pad_to: Each document is padded to a multiple of this, for context parallelism: twice as many as ranks.

        Raises:
            TypeError: `length` cannot be called with one argument, or is async, or a number is none.
            ValueError: A number is too small, `seq_len` is no multiple of `pad_to`, or a word is none of those above.
        """
        of = None if length is None else check_length(length, "pack(4096, length=len)")
        return self._then(Pack(seq_len, of, strategy, open_rows, max_documents, too_long, pad_value, pad_to))

    @overload
    def unbatch(self: "Described[Unknown]") -> "Pipeline[Any]": ...

    @overload
    def unbatch(self: "Described[Tensor]") -> "Pipeline[Tensor]": ...

    @overload
    def unbatch(self: "Described[dict[K, Tensor]]") -> "Pipeline[dict[K, Tensor]]": ...

    @overload
    def unbatch(self: "Described[Any]") -> "Pipeline[Any]": ...

    def unbatch(self) -> "Pipeline[Any]":
        """Give the samples of each batch, rows of tensors and items of lists: the inverse of the default `batch`.

        Of a batch of `Packed` rows these are the rows as `pack` gave them. Of a single row they are its documents:
        tensors, or dicts of them, each a piece where a document was cut, and with the padding of `pad_to`.
        """
        return self._then(Unbatch(flows_of(self._plan)[-1].collated))
