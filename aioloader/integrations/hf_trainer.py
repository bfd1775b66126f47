"""`transformers_callback`: Hugging Face's `Trainer` resumes a loader exactly."""

import json
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist

from aioloader.errors import StateError
from aioloader.integrations.torch_dataloader import TorchDataLoader

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["transformers_callback"]

KEY: Final = "aioloader"
"""Under which the state is kept in `trainer_state.json`."""


def transformers_callback(loader: TorchDataLoader) -> "TrainerCallback":
    """A callback for Hugging Face's `Trainer` that keeps the state of `loader` in each checkpoint, and loads it again.

    The state is part of `trainer_state.json`, so a checkpoint may be moved. A resume is exact with gradient
    accumulation, wherever `save_steps` are, and with `max_steps` over several epochs. Leave `ignore_data_skip` as it
    is: nothing is read twice in any case, and with it the Trainer does not count the batches before the resume, so that
    a last, incomplete accumulation of that epoch would not be stepped.

    ```python
    loader = as_torch_dataloader(pipeline)


    class MyTrainer(Trainer):
        def get_train_dataloader(self):
            return loader


    MyTrainer(..., callbacks=[transformers_callback(loader)]).train(resume_from_checkpoint=True)
    ```

    Args:
        loader: What `get_train_dataloader` returns: an `as_torch_dataloader(...)`.

    Raises:
        TypeError: `loader` is something else.
        ImportError: `transformers` is not installed.
    """
    if not isinstance(loader, TorchDataLoader):
        raise TypeError(
            f"transformers_callback takes what get_train_dataloader returns, as_torch_dataloader(loader), got "
            f"{type(loader).__name__}"
        )
    return _class()(loader)


def _class() -> Any:
    """The class, whose base is there only where it is asked for."""
    from transformers import TrainerCallback

    class LoaderCallback(TrainerCallback):
        """Notes the state after each step, where the Trainer keeps what it writes into a checkpoint."""

        def __init__(self, loader: TorchDataLoader) -> None:
            self._loader = loader

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            note(self._loader, state, control)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            note(self._loader, state, control)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step and KEY in state.stateful_callbacks:
                load(self._loader, state, args)

    return LoaderCallback


def note(loader: TorchDataLoader, state: Any, control: Any) -> None:
    """Put the loader's state into the Trainer's: that of each rank, where they differ and a checkpoint is due."""
    mine = loader.state_dict()
    states: list[Any] = [mine]
    if rank_of(mine) is not None and control.should_save and dist.is_initialized():
        states = [None] * dist.get_world_size()
        dist.all_gather_object(states, mine)
    state.stateful_callbacks[KEY] = {"states": states}


def load(loader: TorchDataLoader, state: Any, args: Any) -> None:
    """Load what `note` has kept; then let the loader know in which epoch the Trainer believes to be."""
    states = state.stateful_callbacks[KEY]["states"]
    mine = states[0]
    if len(states) > 1 or rank_of(mine) is not None:
        rank = args.process_index
        mine = next((each for each in states if rank_of(each) == rank), None)
        if mine is None:
            raise StateError(
                f"each rank goes on from a state of its own, and the checkpoint holds none of rank {rank}, but "
                f"{len(states)}; train with as many ranks as before, and let save_strategy decide when to save"
            )
    loader.load_state_dict(mine)
    try:
        steps = max(1, -(-len(loader) // args.gradient_accumulation_steps))
    except TypeError:  # then the Trainer takes all steps for one epoch, also when it is resumed in a later one
        steps = state.max_steps
    loader.set_epoch(state.global_step // steps)


def rank_of(state: dict[str, Any]) -> int | None:
    """The only rank that a state is of; None: it does for all."""
    ranks = json.loads(state["cursor"]["json"])["ranks"]
    return None if ranks is None else ranks["rank"]
