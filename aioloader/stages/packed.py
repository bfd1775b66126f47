"""Documents as tensors, and rows made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils import collate as torch_collate

from aioloader.core.safe_text import safe_repr

__all__ = [
    "IGNORED",
    "Document",
    "MakeRow",
    "Packed",
    "Padding",
    "RowParts",
    "collate_packed",
    "document_of",
    "unpack",
]

IGNORED: Final = -100
"""What labels are padded with: torch's `cross_entropy` leaves it out."""


class Packed(NamedTuple):
    """A row of tokens of several documents; see `docs/text.md` for what attention needs of it.

    What follows is for a row of L tokens with n documents, a piece of one counted as one. `batch(B)` stacks rows:
    `tokens`, `positions` and `segments` are [B, L] then, and `cu_seqlens` is that of the B rows one after the other,
    [B * L] tokens, where the padding at the end of a row is a sequence of its own. `unbatch()` gives the rows of a
    batch again, and the documents of a row.

    Attributes:
        tokens: [L], of the documents' dtype; for documents with fields, a dict of these.
        positions: int32 [L]: the number of each token in its document (piece), from 0; 0 in the padding.
        segments: int32 [L]: the number of the document of each token, from 1; 0 is padding.
        cu_seqlens: int32 [n + 1]: where each document begins, and where the last one ends.
        max_seqlen: Tokens of the longest one.
        keys: What names each document, n of them; after `batch(B)`, B tuples of these.
    """

    tokens: Any
    positions: Tensor
    segments: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    keys: tuple[Any, ...]


class Padding:
    """What each field is padded with.

    Args:
        value: For all fields but `labels`, which have `IGNORED`; or a mapping of names to values, 0 for others.
    """

    def __init__(self, value: Any) -> None:
        self._of: dict[str, Any] = {"labels": IGNORED}
        self._default = 0
        if isinstance(value, Mapping):
            self._of.update(value)
        else:
            self._default = value
        self._checked: dict[str | None, torch.dtype] = {}  # the dtype that a field had last, and that holds it

    def of(self, name: str | None) -> Any:
        """That of a field; None: documents have none."""
        return self._default if name is None else self._of.get(name, self._default)

    def check(self, name: str | None, dtype: torch.dtype) -> None:
        """Refuse a dtype that cannot hold it.

        Raises:
            ValueError: It cannot.
        """
        if self._checked.get(name) is dtype:
            return
        value = self.of(name)
        if not _holds(dtype, value):
            raise ValueError(
                f"{_what(name)} of dtype {dtype} cannot hold the padding {value!r}; convert it in a map before, or "
                f"pass another pad_value"
            )
        self._checked[name] = dtype


def _holds(dtype: torch.dtype, value: Any) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype is torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return bool(limits.min <= value <= limits.max and value == int(value))  # NaN is in no limits, nor is infinity


@dataclass(slots=True)
class Document:
    """What a sample holds.

    Attributes:
        length: Tokens.
        tokens: [length], or a dict of these.
        names: Of its fields; None: it has none.
    """

    length: int
    tokens: "Tensor | dict[str, Tensor]"
    names: frozenset[Any] | None = None


def document_of(sample: object, padding: Padding) -> Document:
    """`sample` as tensors, without a copy where there are some.

    Raises:
        TypeError: It is neither a sequence of numbers nor a mapping of names to such.
        ValueError: It has more than one dimension, or no tokens, or its fields are of several lengths.
    """
    if not isinstance(sample, Tensor) and isinstance(sample, Mapping):
        fields = {name: _tokens_of(value, name) for name, value in sample.items()}
        lengths = {name: tokens.numel() for name, tokens in fields.items()}
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{name}: {length}" for name, length in lengths.items()) or "none"
            raise ValueError(
                f"the fields of a document must be of one length, got {told}; leave out in a map before what is not "
                f"one value per token"
            )
        for name, tokens in fields.items():
            padding.check(name, tokens.dtype)
        document = Document(next(iter(lengths.values())), fields, frozenset(fields))
    else:
        tokens = _tokens_of(sample, None)
        padding.check(None, tokens.dtype)
        document = Document(tokens.numel(), tokens)
    if not document.length:
        raise ValueError("a document must have at least 1 token, got 0; leave empty ones out, for instance with filter")
    return document


def _what(name: str | None) -> str:
    return "a document" if name is None else f"the field {safe_repr(name, 60)} of a document"


def _tokens_of(value: object, name: str | None) -> Tensor:
    """[length], on the CPU."""
    if isinstance(value, Tensor):
        pass
    elif isinstance(value, np.ndarray):
        value = torch.from_numpy(value if value.flags.writeable and value.flags.c_contiguous else value.copy())
    elif isinstance(value, list | tuple):
        value = _tensor_of(value, name)
    else:
        raise TypeError(
            f"{_what(name)} must be a tensor, array or list of numbers, one per token, got {safe_repr(value, 60)} of "
            f"type {type(value).__name__}; tokenize it in a map before, and leave out there what is not one value per "
            f"token"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{_what(name)} must be dense, got layout {value.layout}; call to_dense() in a map before")
    if value.ndim != 1:
        raise ValueError(f"{_what(name)} must have one dimension, got shape {list(value.shape)}; flatten it before")
    tokens: Tensor = value.detach() if value.requires_grad else value
    return tokens


def _tensor_of(value: Sequence[Any], name: str | None) -> Tensor:
    try:
        return torch.tensor(value) if value else torch.empty(0, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{_what(name)} must hold numbers, one per token, got {safe_repr(value, 60)}") from error


class RowParts(NamedTuple):
    """A row before it is copied together.

    Attributes:
        pieces: Document, start and stop.
        keys: One for each.
    """

    pieces: list[tuple[Document, int, int]]
    keys: tuple[Any, ...]


class MakeRow:
    """Copies documents together; never fails, since these have been looked at before.

    Args:
        seq_len: Tokens of a row.
        padding: What is put after them.
        pad_to: Each document takes a multiple of so many tokens.
    """

    def __init__(self, seq_len: int, padding: Padding, pad_to: int = 1) -> None:
        self._seq_len = seq_len
        self._padding = padding
        self._pad_to = pad_to
        self._numbers = np.arange(seq_len, dtype=np.int32)

    def __call__(self, row: RowParts) -> Packed:
        """One row."""
        pad_to = self._pad_to
        sizes = [-(-(stop - start) // pad_to) * pad_to for _, start, stop in row.pieces]
        numbers = self._numbers
        positions, segments = np.empty((2, self._seq_len), dtype=np.int32)
        used = 0
        ends = [0]
        for number, size in enumerate(sizes, 1):  # half the time of `np.repeat` for the few documents of a row
            begin, used = used, used + size
            positions[begin:used] = numbers[:size]
            segments[begin:used] = number
            ends.append(used)
        positions[used:] = segments[used:] = 0
        first = row.pieces[0][0].tokens
        tokens: Any
        if isinstance(first, dict):
            tokens = {name: self._field(name, row, used) for name in first}
        else:
            tokens = self._field(None, row, used)
        return Packed(
            tokens,
            torch.from_numpy(positions),
            torch.from_numpy(segments),
            torch.from_numpy(np.array(ends, dtype=np.int32)),
            max(sizes),
            row.keys,
        )

    def _field(self, name: str | None, row: RowParts, used: int) -> Tensor:
        """[L]; where dtypes differ, of one that holds them all."""
        parts: list[Tensor] = []
        for document, start, stop in row.pieces:
            tokens = document.tokens if name is None else document.tokens[name]  # type: ignore[index]
            assert isinstance(tokens, Tensor)
            parts.append(tokens if not start and stop == document.length else tokens[start:stop])
            if rest := (start - stop) % self._pad_to:
                parts.append(tokens.new_full((rest,), self._padding.of(name)))
        if rest := self._seq_len - used:
            parts.append(parts[0].new_full((rest,), self._padding.of(name)))
        if len({part.dtype for part in parts}) > 1:
            parts = _of_one_dtype(parts)
        return torch.cat(parts)


def _of_one_dtype(parts: list[Tensor]) -> list[Tensor]:
    """The same in a dtype that holds them all.

    Raises:
        ValueError: There is none: torch's rule for integers with floats would round large tokens.
    """
    try:
        dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    except RuntimeError:  # torch has no such dtype for some of the unsigned ones
        dtype = torch.float64 if any(part.dtype.is_floating_point for part in parts) else torch.int64
    if not all(_keeps(dtype, part) for part in parts):
        dtype = torch.float64
        if not all(_keeps(dtype, part) for part in parts):
            told = ", ".join(sorted({str(part.dtype) for part in parts}))
            raise ValueError(f"no dtype holds all tokens of a row, of {told}; convert the documents in a map before")
    return [part.to(dtype) for part in parts]


def _keeps(dtype: torch.dtype, part: Tensor) -> bool:
    """Whether each value of `part` is the same in `dtype`, which torch has chosen for it."""
    if part.dtype.is_complex:
        return dtype.is_complex
    if part.dtype.is_floating_point or part.dtype == dtype:
        return True
    held = part.to(dtype)
    held = held.real if dtype.is_complex else held
    if part.dtype == torch.uint64 and bool((held < 0).any()):
        return False
    return torch.equal(held.to(part.dtype), part)


def collate_packed(rows: Sequence[Packed], *, collate_fn_map: Any = None) -> Packed:
    """One batch of rows, see `Packed`."""
    if rows[0].segments.ndim != 1:
        raise TypeError("rows can be batched once, got batches of them; call batch() with the size of the whole batch")
    tokens, positions, segments = (
        torch_collate.collate(list(part), collate_fn_map=collate_fn_map)
        for part in zip(*(row[:3] for row in rows), strict=True)
    )
    size = rows[0].segments.shape[0]
    parts = [np.zeros(1, dtype=np.int32)]
    longest = 0
    for number, row in enumerate(rows):
        ends = row.cu_seqlens.numpy()
        parts.append(ends[1:] + number * size)
        longest = max(longest, row.max_seqlen, rest := size - int(ends[-1]))
        if rest:
            parts.append(np.array([(number + 1) * size], dtype=np.int32))
    cu_seqlens = torch.from_numpy(np.concatenate(parts).astype(np.int32, copy=False))
    return Packed(tokens, positions, segments, cu_seqlens, longest, tuple(row.keys for row in rows))


def unpack(packed: Packed) -> list[Any]:
    """What `packed` was made of: the rows of a batch, the documents (pieces) of a row as tensors or dicts of them.

    A row has as many sequences as keys. In a batch another one may follow, the padding at the end of the row; so rows
    are what they were before they were batched. Documents have the padding that `pad_to` gave them.

    Raises:
        ValueError: Somebody has changed the keys or `cu_seqlens`.
    """
    if packed.segments.ndim == 1:
        return [_between(packed.tokens, begin, end) for begin, end in pairwise(packed.cu_seqlens.tolist())]
    size = packed.segments.shape[1]
    rows: list[Packed] = []
    at = 0  # where in `cu_seqlens` the row begins
    parts = zip(packed.keys, packed.positions, packed.segments, strict=False)
    for number, (keys, positions, segments) in enumerate(parts):
        ends = packed.cu_seqlens[at : at + len(keys) + 1] - number * size
        if not 0 < len(keys) < len(ends) or ends[0] != 0 or ends[-1] > size:
            break
        at += len(keys) + (int(ends[-1]) < size)
        rows.append(Packed(_between(packed.tokens, number), positions, segments, ends, int(ends.diff().max()), keys))
    if not len(rows) == len(packed.segments) == len(packed.keys):
        raise ValueError(
            "unbatch() takes batches as pack() and batch() make them, got one whose keys and cu_seqlens are not those "
            "of its rows; put the map that changes them after unbatch()"
        )
    return rows


def _between(tokens: Any, begin: int, end: int | None = None) -> Any:
    """A part of each field; without `end`, what is at `begin`."""
    if isinstance(tokens, Mapping):
        return {name: _between(field, begin, end) for name, field in tokens.items()}
    return tokens[begin] if end is None else tokens[begin:end]
