"""Train on the answers of a REST API: within its limits, each asked for once, and exact after any crash.

    python examples/rest_api.py http://127.0.0.1:8080 run --items 1000

`GET /items/17` answers `{"x": [0.5, 2.0], "y": 3.0}`. At most 32 requests are under way, and 200 begin in a second.
After 429, 5xx, a reset or a time-out an item is asked for again, when the server says so; one that is missing is named
in `run/skipped.jsonl`. What came is in `run/cache`, the state in `run/state.pt`: kill it at any moment and start it
again, and it makes the steps that it would have made. The exit status is 1 unless each item that is not missing was
trained on in each epoch. It needs aiohttp.
"""

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientError, ClientSession
from torch import Tensor, nn

from aioloader import Pipeline, Rate, Retry


def make(session: ClientSession, folder: Path, count: int) -> Pipeline[dict[str, Tensor]]:
    async def get(item: int) -> dict[str, Tensor]:
        async with session.get(f"/items/{item}") as response:
            if response.status == 404:
                raise LookupError(f"there is no item {item}")
            response.raise_for_status()
            answer = await response.json()
        return {"item": torch.tensor(item), "x": torch.tensor(answer["x"]), "y": torch.tensor(answer["y"])}

    retry = Retry(attempts=6, on=(ClientError, TimeoutError), wait_initial=0.05, jitter=0.1)
    items = Pipeline(range(count)).shuffle(seed=0)
    answers = items.map(get, concurrency=32, timeout=5.0, retry=retry, rate=Rate(200)).cache(disk=folder / "cache")
    return answers.skip_errors(LookupError, max_share=0.1, report=folder / "skipped.jsonl").batch(16)


async def train(url: str, folder: Path, items: int, epochs: int) -> bool:
    """Go on from the state, if there is one; returns whether each item that is not missing came in each epoch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    seen, checkpoint = Counter[int](), folder / "state.pt"
    async with ClientSession(url) as session, make(session, folder, items) as loader:
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            seen.update(saved.pop("seen"))
            for name, state in saved.items():
                parts[name].load_state_dict(state)
        for epoch in range(loader.state_dict()["epoch"], epochs):
            async for batch in loader:
                loss = nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.update(batch["item"].tolist())
                print(f"epoch {epoch}: {seen.total()} samples, loss {loss.item():.6f}", flush=True)
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"seen": dict(seen), **state}, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)  # it is whole, or the one before it
    missing = {json.loads(line)["key"] for line in (folder / "skipped.jsonl").read_text().splitlines()}
    print(f"{len(seen)} items, each {epochs} times; {len(missing)} are missing")
    return all(item in missing or seen[item] == epochs for item in range(items))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "skipped.jsonl").touch()
    raise SystemExit(0 if asyncio.run(train(options.url, options.folder, options.items, options.epochs)) else 1)
