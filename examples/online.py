"""Train on what is posted to an HTTP service, while it is posted.

    python examples/online.py --port 8080
    curl -d '{"id": 1, "x": [0.5, 2.0], "y": 3.0}' http://127.0.0.1:8080/samples
    curl http://127.0.0.1:8080/stats

A post reserves its place in a `Channel` before its body is read. When training is behind and no place is free, the
answer is 429, and the client tries again later: no post waits here, and memory stays flat. A batch is given when it is
full, or 50 ms after its first sample. SIGTERM ends it well: nothing more is accepted, what was accepted is trained on,
and the exit status is 0.

Without arguments it checks itself: it posts by HTTP, sends itself a SIGTERM, and looks whether each post that was
accepted was trained on, once. Needs aiohttp.
"""

import argparse
import asyncio
import os
import signal
from collections import Counter

import torch
from aiohttp import ClientSession, web
from torch import Tensor, nn

from aioloader import ChannelClosedError, Pipeline
from aioloader.sources import Channel

Sample = dict[str, Tensor | float]

PLACES = 64
BATCH_SIZE = 16


class Service:
    """A linear model, and the posts that it learns from.

    Attributes:
        trained: How often each sample was trained on, by its id.
    """

    def __init__(self) -> None:
        self.channel = Channel[Sample](maxsize=PLACES)
        self.loader = Pipeline(self.channel).batch(BATCH_SIZE, max_wait=0.05)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.trained: Counter[int] = Counter()

    async def accept(self, request: web.Request) -> web.Response:
        """`POST /samples`: 202 when the sample will be trained on."""
        try:
            slot = self.channel.reserve_nowait()
        except asyncio.QueueFull:
            return web.Response(status=429, headers={"Retry-After": "1"}, text="training is behind; try again later\n")
        except ChannelClosedError:
            return web.Response(status=503, text="shutting down\n")
        with slot:  # gives the place back where the post is none
            try:
                post = await request.json()
                sample: Sample = {"id": int(post["id"]), "x": torch.tensor(post["x"]).reshape(2), "y": float(post["y"])}
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                return web.Response(status=400, text=f"not a sample: {error!r}\n")
            slot.send(sample)
        return web.Response(status=202)

    async def stats(self, _: web.Request) -> web.Response:
        """`GET /stats`: how much was trained on, and what the loader says of itself."""
        return web.json_response({"trained": self.trained.total(), "loader": self.loader.stats().as_dict()})

    def step(self, batch: dict[str, Tensor]) -> None:
        """One step of the optimizer; in a thread, so that posts are answered meanwhile."""
        loss = nn.functional.mse_loss(self.model(batch["x"].float())[:, 0], batch["y"].float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    async def train(self) -> None:
        """Until the channel is closed, and what is in it has been trained on."""
        async for batch in self.loader:
            await asyncio.to_thread(self.step, batch)
            self.trained.update(batch["id"].tolist())


async def serve(service: Service, port: int, started: "asyncio.Future[str] | None" = None) -> None:
    """Accept posts and train, until SIGTERM or Ctrl-C.

    Args:
        service: What it serves.
        port: 0: any that is free.
        started: Gets the service's URL.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = web.Application()
    app.add_routes([web.post("/samples", service.accept), web.get("/stats", service.stats)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"listening on http://{host}:{port}", flush=True)
    if started is not None:
        started.set_result(f"http://{host}:{port}")

    training = asyncio.create_task(service.train())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([training, stopping], return_when=asyncio.FIRST_COMPLETED)  # training ends early if it fails
    stopping.cancel()
    await runner.cleanup()  # no new connections; posts that are being read are answered
    service.channel.close()  # now, since a slot of a closed channel sends nothing
    await training
    print(f"trained on {service.trained.total()} samples", flush=True)


class SlowToBegin(Service):
    """One whose first step waits until a post was refused, so that the check sees that happen."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = asyncio.Event()

    async def train(self) -> None:
        await self.refused.wait()
        await super().train()


async def check(posts: int) -> None:
    """Run the service, post to it, end it, and compare what it accepted with what it trained on."""
    service = SlowToBegin()
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(service, 0, started))
    answers: Counter[int] = Counter()

    async def post(session: ClientSession, number: int) -> None:
        sample = {"id": number, "x": [number / posts, 1.0], "y": 2 * number / posts}
        while True:
            async with session.post("/samples", json=sample) as answer:
                answers[answer.status] += 1
            if answer.status != 429:
                return
            service.refused.set()
            await asyncio.sleep(0.01)  # a client on the network would wait as long as `Retry-After` says

    async with ClientSession(await started) as session:
        await asyncio.gather(*(post(session, number) for number in range(posts)))
        async with session.post("/samples", data=b"{}") as answer:
            answers[answer.status] += 1
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
    accepted, trained = Counter(range(posts)), service.trained
    assert answers[202] == posts, answers
    assert answers[429] > 0, answers
    assert answers[400] == 1, answers
    assert trained == accepted, f"lost {accepted - trained}, twice {trained - accepted}"
    batches = service.loader.stats().batches
    print(f"{posts} posts were accepted, each was trained on once, in {batches} batches; 429 was answered, too")


def main(arguments: list[str] | None = None) -> None:
    """Serve, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, help="serve there (0: any free port); without it the example checks itself")
    parser.add_argument("--posts", type=int, default=500, help="of the check")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    asyncio.run(check(options.posts) if options.port is None else serve(Service(), options.port))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    main()
