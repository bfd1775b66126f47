"""`examples/pretrain.py` as one process of a torchrun, with `SIGKILL` in its middle: `_pretrain_worker.py FOLDER ...`.

Each step is written down in a file of FOLDER: the documents of its rows, and checksums of their tokens and of the
weights after it. Rank 0 of the first start is killed when half of its second checkpoint is written.
"""

import io
import json
import os
import runpy
import signal
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from aioloader import Packed

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain.py"


def checksum(tensors: Iterable[Tensor]) -> int:
    return zlib.crc32(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors))


def note_of(rows: Packed) -> list[Any]:
    """The documents of each row, and a checksum of the tokens and labels."""
    return [[list(map(repr, keys)) for keys in rows.keys], checksum(rows.tokens.values())]


class Notes:
    """One line of `path` for each step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Any] = []
        register_module_forward_pre_hook(self._see_rows)
        register_optimizer_step_post_hook(self._see_weights)

    def _see_rows(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if type(module).__name__ == "TinyModel":
            self._rows = note_of(*arguments)

    def _see_weights(self, optimizer: Any, *_: Any) -> None:
        weights = checksum(weight for group in optimizer.param_groups for weight in group["params"])
        with self._path.open("a") as file:
            file.write(json.dumps([*self._rows, weights]) + "\n")


class DeadlySave:
    """`torch.save`, whose second call ends the process in its middle."""

    def __init__(self) -> None:
        self._save = torch.save
        self._calls = 0

    def __call__(self, value: Any, path: Path) -> None:
        self._calls += 1
        whole = io.BytesIO()
        self._save(value, whole)
        if self._calls == 2:
            path.write_bytes(whole.getvalue()[: whole.tell() // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(whole.getvalue())


if __name__ == "__main__":
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    notes = Notes(Path(sys.argv.pop(1), f"{start}-{os.environ['RANK']}.txt"))
    if start == "0":
        setattr(torch, "save", DeadlySave())  # noqa: B010  # mypy wants the whole signature
    runpy.run_path(str(EXAMPLE), run_name="__main__")
