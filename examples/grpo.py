"""GRPO: prompts are a source, a group of rollouts is a `map`, and the loader bounds how stale a group may be.

A tiny policy learns which of four answers to give to a prompt. For each prompt a group of answers is generated, while
the policy is trained; the longest answer decides how long that takes. Groups without variance in their rewards teach
nothing: they are filtered, and others are generated in their place. `.max_staleness(1)` lets no group begin before the
batch in front of its own is asked for. In the middle the program saves a checkpoint and goes away, with rollouts in
flight; another one goes on from it. In the end every prompt was trained on once per epoch, or left out for want of
variance, and no group was older than one update. Otherwise the exit status is 1.

Run it: `python examples/grpo.py`, or with `--completion-order`.
"""

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aioloader import Pipeline, sample_rng

PROMPTS, EPOCHS = 64, 3
FEATURES, ANSWERS = 8, 4
GROUP = 6  # rollouts of a prompt
BATCH = 8  # groups of an update
STOP_AT = 6  # the update after which the first run goes away
MAX_STALENESS = 1  # updates between the beginning of a group and the one that it is trained in


@dataclass
class Group:
    """The rollouts of one prompt. `number` counts prompts over all epochs."""

    number: int
    prompt: int
    version: int
    answers: Tensor  # int64 [GROUP]
    rewards: Tensor  # float32 [GROUP]


class Policy(nn.Module):
    """A linear policy, and how often it was updated."""

    version: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(FEATURES, ANSWERS)
        self.register_buffer("version", torch.tensor(0))


# -- the core ----------------------------------------------------------------------------------------------------------


def make_loader(engine: "Engine", *, ordered: bool) -> Pipeline[list[Group]]:
    """Batches of groups, each of which has variance and is fresh."""
    prompts = Pipeline(range(PROMPTS)).shuffle(seed=0).repeat(EPOCHS).enumerate().with_seed(0)
    groups = prompts.map(engine.rollout_group, concurrency=32, ordered=ordered).filter(has_variance)
    if not ordered:  # a slow group may come later than the update that it was meant for: it is generated again
        groups = groups.drop_if(engine.is_stale, requeue=True).prefetch(0)
    return groups.batch(BATCH, collate_fn=list).max_staleness(MAX_STALENESS)


async def train(
    audit: "Audit", *, ordered: bool, checkpoint: dict[str, Any] | None = None, stop_at: int | None = None
) -> dict[str, Any]:
    """Train until the prompts end, or until update `stop_at`; returns a checkpoint."""
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    engine = Engine(policy, audit)
    loader = make_loader(engine, ordered=ordered)
    if checkpoint is not None:
        policy.load_state_dict(checkpoint["policy"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["data"])
    async with loader:
        async for batch in loader:
            audit.trains(batch, int(policy.version))
            update(policy, optimizer, batch)
            if int(policy.version) == stop_at:
                break
        data = loader.state_dict()  # what was handed out: rollouts that are in flight will be begun again
    return {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "data": data}


def has_variance(group: Group) -> bool:
    return bool((group.rewards != group.rewards[0]).any())


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: list[Group]) -> None:
    """One step of policy gradient, each answer weighed by how much better it was than its group."""
    loss = torch.zeros(())
    for group in batch:
        advantages = (group.rewards - group.rewards.mean()) / group.rewards.std()
        log_probabilities = policy.logits(features(group.prompt)).log_softmax(-1)
        loss = loss - (log_probabilities[group.answers] * advantages).mean() / len(batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    policy.version += 1


# -- the inference engine, which is a fake -----------------------------------------------------------------------------


def features(prompt: int) -> Tensor:
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(prompt))


class Engine:
    """Generates with the weights that the policy has when a group begins."""

    def __init__(self, policy: Policy, audit: "Audit") -> None:
        self._policy = policy
        self._audit = audit
        self._truth = torch.randn(ANSWERS, FEATURES, generator=torch.Generator().manual_seed(0))

    async def rollout_group(self, numbered: tuple[int, int]) -> Group:
        """`GROUP` answers to a prompt, side by side."""
        number, prompt = numbered
        self._audit.begun.add(number)
        version = int(self._policy.version)
        rng = sample_rng()  # the same numbers for this prompt in this epoch, also when it is generated again
        with torch.no_grad():
            probabilities = self._policy.logits(features(prompt)).softmax(-1)
        answers = torch.multinomial(probabilities, GROUP, replacement=True, generator=rng)
        lengths = torch.rand(GROUP, generator=rng) ** 4  # most are short
        await asyncio.gather(*(asyncio.sleep(0.02 * length) for length in lengths.tolist()))
        right = int((self._truth @ features(prompt)).argmax())
        group = Group(number, prompt, version, answers, (answers == right).float())
        self._audit.groups[number] = group
        return group

    def is_stale(self, group: Group) -> bool:
        return int(self._policy.version) - group.version > MAX_STALENESS


# -- does it keep its promises? ----------------------------------------------------------------------------------------


@dataclass
class Audit:
    """What was generated and trained on, over both runs."""

    begun: set[int] = field(default_factory=set)  # numbers
    groups: dict[int, Group] = field(default_factory=dict)  # finished ones by number, the newest of each
    trained: Counter[int] = field(default_factory=Counter)
    oldest: int = 0

    def trains(self, batch: list[Group], version: int) -> None:
        self.trained.update(group.number for group in batch)
        self.oldest = max(self.oldest, *(version - group.version for group in batch))

    def in_flight(self) -> set[int]:
        """What has begun, and was neither trained on nor left out."""
        without_variance = {number for number, group in self.groups.items() if not has_variance(group)}
        return self.begun - set(self.trained) - without_variance

    def reward(self, epoch: int) -> float:
        """The mean over an epoch's groups, those without variance included."""
        rewards = [group.rewards for number, group in self.groups.items() if number // PROMPTS == epoch]
        return float(torch.stack(rewards).mean())

    def faults(self) -> list[str]:
        """What is not as promised."""
        found = []
        answered = Counter((number // PROMPTS, group.prompt) for number, group in self.groups.items())
        if answered != Counter((epoch, prompt) for epoch in range(EPOCHS) for prompt in range(PROMPTS)):
            found.append("not every prompt was answered in every epoch")
        if self.trained != Counter(number for number, group in self.groups.items() if has_variance(group)):
            found.append("groups were lost, or trained on twice")
        if self.oldest > MAX_STALENESS:
            found.append(f"a group was trained on that was {self.oldest} updates old")
        return found


def main(arguments: list[str] | None = None) -> None:
    """Train in two runs, and check both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--completion-order", action="store_true", help="a slow group holds no other one up")
    ordered = not parser.parse_args(arguments).completion_order
    torch.manual_seed(0)
    audit = Audit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(asyncio.run(train(audit, ordered=ordered, stop_at=STOP_AT)), path)
        in_flight = len(audit.in_flight())
        asyncio.run(train(audit, ordered=ordered, checkpoint=torch.load(path)))
    print(f"mean reward {audit.reward(0):.2f} in the first epoch, {audit.reward(EPOCHS - 1):.2f} in the last")
    print(f"{len(audit.trained)} of {len(audit.groups)} groups trained on, the others had no variance")
    print(f"{in_flight} in flight at the checkpoint, staleness at most {audit.oldest}")
    if faults := audit.faults():
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    main()
