"""`loader.progress()`: the batches of an epoch with a progress bar, of tqdm or of rich."""

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Generic, Literal, Protocol

from aioloader.core.typevars import T_co

__all__ = ["Bar", "Countable", "ProgressLoader", "Style"]

Style = Literal["tqdm", "rich"]


class Bar(Protocol):
    """A bar that is on the screen."""

    def moved(self, batches: int) -> None:
        """So many are done, all in all."""

    def close(self, *, complete: bool) -> None:
        """Leave it there; `complete`: there are no more batches than were done."""


class Countable(Protocol):
    """An iterator over batches, or the loader itself."""

    @property
    def batches(self) -> int:
        """Steps of the epoch that are done, those before a resume included."""


class ProgressLoader(Generic[T_co]):
    """A loader whose iterators draw a bar; made by `loader.progress()`.

    Args:
        loader: What is iterated.
        style: Who draws; None: tqdm, or rich where tqdm is not installed.
        description: What is written before the bar.

    Raises:
        ModuleNotFoundError: Nobody is there who could draw.
    """

    def __init__(self, loader: Any, style: Style | None, description: str | None) -> None:
        self._loader = loader
        self._style = _chosen(style)
        self._description = description

    def __len__(self) -> int:
        return len(self._loader)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{self._loader!r}.progress()"

    def _open(self) -> Bar:
        total = None
        with suppress(TypeError):  # it has no length
            total = len(self._loader)
        return _OPEN[self._style](total, self._loader.first_step, self._description)

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()

    async def aclose(self) -> None:
        """Close the loader."""
        await self._loader.aclose()

    def __iter__(self) -> "ShownBatches[T_co]":
        return ShownBatches(iter(self._loader), self._open())

    def __aiter__(self) -> "ShownAsyncBatches[T_co]":
        return ShownAsyncBatches(self._loader.__aiter__(), self._open())


class _Shown:
    """What both iterators share. When one is dropped, its bar stays as it is."""

    def __init__(self, batches: Any, bar: Bar) -> None:
        self._batches = batches
        self._bar: Bar | None = bar

    def __getattr__(self, name: str) -> Any:  # `state_dict` and the like
        return getattr(self._batches, name)

    def _moved(self) -> None:
        if self._bar is not None:
            self._bar.moved(self._batches.batches)

    def _finish(self, *, complete: bool = False) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.moved(self._batches.batches)
            bar.close(complete=complete)

    def __del__(self) -> None:
        if "_bar" in self.__dict__ and not sys.is_finalizing():
            self._finish()


class ShownBatches(_Shown, Iterator[T_co]):
    """The iterator of `for`."""

    def __next__(self) -> T_co:
        try:
            batch: T_co = next(self._batches)
        except StopIteration:
            self._finish(complete=True)
            raise
        except BaseException:  # an error of one batch, which is a step as well
            self._moved()
            raise
        self._moved()
        return batch

    def close(self) -> None:
        """End the epoch now."""
        self._batches.close()
        self._finish()


class ShownAsyncBatches(_Shown, AsyncIterator[T_co]):
    """The iterator of `async for`."""

    async def __anext__(self) -> T_co:
        try:
            batch: T_co = await self._batches.__anext__()
        except StopAsyncIteration:
            self._finish(complete=True)
            raise
        except BaseException:
            self._moved()
            raise
        self._moved()
        return batch

    async def aclose(self) -> None:
        """End the epoch now."""
        await self._batches.aclose()
        self._finish()


class _TqdmBar:
    """A bar of tqdm: in a notebook the one that suits it."""

    def __init__(self, total: int | None, first: int, description: str | None) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, initial=first, desc=description, unit="batch", dynamic_ncols=True)

    def moved(self, batches: int) -> None:
        if batches != self._bar.n:
            self._bar.update(batches - self._bar.n)

    def close(self, *, complete: bool) -> None:
        if complete and self._bar.total != self._bar.n:
            self._bar.total = self._bar.n
        self._bar.refresh()
        self._bar.close()


class _RichBar:
    """A bar of rich."""

    def __init__(self, total: int | None, first: int, description: str | None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(description or "batches", total=total, completed=first)
        self._progress.start()

    def moved(self, batches: int) -> None:
        self._progress.update(self._task, completed=batches)

    def close(self, *, complete: bool) -> None:
        if complete:
            self._progress.update(self._task, total=self._progress.tasks[0].completed)
        self._progress.stop()


_OPEN: dict[Style, type[_TqdmBar] | type[_RichBar]] = {"tqdm": _TqdmBar, "rich": _RichBar}


def _chosen(style: Style | None) -> Style:
    if style is not None and style not in _OPEN:
        raise ValueError(f"style must be 'tqdm' or 'rich', got {style!r}")
    for name in _OPEN if style is None else (style,):
        if find_spec(name) is not None:
            return name
    raise ModuleNotFoundError(
        f"progress() needs {style or 'tqdm or rich'}, which is not installed; run: pip install 'aioloader[progress]'"
    )
