"""What Hugging Face Accelerate is told of a loader, and what it tells; without importing it."""

import sys
from collections.abc import Iterator
from typing import Any, Final
from weakref import finalize

__all__ = ["Tracked", "batches_to_drop", "gradient_state"]

_END: Final = object()


def gradient_state() -> Any:
    """Accelerate's `GradientState`, where this process uses Accelerate; else None."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.is_initialized():
        return None
    return module.GradientState()


def batches_to_drop(dataset: Any) -> int:
    """How many batches whoever begins to iterate `dataset` will drop: what `skip_first_batches` makes says so."""
    state = gradient_state()
    active = None if state is None else state.active_dataloader
    if active is None or getattr(active, "dataset", None) is not dataset:
        return 0
    return int(getattr(active, "skip_batches", 0))


class Tracked(Iterator[Any]):
    """An epoch that Accelerate keeps track of: it knows of the last batch before that is trained on.

    Else the gradients of a last, incomplete accumulation would never be applied. So one batch is read ahead, as by
    Accelerate's own loaders. An error that comes ahead is raised at its place, after the batch that is held, and the
    epoch goes on after it.

    Args:
        loader: What Accelerate calls the active loader meanwhile; its `end_of_dataloader` is set.
        batches: The epoch.
        state: Accelerate's.
    """

    def __init__(self, loader: Any, batches: Iterator[Any], state: Any) -> None:
        self._loader = loader
        self._batches = batches
        self._state = state
        self._held: tuple[Any, Exception | None] | None = None
        self._leave: finalize[Any, Any] | None = None

    def __next__(self) -> Any:
        leave = self._leave
        if leave is None:
            self._loader.end_of_dataloader = False
            self._state.dataloader_references += [self._loader]
            self._leave = leave = finalize(self, _leave, self._loader, self._state)  # also where a loop is left early
            leave.atexit = False
        held, self._held = self._held, None
        batch, error = self._ask() if held is None else held
        del held
        if error is not None:
            try:
                raise error
            finally:
                del self, error  # an exception that is kept keeps this frame: not with it the epoch
        if batch is _END:
            self._held = self._ask()  # the end once more: whoever counts what was asked for counts this, too
            leave()
            raise StopIteration
        self._held = self._ask()
        self._loader.end_of_dataloader = self._held[0] is _END
        return batch

    def _ask(self) -> tuple[Any, Exception | None]:
        try:
            return next(self._batches, _END), None
        except Exception as error:
            return None, error


def _leave(loader: Any, state: Any) -> None:
    state.dataloader_references = [each for each in state.dataloader_references if each is not loader]
