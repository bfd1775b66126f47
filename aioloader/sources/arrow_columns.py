"""Arrow columns as tensors and as Python lists, without a Python object per cell where that can be avoided."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import torch

from aioloader.core.memory import Alloc, memory_at, tensor_over

__all__ = ["Columns", "NullsError", "rows_and_failures", "rows_of"]

_DTYPES: Final[dict[Any, torch.dtype]] = {
    pa.int8(): torch.int8,
    pa.int16(): torch.int16,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
    pa.uint8(): torch.uint8,
    pa.uint16(): torch.uint16,
    pa.uint32(): torch.uint32,
    pa.uint64(): torch.uint64,
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
    pa.bool_(): torch.bool,
}


class NullsError(ValueError):
    """A column has nulls, which its tensor cannot represent."""


class Columns:
    """Makes batches, dictionaries of columns by name, from pieces of record batches.

    Numbers, bools, fixed-size lists of them (2-D, or more where they are nested) and fixed-shape tensors become
    tensors; every other column becomes a list.

    Args:
        schema: The schema of the record batches.
        alloc: Allocates tensors that are put together from several pieces.
    """

    def __init__(self, schema: Any, alloc: Alloc) -> None:
        self._convert: list[tuple[str, Callable[[Sequence[Any]], Any]]] = []
        for field in schema:
            layout = _layout(field.type)
            self._convert.append((field.name, _List() if layout is None else _Tensor(field, *layout, alloc)))

    def batch(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The batch of all rows of `parts`, record batches of at least one row.

        Raises:
            NullsError: A column of integers, bools or lists has nulls.
            Exception: Python cannot hold a value.
        """
        batch = {}
        for at, (name, convert) in enumerate(self._convert):
            try:
                batch[name] = convert([part.column(at) for part in parts])
            except Exception as error:
                error.add_note(f"aioloader: column {name!r}")
                raise
        return batch


def _layout(kind: Any) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Element type and shape of the tensor of one row; None if the column becomes a list."""
    shape: tuple[int, ...] = ()
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation is not None and list(kind.permutation) != sorted(kind.permutation):
            return None
        dtype = _DTYPES.get(kind.value_type)
        return None if dtype is None else (dtype, tuple(kind.shape))
    while pa.types.is_fixed_size_list(kind):
        shape += (kind.list_size,)
        kind = kind.value_type
    dtype = _DTYPES.get(kind)
    return None if dtype is None else (dtype, shape)


class _List:
    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for array in arrays:
            found += _cells(array)
        return found


class _Tensor:
    """A column that becomes a tensor: over arrow's own memory, if it is in one piece."""

    def __init__(self, field: Any, dtype: torch.dtype, shape: tuple[int, ...], alloc: Alloc) -> None:
        self._name = field.name
        self._type = field.type
        self._dtype = dtype
        self._shape = shape
        self._alloc = alloc

    def __call__(self, arrays: Sequence[Any]) -> torch.Tensor:
        parts = [self._one(array) for array in arrays]
        if len(parts) == 1:
            return parts[0]
        joined = self._alloc((sum(map(len, parts)), *self._shape), self._dtype)
        start = 0
        for part in parts:
            joined[start : start + len(part)] = part
            start += len(part)
        return joined

    def _one(self, array: Any) -> torch.Tensor:
        rows = len(array)
        if array.type != self._type:  # a file that stores the column as another type
            array = _decoded(array).cast(self._type)
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        while pa.types.is_fixed_size_list(array.type):
            self._check(array)
            array = array.flatten()
        if array.null_count:
            if not self._dtype.is_floating_point:
                self._check(array)
            array = pc.fill_null(array, pa.scalar(float("nan"), array.type))
        if self._dtype is torch.bool:  # stored as bits
            return _over(array.cast(pa.uint8()), torch.uint8).view(torch.bool).view(rows, *self._shape)
        flat = _over(array, self._dtype)
        return flat.view(rows, *self._shape) if self._shape else flat

    def _check(self, array: Any) -> None:
        if array.null_count:
            kind = str(self._dtype).removeprefix("torch.")
            what = f"{kind} rows of shape {self._shape}" if self._shape else kind
            raise NullsError(
                f"column {self._name!r} has {array.null_count} null{'s'[: array.null_count > 1]}, which a tensor of "
                f"{what} cannot hold; fill them when writing, leave the column out with columns=, or read rows "
                f"(batch_rows=None), where they are None"
            )


def _over(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over the memory of `array`, which has no nulls.

    The decoded data has no other user, so the tensor may be written to like any other. It is not made with numpy or
    DLPack, because both mark arrow's memory as read-only, so torch warns or refuses.
    """
    count = len(array)
    if not count:
        return torch.empty(0, dtype=dtype)
    buffer = array.buffers()[1]
    address, nbytes = buffer.address + array.offset * dtype.itemsize, count * dtype.itemsize
    tensor = tensor_over(memory_at(address, nbytes, owner=buffer), (count,), dtype)
    return tensor if buffer.is_mutable else tensor.clone()


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch as dictionaries of Python objects; nulls are None.

    Raises:
        Exception: Python cannot hold a value.
    """
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*map(_cells, batch.columns), strict=True)]


def rows_and_failures(batch: Any) -> tuple[list[dict[str, Any]], dict[int, tuple[str, Exception]]]:
    """The same, and the rows with values that Python cannot hold: by row, the first such column and its error."""
    failures: dict[int, tuple[str, Exception]] = {}
    columns = []
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            cells = _cells(array)
        except Exception:
            cells = []
            for row in range(len(array)):
                try:
                    cells.append(array[row].as_py())
                except Exception as error:
                    cells.append(None)
                    failures.setdefault(row, (name, error))
        columns.append(cells)
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)], failures


def _cells(array: object) -> list[Any]:
    """A column as Python objects, made by arrow in C++."""
    cells: list[Any] = _decoded(array).to_pylist()
    return cells


def _decoded(array: object) -> Any:
    """The array without a dictionary: arrow looks up single values seventy times as slowly as all at once."""
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array
