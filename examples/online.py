"""Train on what is posted to an HTTP service, while it is posted, with metrics for Prometheus.

    python examples/online.py --port 8080
    curl -d '{"id": 1, "x": [0.5, 2.0], "y": 3.0}' http://127.0.0.1:8080/samples
    curl http://127.0.0.1:8080/metrics

A post reserves its place before its body is read; where there is none it is answered 429, so memory stays flat. SIGTERM
ends the service when it has trained on what it accepted. Needs aiohttp and `pip install 'aioloader[prometheus]'`.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import torch
from aiohttp import web
from prometheus_client import REGISTRY
from prometheus_client.aiohttp import make_aiohttp_handler
from torch import Tensor, nn

from aioloader import Pipeline
from aioloader.metrics import PrometheusCollector
from aioloader.sources import Channel

channel = Channel[dict[str, Tensor]](maxsize=64)
loader = Pipeline(channel).batch(16, max_wait=0.05)  # full, or 50 ms after its first sample
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
accepted, trained = Counter[int](), Counter[int]()  # how often each id


async def accept(request: web.Request) -> web.Response:
    """`POST /samples`: 202 when the sample will be trained on."""
    try:
        slot = channel.reserve_nowait()
    except asyncio.QueueFull:
        return web.Response(status=429, headers={"Retry-After": "1"}, text="training is behind; try again later\n")
    with slot:  # gives the place back where the post is no sample
        try:
            post = await request.json()
            sample = {"id": torch.tensor(int(post["id"])), "y": torch.tensor(float(post["y"]))}
            sample["x"] = torch.tensor(post["x"], dtype=torch.float32).reshape(2)
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            return web.Response(status=400, text=f"not a sample: {error!r}\n")
        slot.send(sample)
    accepted[int(sample["id"])] += 1
    return web.Response(status=202)


def step(batch: dict[str, Tensor]) -> None:
    """One step of the optimizer; in a thread, so that posts are answered meanwhile."""
    optimizer.zero_grad()
    nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"]).backward()
    optimizer.step()
    trained.update(batch["id"].tolist())


async def training(_: web.Application) -> AsyncIterator[None]:
    async def train() -> None:
        async for batch in loader:
            await asyncio.to_thread(step, batch)

    async with asyncio.TaskGroup() as tasks:  # a training that fails ends the service
        tasks.create_task(train())
        yield
        channel.close()  # each post was answered by now, or given up: aiohttp reads no more bodies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8080, help="0: any free port")
    REGISTRY.register(PrometheusCollector(loader, "online"))
    app = web.Application()
    app.add_routes([web.post("/samples", accept), web.get("/metrics", make_aiohttp_handler())])
    app.cleanup_ctx.append(training)
    web.run_app(app, host="127.0.0.1", port=parser.parse_args().port, access_log=None, shutdown_timeout=1.0)
    print(f"trained on {trained.total()} of {accepted.total()} accepted samples")
    raise SystemExit(0 if trained == accepted else 1)
