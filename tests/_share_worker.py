"""One of several processes that share what the first one reads. Writes what it saw as lines of JSON.

Arguments: its rank, how many there are, a folder, and what happens: "read", or "die" (the first one, by SIGKILL).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from aioloader import Pipeline, WorkerDiedError

ROWS = 4 << 10


def main() -> None:
    rank, size, folder, what = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    calls: list[int] = []

    def load(key: int) -> torch.Tensor:
        calls.append(key)
        return torch.full((ROWS,), key)

    loader = Pipeline(range(20)).map(load, concurrency=1).batch(2).share(range(size), timeout=60)
    seen, failed = [], ""
    try:
        for batch in loader:
            seen.append(batch[:, 0].tolist())
            if what == "die" and rank == 0 and len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            batch += 1000  # nobody else sees it
    except WorkerDiedError as error:
        failed = str(error)
    said = {"rank": rank, "seen": seen, "failed": failed, "calls": len(calls)}
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
