"""The plain model of `test_failures_model`: a pipeline drawn by its seed, and what becomes of each of its samples."""

import random
from dataclasses import dataclass
from typing import Any, TypeAlias

from aioloader import Hedge, Rate, Retry

__all__ = ["LOST", "Broken", "Busy", "Case", "Fate", "Lost", "Outcome", "Work"]

TIMEOUT = 5.0
SOURCES = ("list", "list", "generator", "async generator", "two lists", "one of two fails")

Outcome: TypeAlias = "list[int] | tuple[str, int]"
"""A batch, or the type and the key of an error."""


class Busy(Exception):  # noqa: N818 - the model speaks of it as a value
    """What is retried."""


class Broken(Exception):  # noqa: N818
    """What is not."""


class Lost(Exception):  # noqa: N818
    """Of a source."""


LOST: Outcome = ("Lost", -1)


@dataclass(frozen=True)
class Work:
    """A `map`.

    Attributes:
        asynchronous: Its function is async.
        width: Its concurrency.
        attempts: Of `retry`; None: it is not given.
        retries_timeouts: They are in its `on`.
        timeout: It is given.
        hedge: Its `after`; None: it is not given. Then all calls for a sample come to the same.
        rate: Calls a second, or "adaptive"; None: it is not given.
        budget: Of `retry`; 1.0 refuses none.
        refuses: A filter follows.
    """

    asynchronous: bool
    width: int
    attempts: int | None
    retries_timeouts: bool
    timeout: bool
    hedge: float | str | None
    rate: float | str | None
    budget: float
    refuses: bool

    @classmethod
    def of(cls, draw: random.Random, *, budget: float) -> "Work":
        asynchronous = draw.random() < 0.75
        return cls(
            asynchronous,
            draw.choice((1, 2, 3, 8, 30)),
            draw.choice((None, 1, 2, 3, 4)),
            draw.random() < 0.6,
            asynchronous and draw.random() < 0.5,
            draw.choice((None, None, 0.5, "p90")) if asynchronous else None,
            draw.choice((None, None, 2.0, 1000.0, "adaptive")),
            budget,
            draw.random() < 0.3,
        )

    def may_try_again(self, fault: str, done: int) -> bool:
        """Whether there is another attempt after attempt `done` has come to `fault`."""
        tried = fault == "busy" or (fault == "hang" and self.retries_timeouts)
        return tried and done < (self.attempts or 1)

    @property
    def policies(self) -> dict[str, Any]:
        on = (Busy, TimeoutError) if self.retries_timeouts else Busy
        return {
            "retry": None
            if self.attempts is None
            else Retry(self.attempts, on, wait_initial=0.5, wait_max=3.0, budget=self.budget),
            "timeout": TIMEOUT if self.timeout else None,
            "hedge": None if self.hedge is None else Hedge(self.hedge, budget=1.0),
            "rate": Rate.adaptive(Busy, start=5.0, least=0.5)
            if isinstance(self.rate, str)
            else self.rate and Rate(self.rate),
        }


@dataclass(frozen=True)
class Fate:
    """What becomes of a sample.

    Attributes:
        error: The name of its type; None: there is none.
        kept: No filter refuses it.
        retries: How often it is tried again, in all maps.
        timeouts: How many of its attempts take too long.
    """

    error: str | None = None
    kept: bool = True
    retries: int = 0
    timeouts: int = 0


@dataclass(frozen=True)
class Case:
    """A pipeline, drawn by its seed.

    Attributes:
        seed: What everything here is drawn from.
        samples: Of the source.
        source: A list, a generator, an async one, or two in turn, of which one may fail in its middle.
        works: The maps.
        exact: It is known what becomes of each sample. Not with a budget of retries: which of them it refuses is a
            matter of time.
        ordered: Whether results come in the order of the input.
        requeue: Samples are sent back.
        cache: Samples are kept for the second epoch.
        skip: The types that `skip_errors` leaves out; None: the stage is not there.
        max_errors: Of `skip_errors`.
        size: Of a batch.
        drop_last: As of `batch`.
        prefetch: As the stage.
        staleness: As the stage; None: there is none.
    """

    seed: int
    samples: int
    source: str
    works: tuple[Work, ...]
    exact: bool
    ordered: bool
    requeue: bool
    cache: bool
    skip: tuple[type[Exception], ...] | None
    max_errors: int | None
    size: int
    drop_last: bool
    prefetch: int
    staleness: int | None

    @classmethod
    def of(cls, seed: int) -> "Case":
        draw = random.Random(f"failures {seed}")
        ordered = draw.random() < 0.6
        skip = draw.choice((None, (Exception,), (Exception,), (Busy, TimeoutError), (Broken,)))
        all_skipped = skip == (Exception,)
        budget = draw.choice((1.0, 1.0, 1.0, 0.1)) if skip is None or all_skipped else 1.0
        exact = budget == 1.0
        requeue = exact and draw.random() < 0.25
        cached = ordered and exact and not requeue and draw.random() < 0.3
        return cls(
            seed=seed,
            samples=draw.randrange(0, 30) if exact else draw.randrange(20, 60),
            source="list" if cached else draw.choice(SOURCES),
            works=tuple(Work.of(draw, budget=budget) for _ in range(draw.choice((1, 1, 2)))),
            exact=exact,
            ordered=ordered,
            requeue=requeue,
            cache=cached,
            skip=skip,
            max_errors=draw.choice((None, None, 0, 2)) if ordered and exact else None,
            size=draw.choice((1, 2, 3, 5)) if (ordered and exact) or all_skipped else 1,
            drop_last=ordered and exact and draw.random() < 0.3,
            prefetch=draw.choice((0, 1, 2)),
            staleness=None if cached else draw.choice((None, None, 0, 1, 3)),
        )

    # -- what is decided about each sample -------------------------------------------------------------------------

    def fault(self, number: int, key: int, attempt: int) -> str:
        """What a call comes to."""
        work = self.works[number]
        if work.hedge is not None:
            attempt = 0
        chance = random.Random(f"{self.seed} {number} {key} {attempt}").random()
        if chance < 0.45 and not self.exact:
            return "busy"  # an outage, which budgets are for
        if chance < 0.7:
            return "fast"
        if chance < 0.8:
            return "slow"
        if chance < 0.9:
            return "busy"
        return "hang" if work.timeout and chance < 0.96 else "broken"

    def refuses(self, number: int, key: int) -> bool:
        return self.works[number].refuses and random.Random(f"{self.seed} {number} {key} filter").random() < 0.25

    def sent_back(self, key: int) -> int:
        """How often."""
        return random.Random(f"{self.seed} {key} back").choice((0, 0, 1, 2)) if self.requeue else 0

    # -- the model ---------------------------------------------------------------------------------------------------

    def fate_of(self, key: int) -> Fate:
        retries = timeouts = 0
        for number, work in enumerate(self.works):
            attempt = 1
            while (fault := self.fault(number, key, attempt)) not in ("fast", "slow"):
                timeouts += fault == "hang"
                if not work.may_try_again(fault, attempt):
                    error = {"busy": "Busy", "broken": "Broken", "hang": "TimeoutError"}[fault]
                    return Fate(error, True, retries, timeouts)
                attempt += 1
                retries += 1
            if self.refuses(number, key):
                return Fate(None, False, retries, timeouts)
        return Fate(None, True, retries, timeouts)

    def possible(self, key: int) -> set[str]:
        """What may become of a sample where budgets may refuse each of its retries: "given", "refused", or an error."""
        found: set[str] = set()
        for number, work in enumerate(self.works):
            attempt = 1
            while (fault := self.fault(number, key, attempt)) not in ("fast", "slow"):
                found.add({"busy": "Busy", "broken": "Broken", "hang": "TimeoutError"}[fault])
                if not work.may_try_again(fault, attempt):
                    return found
                attempt += 1
            if self.refuses(number, key):
                return found | {"refused"}
        return found | {"given"}

    def is_skipped(self, fate: Fate) -> bool:
        names = [] if self.skip is None else [kind.__name__ for kind in self.skip]
        return fate.error is not None and (fate.error in names or "Exception" in names)

    def given(self) -> list[int]:
        """What the source gives; -1: it fails, and goes on."""
        if self.source != "one of two fails":
            return list(range(self.samples))
        fails_at = self.samples // 4
        found: list[int] = []
        for key in range(self.samples + 2):
            if key % 2 and key // 2 >= fails_at:
                found += [-1] if key // 2 == fails_at else []
            elif key < self.samples:
                found.append(key)
        return found

    def samples_out(self) -> tuple[list[int | tuple[str, int]], list[tuple[int, int]]]:
        """Of an epoch in order: what comes to `batch`, and what is reported, each with its attempts."""
        out: list[int | tuple[str, int]] = []
        reported: list[tuple[int, int]] = []
        for key in self.given():
            fate = self.fate_of(key)
            if key < 0:
                out.append(("Lost", -1))
            elif fate.error is None:
                if fate.kept:
                    out.append(key)
            elif not self.is_skipped(fate):
                out.append((fate.error, key))
            elif self.max_errors is not None and len(reported) >= self.max_errors:
                out.append(("TooManySkippedError", key))
            else:
                reported.append((key, 1 + fate.retries))
        return out, reported

    def outcomes(self) -> list[Outcome]:
        """Of an epoch in order."""
        samples, _ = self.samples_out()
        out: list[Outcome] = []
        batch: list[int | tuple[str, int]] = []
        for sample in [*samples, None]:
            if sample is not None and sample != LOST:
                batch.append(sample)
            full = len(batch) == self.size
            if full or (batch and not self.drop_last and (sample is None or sample == LOST)):
                failed = [sample for sample in batch if isinstance(sample, tuple)]
                out.append(failed[0] if failed else [sample for sample in batch if isinstance(sample, int)])
                batch = []
            if sample == LOST:
                out.append(("Lost", -1))
        failed = [sample for sample in batch if isinstance(sample, tuple)]
        return [*out, failed[0]] if failed else out
