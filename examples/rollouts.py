"""Reinforcement learning on rollouts that come while the policy is trained.

Environments act with the policy as it is and send what happened into a `Channel`; the trainer takes batches out of it.
A batch is given when it is full, or 50 ms after its first step: a slow environment holds nobody up. Steps of a policy
that is more than `MAX_AGE` updates old are left out when their turn comes.

Run it: `python examples/rollouts.py`.
"""

import argparse
import asyncio
from typing import Any

import torch
from torch import Tensor, nn

from aioloader import ChannelClosedError, Pipeline
from aioloader.sources import Channel

ACTIONS = 4
FEATURES = 8
ENVIRONMENTS = 32
MAX_AGE = 4


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


async def rollout(number: int, policy: Policy, truth: Tensor, channel: Channel) -> None:
    """One environment: the right action is the one that `truth` says, and pays 1."""
    generator = torch.Generator().manual_seed(number)
    try:
        while True:
            observation = torch.randn(FEATURES, generator=generator)
            version = policy.version
            action = policy.act(observation, generator)
            await asyncio.sleep(0.0005 * (1 + number % 4))  # the environment takes its time
            reward = float(action == int((truth @ observation).argmax()))
            step = {"observation": observation, "action": action, "reward": reward, "version": version}
            await channel.send(step)  # waits while the trainer is behind
    except ChannelClosedError:  # the trainer has had enough
        return


async def train(updates: int) -> tuple[float, float, int, int]:
    """Train, and return the mean reward of the first and of the last updates, and what was left out and cut short."""
    torch.manual_seed(0)
    truth = torch.randn(ACTIONS, FEATURES)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    channel = Channel(maxsize=256)

    def stale(step: dict[str, Any]) -> bool:
        return policy.version - int(step["version"]) > MAX_AGE

    loader = Pipeline(channel).drop_if(stale).batch(32, max_wait=0.05).prefetch(1).take(updates)
    environments = [asyncio.create_task(rollout(number, policy, truth, channel)) for number in range(ENVIRONMENTS)]
    rewards: list[float] = []
    async with channel:  # closes it, which ends the environments
        async for batch in loader:
            chosen = policy.logits(batch["observation"]).log_softmax(-1).gather(1, batch["action"][:, None])[:, 0]
            loss = -(chosen * (batch["reward"] - batch["reward"].mean())).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            policy.version += 1
            rewards.append(float(batch["reward"].mean()))
    await asyncio.gather(*environments)
    stages = loader.stats().stages
    tenth = max(1, updates // 10)
    return (
        sum(rewards[:tenth]) / tenth,
        sum(rewards[-tenth:]) / tenth,
        sum(stage.dropped for stage in stages),
        sum(stage.partial for stage in stages),
    )


def main(arguments: list[str] | None = None) -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=150)
    first, last, dropped, partial = asyncio.run(train(parser.parse_args(arguments).updates))
    print(f"mean reward {first:.2f} at first, {last:.2f} in the end")
    print(f"{dropped} stale steps were left out, {partial} batches were given before they were full")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    main()
