"""`as_torch_dataloader`: a loader as an instance of torch's `DataLoader`, for trainers that take nothing else."""

from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data
from torch.utils.data import Sampler

from aioloader.core.checks import check_count
from aioloader.integrations.accelerate_hooks import Tracked, gradient_state
from aioloader.integrations.dataset import BatchesDataset, dataset_of
from aioloader.loader import Loader

__all__ = ["TorchDataLoader", "as_torch_dataloader"]


def as_torch_dataloader(loader: Loader, *, read_ahead: int = 0) -> "TorchDataLoader":
    """A `torch.utils.data.DataLoader` whose batches are those of `loader`, with its length, state, epoch and device.

    For trainers that ask `isinstance(loader, torch.utils.data.DataLoader)`: Fabric, Keras, Accelerate, Hugging Face's
    Trainer, Ray Train. Lightning's Trainer, ignite, fastai and your own loop take the loader itself.

    It splits nothing: with several ranks, `loader` has a `.shard()` or a sampler that does. Trainers leave it alone, or
    make a plain `DataLoader` around its `dataset`, which gives the same batches.

    Args:
        loader: A `Pipeline` or `DataLoader` of ours.
        read_ahead: Batches that the trainer has read and not trained on whenever `state_dict()` is called, 0 or 1: 1
            for Ray's `prepare_data_loader` and torchtnt's `AutoUnit`. The state is then the one before that batch. What
            Accelerate reads ahead is accounted for.

    Returns:
        It has `state_dict`, `load_state_dict` and `set_epoch`, and `loader`, the one that was passed. Its
        `batch_size` is None, as of any `DataLoader` whose dataset makes whole batches.

    Raises:
        TypeError: `loader` is none of ours.
        ValueError: `read_ahead` is neither 0 nor 1. Later, if a trainer makes a new instance with workers, or with
            batches or samplers of its own.
    """
    given: Any = loader
    if isinstance(given, TorchDataLoader):
        raise TypeError(f"this is a torch DataLoader already: {given!r}; pass the loader that it was made of")
    if not isinstance(given, Loader):
        raise TypeError(
            f"as_torch_dataloader takes an aioloader.Pipeline or an aioloader.DataLoader, got {type(given).__name__}; "
            f"wrap other things: Pipeline(source).batch(n)"
        )
    if check_count("read_ahead", read_ahead, least=0) > 1:
        raise ValueError(
            f"read_ahead must be 0 or 1, got {read_ahead}: at the end of an epoch nobody could tell how many of "
            f"several batches are trained on"
        )
    return TorchDataLoader(dataset_of(loader, read_ahead))


class TorchDataLoader(torch.utils.data.DataLoader[Any]):
    """See `as_torch_dataloader`. Its arguments are torch's: trainers make new instances from attributes of old ones.

    Attributes:
        use_stateful_dataloader: Accelerate then keeps the state in its checkpoints.
        end_of_dataloader: For Accelerate: the batch that was given is the last one of the epoch.
        remainder: For Accelerate: how many samples of the last batch of all ranks are no fillers; -1: it is not told.
    """

    dataset: BatchesDataset

    # What Accelerate asks of loaders that it has prepared; it takes such a one as it is, and keeps track of it.
    _is_accelerate_prepared = True
    use_stateful_dataloader = True
    end_of_dataloader = False
    remainder = -1

    def __init__(
        self,
        dataset: BatchesDataset,
        batch_size: int | None = None,
        num_workers: int = 0,
        sampler: Any = None,
        batch_sampler: Any = None,
        collate_fn: Callable[[Any], Any] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(dataset, BatchesDataset):
            raise TypeError(f"dataset must be that of an instance, got {type(dataset).__name__}; as_torch_dataloader()")
        if num_workers:
            raise ValueError(
                f"num_workers must be 0 for a loader as a torch DataLoader, since {dataset.loader!r} has workers of "
                f"its own, got {num_workers}; pass num_workers to aioloader.DataLoader, or concurrency to the stages"
            )
        for name, value in (("batch_size", batch_size), ("sampler", sampler), ("batch_sampler", batch_sampler)):
            if value is not None and not isinstance(value, _EpochSampler):
                raise ValueError(
                    f"{name} must be None for a loader as a torch DataLoader, since {dataset.loader!r} decides which "
                    f"samples a batch holds, got {value!r}; use its .batch(), .shuffle() and .shard()"
                )
        super().__init__(dataset, batch_size=None, collate_fn=_as_it_is, **others)
        # torch refuses samplers for iterable datasets, and replacing them later.
        self.__dict__["sampler"] = _EpochSampler(dataset)

    @property
    def loader(self) -> Loader:
        """The one that this was made of."""
        return self.dataset.loader

    @property
    def device(self) -> Any:
        """Where the batches are; None: where they are made."""
        return getattr(self.loader, "device", None)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # both kinds have one, which raises where there is none

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's is an iterator of its own class
        state = gradient_state()
        return self.dataset.epoch() if state is None else Tracked(self, self.dataset.epoch(ahead=1), state)

    def state_dict(self) -> dict[str, Any]:
        """The loader's, after the last batch that the trainer has trained on; see `Loader.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next epoch go on where `state` was taken; see `Loader.load_state_dict`."""
        self.dataset.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch`, or after a resume what the trainer means by it."""
        self.dataset.set_epoch(epoch)

    def __repr__(self) -> str:
        return f"as_torch_dataloader({self.loader!r})"


class _EpochSampler(Sampler[None]):
    """What trainers find as `sampler`: its `set_epoch` reaches the loader."""

    def __init__(self, dataset: BatchesDataset) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[None]:
        while True:  # as torch's own of an iterable dataset
            yield None

    def set_epoch(self, epoch: int) -> None:
        self._dataset.set_epoch(epoch)


def _as_it_is(batch: Any) -> Any:
    """Not `default_convert`, which would make tensors of arrays."""
    return batch
