"""Reinforcement learning on rollouts of the policy that is being trained.

Prompts are a source, and a rollout is a map: so the loader decides when each begins, `max_staleness` keeps the policy
that acted at most so many updates behind, and a checkpoint can go on exactly. Where rollouts cannot be a map, because
they come from environments that live on their own (`--live`), these send into a `Channel`; each takes its place in it
*before* it acts, so that no step grows old while it waits for room.

Run it: `python examples/rollouts.py`, or with `--live`.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import torch
from torch import Tensor, nn

from aioloader import ChannelClosedError, Pipeline
from aioloader.sources import Channel

ACTIONS = 4
FEATURES = 8
Step = dict[str, Tensor | float]
Batches = Pipeline[dict[str, Tensor]]

CONCURRENCY = 32
BATCH_SIZE = 32
STALENESS = 2  # batches


class Policy(nn.Module):
    """A linear policy, and how often it was updated."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(FEATURES, ACTIONS)
        self.version = 0

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator) -> int:
        probabilities = self.logits(observation).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))


class Environment:
    """The right action is the one that `truth` says, and pays 1."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.truth = torch.randn(ACTIONS, FEATURES)

    async def rollout(self, prompt: int) -> Step:
        """What the policy did, what it got for it, and which version of it that was."""
        generator = torch.Generator().manual_seed(prompt)
        observation = torch.randn(FEATURES, generator=generator)
        version = self.policy.version
        action = self.policy.act(observation, generator)
        await asyncio.sleep(0.0005 * (1 + prompt % 4))  # the environment takes its time
        reward = float(action == int((self.truth @ observation).argmax()))
        return {"observation": observation, "action": action, "reward": reward, "version": version}


@asynccontextmanager
async def as_map(environment: Environment) -> AsyncIterator[Batches]:
    """Prompts, and a rollout of each; the loader begins as many as will be trained on."""
    prompts = range(1_000_000)
    rollouts = Pipeline(prompts).map(
        environment.rollout, concurrency=CONCURRENCY, ordered=False, max_overtaken=BATCH_SIZE
    )
    yield rollouts.batch(BATCH_SIZE).max_staleness(STALENESS)  # and by what overtakes it, a step ages one batch more


@asynccontextmanager
async def live(environment: Environment) -> AsyncIterator[Batches]:
    """Environments that live on their own, and send."""
    channel = Channel[Step](maxsize=BATCH_SIZE)

    async def act(first: int) -> None:
        prompt = first
        try:
            while True:
                with await channel.reserve() as slot:  # waits here while the trainer is behind, with nothing in hand
                    slot.send(await environment.rollout(prompt))
                prompt += CONCURRENCY
        except ChannelClosedError:  # the trainer has had enough
            return

    tasks = [asyncio.create_task(act(number)) for number in range(CONCURRENCY)]
    async with channel:  # closes it, which ends the environments
        yield Pipeline(channel).batch(BATCH_SIZE, max_wait=0.05).prefetch(1)
    await asyncio.gather(*tasks)


Rollouts = Callable[[Environment], AbstractAsyncContextManager[Batches]]


async def train(rollouts: Rollouts, updates: int) -> tuple[float, float, int]:
    """Train; returns the mean reward of the first and of the last updates, and the age of the oldest step."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    rewards: list[float] = []
    oldest = 0
    async with rollouts(Environment(policy)) as loader, loader:
        async for batch in loader.take(updates):
            oldest = max(oldest, policy.version - int(batch["version"].min()))
            chosen = policy.logits(batch["observation"]).log_softmax(-1).gather(1, batch["action"][:, None])[:, 0]
            loss = -(chosen * (batch["reward"] - batch["reward"].mean())).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            policy.version += 1
            rewards.append(float(batch["reward"].mean()))
    tenth = max(1, updates // 10)
    return sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth, oldest


def main(arguments: list[str] | None = None) -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--live", action="store_true", help="from environments that live on their own")
    options = parser.parse_args(arguments)
    first, last, oldest = asyncio.run(train(live if options.live else as_map, options.updates))
    print(f"mean reward {first:.2f} at first, {last:.2f} in the end")
    print(f"no step was older than {oldest} updates")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    main()
