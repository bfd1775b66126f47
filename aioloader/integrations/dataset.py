"""A loader's batches as a dataset: what stays when a trainer builds torch's own `DataLoader` anew around it."""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from aioloader.engine.faces import Batches
from aioloader.integrations.accelerate_hooks import batches_to_drop
from aioloader.integrations.read_ahead import Places, ReadAhead
from aioloader.loader import Loader

__all__ = ["BatchesDataset", "SizedBatchesDataset", "dataset_of"]


class BatchesDataset(IterableDataset[Any]):
    """The batches of a loader, each `iter()` one epoch, with the loader's state.

    Args:
        loader: It makes the batches.
        read_ahead: Batches that the trainer holds and has not trained on, whenever it asks for a state.
    """

    def __init__(self, loader: Loader, read_ahead: int) -> None:
        self.loader = loader
        self.read_ahead = read_ahead
        self._places: Places | None = None  # of the newest epoch, where anything is read ahead
        self._offset = 0  # between the epochs that the trainer counts, and those of the loader

    def __iter__(self) -> Iterator[Any]:
        """One epoch, for a `DataLoader` of torch's that a trainer has made around this dataset.

        Raises:
            RuntimeError: This is a worker process.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                f"num_workers must be 0 for a loader as a torch DataLoader, since {self.loader!r} has workers of its "
                f"own, got a worker process; pass num_workers to aioloader.DataLoader, or concurrency to the stages"
            )
        return self.epoch()

    def epoch(self, ahead: int = 0) -> Iterator[Any]:
        """One epoch.

        `skip_first_batches` of Accelerate, with which Hugging Face's Trainer resumes, reads and drops what a first
        process has trained on. Where a state was loaded, that lies before it, so there is something to drop in its
        place.

        Args:
            ahead: Batches that are read and held on this side of the trainer.
        """
        drop = batches_to_drop(self) if self.loader._loaded is not None else 0
        batches: Iterator[Any] = iter(self.loader)
        ahead += self.read_ahead
        if ahead and isinstance(batches, Batches):
            batches = ReadAhead(batches, ahead, self._begun)
        return chain(repeat(None, drop), batches) if drop else batches

    def _begun(self, places: Places) -> None:
        self._places = places

    def state_dict(self, *_: Any) -> dict[str, Any]:
        """The loader's, after the last batch that the trainer has trained on.

        Args:
            _: composer says how many samples it has trained on, which the state knows better.
        """
        return self.loader.state_dict() if self._places is None else self._places.state(self.loader)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)
        self._offset = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch` as the trainer counts.

        A loaded state knows its epoch, and some trainers count from 0 again in a new process (Fabric, Accelerate): then
        the epoch of the state is what they mean, and they count on from there.
        """
        loaded = self.loader._loaded
        if loaded is not None:
            self._offset = loaded["epoch"] - epoch
        self.loader.set_epoch(epoch + self._offset)


class SizedBatchesDataset(BatchesDataset):
    """The same of a loader that has a length."""

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # made only for those that have one


def dataset_of(loader: Loader, read_ahead: int) -> BatchesDataset:
    """The batches of `loader`, with a length if it has one: trainers ask whether there is a `__len__`."""
    try:
        len(loader)  # type: ignore[arg-type]  # both kinds have one, which raises where there is none
    except TypeError:
        return BatchesDataset(loader, read_ahead)
    except Exception:  # it has one, and says what is wrong when it is asked
        return SizedBatchesDataset(loader, read_ahead)
    return SizedBatchesDataset(loader, read_ahead)
