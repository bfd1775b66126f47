"""Ways in which programs save a state: as JSON, by `torch.save`, and by `torch.distributed.checkpoint`."""

import io
import json
import warnings
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

__all__ = ["WAYS", "load_by_way"]

WAYS: Final = ("json", "torch.save", "torch.distributed.checkpoint")


def load_by_way(way: str, state: dict[str, Any], loader: Any) -> None:
    """Save `state`, and load it into `loader`, as a program does that saves its checkpoints in this way."""
    if way == "json":
        loader.load_state_dict(json.loads(json.dumps(state)))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loader.load_state_dict(torch.load(file, weights_only=True))
    else:
        _load_in_place(state, loader)


def _load_in_place(state: dict[str, Any], loader: Any) -> None:
    """It reads the keys that the state of the fresh loader has, and no others."""
    if not torch.distributed.is_available():
        loader.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed")
        state_dict_saver.save({"loader": _Saved(state)}, checkpoint_id=folder, no_dist=True)
        state_dict_loader.load({"loader": loader}, checkpoint_id=folder, no_dist=True)


class _Saved:
    """A loader that has a state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state
