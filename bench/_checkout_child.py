"""A script that runs one case with the aioloader of any folder, for `bench._checkout`.

It imports nothing of `bench`. Its argument is JSON. For each line on its input it runs an epoch, and prints samples and
seconds.
"""

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def loader_of(pipeline: Any, case: str, samples: int) -> Any:
    """A case by its name, see `bench._checkout.CASES`.

    Args:
        pipeline: The class of the checkout.
        case: Its name.
        samples: In an epoch.
    """
    rows = [float(key) for key in range(4096)]

    async def load(key: int) -> float:
        return rows[key % 4096]

    async def wait(key: int) -> float:
        await asyncio.sleep(0.01)
        return rows[key % 4096]

    def read(key: int) -> float:
        return rows[key % 4096]

    keys = pipeline(range(samples))
    if case == "sync":
        return keys.map(read, concurrency=2).batch(256, collate_fn=len)
    if case == "10 ms":
        return keys.map(wait, concurrency=64).batch(64, collate_fn=len)
    return keys.map(load, concurrency=64).batch(256, collate_fn=len)


async def consume(loader: Any) -> int:
    return sum([size async for size in loader])


def main() -> None:
    """Serve epochs until the input ends."""
    asked = json.loads(sys.argv[1])
    sys.path.insert(0, asked["root"])
    aioloader = importlib.import_module("aioloader")
    found = Path(aioloader.__file__ or "").parents[1]
    if found != Path(asked["root"]):
        sys.exit(f"expected the aioloader of {asked['root']}, found that of {found}")
    loader = loader_of(aioloader.Pipeline, asked["case"], asked["samples"])
    for _ in sys.stdin:
        began = time.perf_counter()
        samples = asyncio.run(consume(loader)) if asked["is_async"] else sum(loader)
        print(json.dumps({"samples": samples, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
